"""report.html of one or several runs, from their files: one file, no script, nothing loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from integration.files import write
from integration.report import figures, module_figures, palette
from integration.report.series import Rounds, Run, label, read_run, together
from integration.report.table import MISSING, columns

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: {ink};
         max-width: 1060px; margin: 2.5rem auto; padding: 0 1.25rem; background: #fff; }}
  h1 {{ font-size: 1.65rem; line-height: 1.25; margin: 0 0 .3rem; }}
  h2 {{ font-size: 1.15rem; margin: 2.6rem 0 .3rem; }}
  p {{ margin: .3rem 0 .9rem; max-width: 46rem; color: {text}; }}
  p strong, dd {{ color: {ink}; }}
  dl {{ display: flex; flex-wrap: wrap; gap: 1rem 2.4rem; margin: 1.4rem 0; }}
  dt {{ font-size: .8rem; color: {muted}; }}
  dd {{ margin: 0; font-size: 1.3rem; font-weight: 600; }}
  ul {{ margin: .3rem 0 .9rem; padding-left: 1.2rem; color: {text}; }}
  .wide {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; width: 100%; font-size: .875rem;
          font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .45rem .5rem; text-align: right; border-bottom: 1px solid {grid};
            white-space: nowrap; }}
  th {{ font-size: .82rem; font-weight: 600; color: {muted}; border-bottom: 2px solid {edge}; }}
  th:first-child, td:first-child {{ text-align: left; }}
  td:first-child {{ font-weight: 600; }}
  table.texts td {{ text-align: left; white-space: pre-wrap; vertical-align: top; }}
  table.texts {{ margin-bottom: 1.4rem; }}
  td.best {{ font-weight: 700; background: {highlight}; }}
  svg {{ width: 100%; height: auto; display: block; }}
  svg.narrow {{ max-width: 760px; }}
  .at {{ color: {at_floor}; font-weight: 600; }}
  .above {{ color: {above_floor}; font-weight: 600; }}
  footer {{ margin-top: 3rem; font-size: .82rem; color: {muted}; }}
  code {{ font-size: .92em; }}
</style>
<h1>{title}</h1>
<p>{setting}</p>
<dl>{facts}</dl>
<h2>The rules beside each other</h2>
<div class="wide">{table}</div>
<p>Accuracy and loss of the global model on the test split after the last round (of a personal rule:
mean over its clients{seeds}). Error: distance of the update that was sent from the ideal one,
relative to the ideal one's norm, mean over modules and rounds; SVD floor: the least possible at
this rank. MB are those of all clients in one round, up to the server and down from it; aggregation
in ms.{legend}</p>
{sections}
<footer>{footer}</footer>
</html>
"""

SECTION = "<h2>{title}</h2>\n<p>{text}</p>\n{figure}\n"

ACCURACY = """Each panel shows one rule before the others in gray.
<span class="at">Blue</span>: the error is the SVD floor, the least possible.
<span class="above">Vermilion</span>: the error is above it."""

TRAFFIC = """Up and left is better: more accuracy for fewer bytes. A line goes through a rule's
rounds, the large point is its last one."""

ERRORS = """Solid: error of the rule. Dotted: SVD floor of the rank it sends. Gray: what averaging
the factors of the same adapters would lose. The shaded gap is what the rule gives away."""

RANKS = (
    """What rank every module's update was sent in, where a rule chooses it. Darker is higher."""
)

QUESTIONS = """The first questions of the test split, with what the data set answers and what the
model wrote: at the start, and after every rule's last round (of the first seed; of a personal rule,
its first client's model)."""

SPECTRA = """Singular values of the ideal update, before any rule has cut it: of every place in the
order the median over the modules. A rank is cheap where the line falls steeply."""

TIMES = """Means over the rounds. Transfer is what a round's messages took beyond its longest
training; it is nothing in one process."""


def write_report(*folders: Path, out: Path | None = None) -> Path:
    """Write the report of these runs to `out`, or to report.html in the only run's folder.

    Returns its path. Raises SettingsError for a folder that holds no run.
    """
    runs = [read_run(folder) for folder in folders]
    path = folders[0] / "report.html" if out is None else out
    write(path, _page(runs))
    return path


def _page(runs: Sequence[Run]) -> str:
    rules = together(runs)
    starts = {label(run, rule, runs): run.start for run in runs for rule in run.rules}
    entries = [
        {**entry, "rule": label(run, entry["rule"], runs)} for run in runs for entry in run.summary
    ]
    versions = ", ".join(f"{k} {v}" for k, v in runs[0].settings["versions"].items())
    where = "settings.json" if len(runs) == 1 else "settings.json in every run's folder"
    several = max(run.settings["settings"].get("seeds", 1) for run in runs) > 1
    count = len(runs[0].rules) if len(runs) == 1 else len(runs)
    what = "aggregation rule" if len(runs) == 1 else "run"
    return PAGE.format(
        title=f"Federated LoRA: {count} {what}{'s' * (count > 1)} compared",
        setting=_setting(runs),
        facts=_facts(runs, entries),
        table=_table(entries),
        legend=_legend(entries),
        seeds="; with several seeds the mean and its 95 % interval" if several else "",
        sections=_sections(rules, starts, _questions(runs)),
        footer=escape(f"Settings: {where}. {versions}."),
        at_floor=figures.AT_FLOOR,
        above_floor=figures.ABOVE_FLOOR,
        ink=palette.INK,
        text=palette.TEXT,
        muted=palette.MUTED,
        edge=palette.EDGE,
        grid=palette.GRID,
        highlight=palette.HIGHLIGHT,
    )


def _sections(rules: Mapping[str, Rounds], starts: Mapping[str, float], questions: str) -> str:
    """The figures with their texts; those without data are left out."""
    traffic = figures.traffic(rules, starts)
    parts = [
        ("Questions and answers", QUESTIONS, questions),
        ("Accuracy over the rounds", ACCURACY, figures.accuracy(rules, starts)),
        ("Accuracy against traffic", TRAFFIC, traffic),
        ("Error of the aggregation", ERRORS, figures.errors(rules)),
        ("Ranks of the modules", RANKS, module_figures.ranks(rules)),
        ("Spectrum of the ideal update", SPECTRA, module_figures.spectra(rules)),
        ("Where the time goes", TIMES, figures.times(rules)),
    ]
    if lost := _lost(rules):
        parts.append(("Clients that were lost", "Participants that are not in a round.", lost))
    return "".join(
        SECTION.format(title=title, text=text, figure=figure)
        for title, text, figure in parts
        if figure
    )


def _setting(runs: Sequence[Run]) -> str:
    """What was run, in a sentence for one run, in a list of differences for several."""
    first = runs[0].settings["settings"]
    if len(runs) == 1:
        return escape(_described(first))
    names = list(dict.fromkeys(name for run in runs for name in run.settings["settings"]))
    differing = [
        name for name in names if len({str(run.settings["settings"].get(name)) for run in runs}) > 1
    ]
    items = "".join(
        f"<li>{escape(name)}: "
        + escape("; ".join(f"{run.settings['settings'].get(name)} ({run.name})" for run in runs))
        + "</li>"
        for name in differing
    )
    return f"{escape(_described(first))}</p><p>Where the runs differ:</p><ul>{items}</ul><p>"


def _described(settings: Mapping[str, Any]) -> str:
    dealt = settings.get("partition", "dirichlet")
    if dealt == "dirichlet":
        dealt = f"Dirichlet({settings['alpha']:g})"
    work = f"{settings['steps']} steps" if settings.get("steps") else f"{settings['epochs']} epochs"
    share = settings.get("participation", 1.0)
    some = f", {100 * share:g} % of them a round," if share < 1 else ""
    return (
        f"Task {settings['task']}, model {settings['model']}, {settings.get('method', 'lora')} on "
        f"{' and '.join(settings['target_modules'])}; {settings['clients']} clients{some} hold the "
        f"training split by {dealt} and take {work} of {settings['batch_size']} a round. Every "
        "rule starts from the same model, data and seeds."
    )


def _facts(runs: Sequence[Run], entries: Sequence[Mapping[str, Any]]) -> str:
    known = [entry for entry in entries if entry["loss"] is not None]  # null where it diverged
    best = min(known, key=lambda entry: float(entry["loss"]), default=None)
    settings = runs[0].settings["settings"]
    ranks = sorted({rank for run in runs for rank in run.settings["settings"]["ranks"]})
    starts = sorted({f"{run.settings['start_loss']:.3f}" for run in runs})
    facts = {
        "loss at the start": " to ".join({starts[0]: 0, starts[-1]: 0}),
        "lowest loss at the end": f"{best['loss']:.3f} ({best['rule']})" if best else MISSING,
        "clients": settings["clients"],
        "rounds": settings["rounds"],
        "LoRA rank" if len(ranks) == 1 else "LoRA ranks": ", ".join(map(str, reversed(ranks))),
        "seed" if settings.get("seeds", 1) == 1 else "seeds": settings["seed"]
        if settings.get("seeds", 1) == 1
        else settings["seeds"],
    }
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )


def _questions(runs: Sequence[Run]) -> str:
    """A table for every question of the first run: who answers what."""
    tables = []
    for place, asked in enumerate(runs[0].settings.get("questions", [])):
        rows = {name: asked[name] for name in ("question", "reference", "start")}
        for run in runs:
            for rule, rounds in run.rules.items():
                if len(texts := rounds[-1]["texts"]) > place:
                    rows[label(run, rule, runs)] = texts[place]
        cells = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(text.strip())}</td></tr>"
            for name, text in rows.items()
        )
        tables.append(f'<table class="texts">{cells}</table>')
    return "".join(tables)


def _lost(rules: Mapping[str, Rounds]) -> str:
    """A line for every rule that lost clients."""
    items = []
    for rule, rounds in rules.items():
        counts = {entry["round"]: entry["missing"] for entry in rounds if entry["missing"]}
        if counts:
            told = ", ".join(f"{count} in round {number}" for number, count in counts.items())
            items.append(f"<li>{escape(f'{rule}: {told}')}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as an HTML table, the best scores and the fewest bytes marked."""
    shown = columns(summary)
    best = {
        key: choose(entry[key] for entry in summary if entry.get(key) is not None)
        for key, choose in (column.best for column in shown if column.best)
    }
    rows = []
    for entry in summary:
        marked = [
            f'<td class="best">{escape(column.text(entry))}</td>'
            if column.best
            and len(summary) > 1
            and entry.get(column.best[0]) == best[column.best[0]]
            else f"<td>{escape(column.text(entry))}</td>"
            for column in shown
        ]
        rows.append(f"<tr>{''.join(marked)}</tr>")
    head = "".join(f"<th>{escape(column.title)}</th>" for column in shown)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _legend(summary: Sequence[Mapping[str, Any]]) -> str:
    """What the columns are that not every table has."""
    told = [f"{column.title}: {column.about}" for column in columns(summary) if column.about]
    if any("accuracy_interval" in entry for entry in summary):
        told.append("~: within noise of the best rule, seed by seed")
    return escape("".join(f" {text[0].upper()}{text[1:]}." for text in told))
