"""The ServerApp: the comparison of the local engine, with Flower's nodes as its clients.

Its run config (`[tool.flwr.app.config]`, `flwr run --run-config`): `settings`, a JSON table as in a
run's settings.json, or else `preset`; `out`, an absolute folder on the server's machine; `resume`;
the time limits `reply-within` and `nodes-within` in seconds.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from integration.compare import compare
from integration.flower.engine import FlowerEngine
from integration.rounds.rule import choose
from integration.settings import Settings, SettingsError, from_preset, from_values

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every rule and write the files of a run."""
    config: dict[str, Any] = dict(context.run_config)
    settings = _settings(config)
    out = Path(str(config["out"]))
    if not out.is_absolute():
        raise SettingsError(f"out must be an absolute folder of the server, found {str(out)!r}")
    rules, left_out = choose(settings, explicit=False)
    console = Console(width=100, force_terminal=False)
    for line in left_out:
        console.print(line)
    engine = partial(
        FlowerEngine,
        grid,
        settings,
        reply_within=float(config["reply-within"]),
        nodes_within=float(config["nodes-within"]),
    )
    compare(settings, rules, out, console, resume=bool(config["resume"]), engine=engine)


def _settings(config: dict[str, Any]) -> Settings:
    if text := str(config["settings"]):
        return from_values(json.loads(text), "run config's settings")
    return from_preset(str(config["preset"]))
