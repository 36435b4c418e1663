"""The files of a run: settings.json, metrics.jsonl, summary.json. Every write is atomic."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from integration.server import Round
from integration.settings import Settings


def write(path: Path, text: str) -> None:
    """Replace the file at once: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_settings(out: Path, settings: Settings, start: tuple[float, float]) -> None:
    """settings.json: the settings, the start's accuracy and loss, and the versions."""
    packages = ("torch", "transformers", "peft", "numpy")
    content = {
        "settings": dataclasses.asdict(settings),
        "start_accuracy": start[0],
        "start_loss": start[1],
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
    }
    write(out / "settings.json", json.dumps(content, indent=2) + "\n")


def write_metrics(out: Path, rounds: Sequence[Round]) -> None:
    """metrics.jsonl: one line per rule and round, with every module's rank and errors."""
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in rounds]
    write(out / "metrics.jsonl", "".join(f"{line}\n" for line in lines))


def write_summary(
    out: Path, rounds: Sequence[Round], start_accuracy: float
) -> list[dict[str, Any]]:
    """summary.json: one object per rule, in the order of the rounds; also returned.

    Accuracy and loss are the last round's. The errors, the rank and the bytes are means over the
    rounds, the milliseconds their median (the first call of a process pays for its warm-up).
    """
    by_rule: dict[str, list[Round]] = {}
    for entry in rounds:
        by_rule.setdefault(entry.rule, []).append(entry)
    summary = [
        {
            "rule": rule,
            "accuracy": entries[-1].accuracy,
            "start_accuracy": start_accuracy,
            "loss": entries[-1].loss,
            "relative_error": fmean(entry.relative_error for entry in entries),
            "svd_floor": fmean(entry.svd_floor for entry in entries),
            "rank": fmean(entry.rank for entry in entries),
            "bytes_up": round(fmean(entry.bytes_up for entry in entries)),
            "bytes_down": round(fmean(entry.bytes_down for entry in entries)),
            "aggregation_ms": median(entry.aggregation_ms for entry in entries),
        }
        for rule, entries in by_rule.items()
    ]
    write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
