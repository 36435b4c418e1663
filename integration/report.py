"""report.html of a run, from its files alone: one file, no script, nothing loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from integration import charts
from integration.records import write
from integration.table import COLUMNS, cells

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #24292f;
         max-width: 1060px; margin: 2.5rem auto; padding: 0 1.25rem; background: #fff; }}
  h1 {{ font-size: 1.65rem; line-height: 1.25; margin: 0 0 .3rem; }}
  h2 {{ font-size: 1.15rem; margin: 2.6rem 0 .3rem; }}
  p {{ margin: .3rem 0 .9rem; max-width: 46rem; color: #57606a; }}
  p strong, dd {{ color: #24292f; }}
  dl {{ display: flex; flex-wrap: wrap; gap: 1rem 2.4rem; margin: 1.4rem 0; }}
  dt {{ font-size: .8rem; color: #6e7781; }}
  dd {{ margin: 0; font-size: 1.3rem; font-weight: 600; }}
  .wide {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .45rem .7rem; text-align: right; border-bottom: 1px solid #eaeef2;
            white-space: nowrap; }}
  th {{ font-size: .82rem; font-weight: 600; color: #6e7781; border-bottom: 2px solid #d0d7de; }}
  th:first-child, td:first-child {{ text-align: left; }}
  td:first-child {{ font-weight: 600; }}
  td.best {{ font-weight: 700; background: #eef6fc; }}
  svg {{ width: 100%; height: auto; display: block; }}
  svg.narrow {{ max-width: 760px; }}
  .at {{ color: {at_floor}; font-weight: 600; }}
  .above {{ color: {above_floor}; font-weight: 600; }}
  footer {{ margin-top: 3rem; font-size: .82rem; color: #6e7781; }}
  code {{ font-size: .92em; }}
</style>
<h1>{title}</h1>
<p>{setting}</p>
<dl>{facts}</dl>
<h2>The rules beside each other</h2>
<div class="wide">{table}</div>
<p>Accuracy and loss of the global model on the test split after the last round (of a personal rule:
mean over its clients). Error: distance of the update that was sent from the ideal one, relative to
the ideal one's norm, mean over modules and rounds; SVD floor: the least possible at this rank.
MB are those of all clients in one round, up to the server and down from it; aggregation in ms.</p>
<h2>Accuracy over the rounds</h2>
<p>Each panel shows one rule before the others in grey.
<span class="at">Blue</span>: the error is the SVD floor, the least possible.
<span class="above">Vermilion</span>: the error is above it.</p>
{accuracy}
<h2>Error of the aggregation</h2>
<p>Solid: error of the rule. Dotted: SVD floor of the rank it sends. Grey: what averaging the
factors of the same adapters would lose. The shaded gap is what the rule gives away.</p>
{errors}
<h2>Accuracy against traffic</h2>
<p>Up and left is better: more accuracy for fewer bytes.</p>
{traffic}
<footer>{footer}</footer>
</html>
"""


def write_report(out: Path) -> Path:
    """Write `out/report.html` from the three files of a run; returns its path."""
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rules: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, lines):
        rules.setdefault(line["rule"], []).append(line)
    path = out / "report.html"
    write(path, _page(settings, summary, rules))
    return path


def _page(
    run: Mapping[str, Any],
    summary: Sequence[Mapping[str, Any]],
    rules: Mapping[str, charts.Rounds],
) -> str:
    settings, start = run["settings"], run["start_accuracy"]
    ranks = sorted(set(settings["ranks"]), reverse=True)
    best = max(summary, key=lambda entry: float(entry["accuracy"]))
    facts = {
        "accuracy at the start": f"{start:.3f}",
        "best at the end": f"{best['accuracy']:.3f} ({best['rule']})",
        "clients": settings["clients"],
        "rounds": settings["rounds"],
        "LoRA rank" if len(ranks) == 1 else "LoRA ranks": ", ".join(map(str, ranks)),
        "seed": settings["seed"],
    }
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return PAGE.format(
        title=f"Federated LoRA: {len(summary)} aggregation rule{'s' * (len(summary) > 1)} compared",
        setting=escape(
            f"Task {settings['task']}, model {settings['model']}, LoRA on "
            f"{' and '.join(settings['target_modules'])}; {settings['clients']} clients hold the "
            f"training split in Dirichlet({settings['alpha']:g}) proportions and take "
            f"{settings['steps']} steps of {settings['batch_size']} a round. Every rule starts "
            "from the same model, data and seeds."
        ),
        facts="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
            for name, value in facts.items()
        ),
        table=_table(summary),
        accuracy=charts.accuracy(rules, start),
        errors=charts.errors(rules),
        traffic=charts.traffic(rules, summary).replace("<svg", '<svg class="narrow"', 1),
        footer=escape(f"Settings: settings.json. {versions}."),
        at_floor=charts.AT_FLOOR,
        above_floor=charts.ABOVE_FLOOR,
    )


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as an HTML table, the best accuracy and the fewest bytes marked."""
    best = {
        1: max(entry["accuracy"] for entry in summary),
        6: min(entry["bytes_up"] for entry in summary),
        7: min(entry["bytes_down"] for entry in summary),
    }
    keys = {1: "accuracy", 6: "bytes_up", 7: "bytes_down"}
    rows = []
    for entry in summary:
        marked = [
            f'<td class="best">{escape(text)}</td>'
            if column in keys and len(summary) > 1 and entry[keys[column]] == best[column]
            else f"<td>{escape(text)}</td>"
            for column, text in enumerate(cells(entry))
        ]
        rows.append(f"<tr>{''.join(marked)}</tr>")
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
