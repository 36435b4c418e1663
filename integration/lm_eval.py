"""The language model evaluation harness on what a run has left, for users who have it installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration import files
from integration.model.loading import file_option, folder
from integration.settings import SettingsError


def evaluate(out: Path, tasks: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """The harness's results for these tasks, also written to `out/lm_eval.json`.

    `out` is a run's folder that holds an adapter: that of `run`, or `adapters/RULE` of `compare`
    with its settings.json two folders up. `limit` is a number of examples per task.
    Raises SettingsError where the package, the adapter or the run's settings are missing, and for
    a model of random weights, which nobody else can load.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    except ImportError:
        raise SettingsError("lm-eval needs the harness: pip install lm-eval[hf]") from None
    if not (out / "adapter_config.json").is_file():
        raise SettingsError(f"{out} has no adapter_config.json; expected what a run has left")
    near = (out, *out.resolve().parents[:3])
    path = next((x / "settings.json" for x in near if (x / "settings.json").is_file()), None)
    if path is None:
        raise SettingsError(f"{out}: no settings.json there or above; expected a run's folder")
    settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    if settings["init"] == "random":
        raise SettingsError(
            f"{out} belongs to a model of random weights; expected a pretrained one"
        )
    name = settings["model"]
    options = {"pretrained": folder(name), "peft": out, **file_option(name)}
    model = ",".join(f"{key}={value}" for key, value in options.items())
    found = simple_evaluate(model="hf", model_args=model, tasks=list(tasks), limit=limit)
    results: dict[str, Any] = files.finite(found["results"])
    text = json.dumps(results, indent=2, default=str, allow_nan=False)
    files.write(out / "lm_eval.json", text + "\n")
    return results
