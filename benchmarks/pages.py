"""The measured parts of README.md and pages of docs/, from the committed result files.

A page says what it wants between two marks (integration/report/page_filler.py):

    <!-- benchmark claims -->      a few sentences
    <!-- end -->

    <!-- benchmark tables -->      every table and figure
    <!-- end -->

    <!-- benchmark scale -->       the tables of many clients (benchmarks/scale_page.py)
    <!-- end -->

    <!-- benchmark robust -->      what robust weights cost beside the Gram pass
    <!-- end -->
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import scale_page
from benchmarks.stand import results
from benchmarks.stand.table import duration
from fedlora_kernels import robust
from integration.report.page_filler import fill

PARTS = ("claims", "tables", "scale", "robust")
PAGES_OF_THEIR_OWN = {"scale", "robust"}
"""Suites that have a part of that name"""

Suites = Mapping[str, Mapping[str, Any]]
"""suite -> result document of one device"""


def filled(page: str, folder: Path, root: str) -> str:
    """The page with its measured parts made anew, a section for each device that has results.

    Args:
        page: the text, with its marks.
        folder: of the results, one folder a device.
        root: path from the page to ``folder``, for the links of the figures.

    Raises:
        ValueError: the page has no mark, or one that asks for something else; no results.
    """
    devices = {path.name: results.read(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    measured = {name: suites for name, suites in devices.items() if suites}
    # A device on which peers were measured has claims and tables.
    compared = {
        name: suites for name, suites in measured.items() if set(suites) - PAGES_OF_THEIR_OWN
    }
    if not measured:
        raise ValueError(f"{folder} holds no results; run `make bench` first")

    def part(name: str) -> str:
        if name == "claims":
            return "\n\n".join(map(claims, compared.values()))
        if name == "tables":
            return "\n\n".join(
                tables(
                    suites,
                    [f"{root}/{device}/figures/{path.name}" for path in drawn(folder / device)],
                )
                for device, suites in compared.items()
            )
        if name == "scale":
            return "\n\n".join(
                f"## Measured: {_device(suites)}\n\n{scale_page.tables(suites['scale'])}"
                for suites in measured.values()
                if "scale" in suites
            )
        if name == "robust":
            return "\n\n".join(
                f"{_device(suites)}:\n\n{robust_weights(suites['robust']['rows'])}"
                for suites in measured.values()
                if "robust" in suites
            )
        raise ValueError(f"unknown part {name!r}; known: {', '.join(PARTS)}")

    return fill(page, {"benchmark": part})


def drawn(device: Path) -> list[Path]:
    """The figures of a device's folder, in the order in which a page shows them."""
    paths = [device / "figures" / f"{name}.svg" for name in FIGURES]
    return [path for path in paths if path.is_file()]


def claims(suites: Suites) -> str:
    """What a device's results come to, in a few sentences."""
    told = [f"{_device(suites)} ({_versions(suites)}):"]
    if "acceptance" in suites:
        acceptance = suites["acceptance"]
        told += ["", _range(acceptance), *_peft(acceptance["summary"])]
        told += list(_folders(acceptance["summary"]))[:1]
    if "flows" in suites:
        told += _averages(suites["flows"]["rows"])
    return "\n".join(told)


def tables(suites: Suites, figures: Sequence[str]) -> str:
    """All tables of a device, then its figures.

    Args:
        suites: what ``results.read`` found.
        figures: paths of the figures, relative to the page.
    """
    parts = [f"## {_device(suites)}", f"Measured with {_versions(suites)}. {_rates(suites)}"]
    if "acceptance" in suites:
        acceptance, summary = suites["acceptance"], suites["acceptance"]["summary"]
        parts += ["### FLoRIST's decomposition", "\n".join(_decompositions(acceptance))]
        parts.append("\n".join([*_peft(summary), *_peaks(summary)]))
    if "flows" in suites or "acceptance" in suites:
        parts.append("### Whole rounds")
    if "flows" in suites:
        parts.append("\n".join(_flows(suites["flows"]["rows"])))
    if "acceptance" in suites:
        parts.append("\n".join(_folders(summary)))
    if "surrogate" in suites:
        parts += ["### FLoRA-NA's weights", "\n".join(_descent(suites["surrogate"]["rows"]))]
    if "acceptance" in suites:
        parts.append("\n".join(_solve(summary)))
    stages = "\n".join(_stages(suites))
    if stages:
        parts += ["### Every stage", stages]
    parts += [f"{FIGURES[_name(path)]}\n\n![{_name(path)}]({path})" for path in figures]
    return "\n\n".join(part for part in parts if part)


def robust_weights(rows: Sequence[Mapping[str, Any]]) -> str:
    """Times of the suite robust, each with its share of the Gram pass."""
    columns = blocks(rows)
    heads = [f"{block[0]['modules']} modules, {_shape(block[0])}" for block in columns]
    told = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(columns)}"]
    for same in zip(*columns, strict=True):
        cells = [
            duration(row["seconds"])
            + ("" if row is block[0] else f" ({row['seconds'] / block[0]['seconds']:.1%})")
            for row, block in zip(same, columns, strict=True)
        ]
        name = same[0]["variant"]
        told.append(f"| {f'`{name}`' if name in robust.names() else name} | {' | '.join(cells)} |")
    return "\n".join(told)


FIGURES = {
    "speedups": "How many times as long the two peers of FLoRIST's decomposition take, in both "
    "precisions:",
    "growth": "How time (above) and memory (below) grow with one size, the others fixed: the "
    "number K of clients, their rank r, a module's m or n, and the number L of modules. "
    "`~ K^1.6` says that the time grows with this power of K. From the dotted line on, `spectrum` "
    "takes longer than `gram`; the stacked rank R of that point stands beside it. The memory is "
    "the peak of `stacked_svd` beyond its inputs and outputs; the dashed line is the inputs' size:",
    "floors": "Share of the floor that every stage reaches on every input, beside the best peer. "
    "Three stages have other variants than exact and fast; the legend names them in brackets:",
}
"""Figure -> the sentence above it."""


def _device(suites: Suites) -> str:
    device = next(iter(suites.values()))["device"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    return f"{device['model']}{threads}"


def _versions(suites: Suites) -> str:
    found = next(iter(suites.values()))
    versions = found["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "peft") if name in versions]
    return ", ".join([f"backend `{found['backend']}`", *named])


def _rates(suites: Suites) -> str:
    roofline = next(iter(suites.values()))["roofline"]
    return (
        f"Memory is copied at {roofline['copy_bytes_per_second'] / 1e9:.0f} GB/s; matrices are "
        f"multiplied at {roofline['fp64_flops_per_second'] / 1e9:.0f} (float64) and "
        f"{roofline['fp32_flops_per_second'] / 1e9:.0f} (float32) GFLOP/s."
    )


def _range(acceptance: Mapping[str, Any]) -> str:
    """FLoRIST's decomposition in exact precision: from the least to the most."""
    cases, first = acceptance["summary"]["stacked_svd"], acceptance["rows"][0]
    exact = [_find(acceptance["rows"], case, "exact") for case in cases]
    seconds = [row["seconds"] for row in exact if row is not None and row["seconds"] is not None]
    stacked = [case["stacked_rank"] for case in cases]
    said = (
        f"- FLoRIST's decomposition (`stacked_svd`) of {first['modules']} modules of "
        f"{first['m']} x {first['n']}, {first['dtype']}, R = {min(stacked)} to {max(stacked)}:"
    )
    if not seconds:
        return f"{said} no time."
    told = [f"{said} {duration(min(seconds))} to {duration(max(seconds))}"]
    for peer, words in (
        ("three SVDs", "the three SVDs of FLoRIST's released code take"),
        ("QR + QR + core SVD", "two QR decompositions and a small SVD take"),
    ):
        times = [case["times_as_long_as"]["exact"].get(peer) for case in cases]
        known = [value for value in times if value is not None]
        if known:
            told.append(f"{words} {_times(min(known))} to {_times(max(known))} times as long")
    return "; ".join(told) + "."


def _averages(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The plain average beside numpy's, over the models."""
    found = [block for block in blocks(rows) if block[0]["variant"] == "aggregate fedit"]
    ratios = [block[1]["times_first"] for block in found if len(block) > 1]
    known = [value for value in ratios if value is not None]
    if known:
        yield (
            '- `aggregate(rule="fedit")` on adapters in memory: a plain NumPy average takes '
            f"{_times(min(known))} to {_times(max(known))} times as long (below 1: it is faster)."
        )


def _decompositions(acceptance: Mapping[str, Any]) -> Iterator[str]:
    """FLoRIST's factors: our time, and how many times as long the others take."""
    rows = acceptance["rows"]
    first = rows[0]
    yield (
        f"`stacked_svd` on {first['modules']} modules of {first['m']} x {first['n']}, "
        f"{first['dtype']}, energy 0.9. The last two columns say how many times as long the peer "
        "takes."
    )
    yield ""
    yield (
        "| R, clients x rank | ranks kept | precision | time | of floor | three SVDs "
        "| QR + QR + core SVD |"
    )
    yield "|---|---|---|---|---|---|---|"
    for case in acceptance["summary"]["stacked_svd"]:
        kept = _span(case["ranks_kept"])
        for precision, times in case["times_as_long_as"].items():
            row = _find(rows, case, precision)
            if row is None or row["seconds"] is None:
                continue
            yield (
                f"| {case['stacked_rank']}, {row['ranks']} | {kept} | {precision} "
                f"| {duration(row['seconds'])} | {row['share_of_floor']:.0%} "
                f"| {_times(times.get('three SVDs'))} | {_times(times.get('QR + QR + core SVD'))} |"
            )


def _find(
    rows: Sequence[Mapping[str, Any]], case: Mapping[str, Any], variant: str
) -> Mapping[str, Any] | None:
    for row in rows:
        same = (row["stage"], row["variant"], row["family"], row["stacked_rank"]) == (
            "stacked_svd",
            variant,
            case["family"],
            case["stacked_rank"],
        )
        if same:
            return row
    return None


def _peft(summary: Mapping[str, Any]) -> Iterator[str]:
    times = summary["peft"]["times_as_long_as"]["exact"].get("PEFT svd")
    if times is not None:
        yield (
            f'- PEFT\'s `add_weighted_adapter(combination_type="svd")` on one of these modules '
            f"(R = 128) takes {_times(times)} times as long as `stacked_svd`."
        )


def _solve(summary: Mapping[str, Any]) -> Iterator[str]:
    share = summary["flora_na"]["solve_over_gram"]
    if share is not None:
        yield (
            f"With 10 clients of rank 16 the solve takes {share:.1%} of the time of the pass over "
            "the factors that computes its Gram matrices."
        )


def _peaks(summary: Mapping[str, Any]) -> Iterator[str]:
    for found in summary["memory"]:
        if (found["operation"], found["family"]) == ("stacked_svd exact", "shared_start"):
            yield (
                f"- At R = {found['stacked_rank']} the peak memory of `stacked_svd` beyond its "
                f"inputs and outputs is {found['peak_bytes'] / 1e6:.1f} MB, "
                f"{found['peak_over_one_module']:.2f} times all clients' factors of one module."
            )


def _folders(summary: Mapping[str, Any]) -> Iterator[str]:
    for found in summary["folders"]:
        if "outside_over_files" in found:
            yield (
                f'- `aggregate(rule="florist")` on {found["clients"]} PEFT folders '
                f"({found['case']}, {found['bytes'] / 1e6:.0f} MB): "
                f"{duration(found['total_seconds'])}, of which "
                f"{duration(found['operators_seconds'])} in the operators. The rest takes "
                f"{found['outside_over_files']:.2f} times as long as only reading and writing the "
                "files."
            )


def _flows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Whole aggregations: our time and how many times as long the peers take."""
    rounds: dict[str, str] = {}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for block in blocks(rows):
        ours, others = block[0], [row for row in block[1:] if row["seconds"]]
        if ours["seconds"] is None:
            continue
        model = rounds.setdefault(ours["model"], _round(ours))
        for row in others:
            of_rule = cells.setdefault((ours["variant"], row["variant"] + " \\*" * row["less"]), {})
            of_rule[model] = f"{duration(ours['seconds'])}; {_times(row['times_first'])}"
    yield (
        "One call of `aggregate` on adapters in memory. A cell holds its time, then how many times "
        "as long the peer takes; below 1 the peer is faster."
    )
    yield ""
    yield "| rule | peer | " + " | ".join(rounds.values()) + " |"
    yield "|---|---" + "|---" * len(rounds) + "|"
    for (rule, peer), of_rule in cells.items():
        told = " | ".join(of_rule.get(model, "") for model in rounds.values())
        yield f"| `{rule.removeprefix('aggregate ')}` | {peer} | {told} |"


def _round(row: Mapping[str, Any]) -> str:
    return f"{row['model']}: {row['modules']} modules, {row['ranks']}"


def _descent(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """FLoRA-NA by gradient descent: the time and the objective reached."""
    yield (
        "FLoRA-NA's weights p and q of one module: from the Gram matrices by least squares "
        "(`surrogate`), and as in its paper by 1000 steps of Adam on the dense objective, the best "
        "of three learning rates. The objective f is the squared error of the averaged pair "
        "against the ideal update, here as a share of the update's squared norm."
    )
    yield ""
    yield (
        "| module, clients x rank, inputs | Gram matrices and solve | Adam | f of plain averages "
        "| f of the solve (sweeps) | f of Adam, above the solve |"
    )
    yield "|---|---|---|---|---|---|"
    for block in blocks(rows):
        ours, adam = block[0], block[-1]
        if ours["seconds"] is None or adam["seconds"] is None:
            continue
        facts = adam["facts"]
        yield (
            f"| {ours['m']} x {ours['n']}, {ours['ranks']}, {ours['family']} "
            f"| {duration(ours['seconds'])} | {duration(adam['seconds'])} "
            f"({_times(adam['times_first'])} times) | {facts['objective_fedit']:.3g} "
            f"| {ours['facts']['objective']:.3g} ({_span(ours['facts']['sweeps'])}) "
            f"| {facts['above_gram_solve']:.0e} |"
        )


def _stages(suites: Suites) -> Iterator[str]:
    """Each stage on one or several inputs, beside its peers."""
    shown = [name for name in _ORDER if name in suites]
    if not shown:
        return
    yield "The last column says how many times as long the peer takes."
    yield ""
    yield "| stage | measured on | time | of floor | peer | times as long |"
    yield "|---|---|---|---|---|---|"
    for stage in shown:
        for block in _blocks(suites[stage]["rows"]):
            ours, others = block[0], [row for row in block if row["source"] and row["seconds"]]
            if ours["seconds"] is None or not others:
                continue
            beside = "<br>".join(row["variant"] + " \\*" * row["less"] for row in others)
            times = "<br>".join(_times(row["times_first"]) for row in others)
            modules = f"{ours['modules']} x " if ours["modules"] > 1 else ""
            family = "" if ours["family"] == "shared_start" else f", {ours['family']}"
            yield (
                f"| {ours['variant'] if stage == 'aggregate' else stage} | {ours['model']} "
                f"{ours['module']} {modules}{_shape(ours)}{family} | {duration(ours['seconds'])} "
                f"| {ours['share_of_floor']:.0%} | {beside} | {times} |"
            )
    yield ""
    yield (
        "\\* The peer gives less than the row's task: singular values without vectors, a stack "
        "instead of a decomposition, a stack without weights, or a plain mean."
    )


_ORDER = (
    "gram",
    "spectrum",
    "rank",
    "combine",
    "weighted_sum",
    "stacked_svd",
    "flora_na",
    "aggregate",
)


def blocks(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows of one comparison each."""
    return [list(block) for _, block in groupby(rows, key=lambda row: row["comparison"])]


def _blocks(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The comparisons of each stage that the page has room for: whole aggregations, else the one
    with most data among 8-client fp32 ones.
    """
    found = blocks(rows)
    if rows[0]["stage"] == "aggregate":
        return found
    if rows[0]["stage"] == "stacked_svd":
        return [block for block in found if any("PEFT" in row["variant"] for row in block)]
    return [max(found, key=lambda block: (block[0]["dtype"] == "fp32", _size(block[0])))]


def _shape(row: Mapping[str, Any]) -> str:
    return f"{row['m']} x {row['n']}, {row['ranks']}, {row['dtype']}"


def _size(row: Mapping[str, Any]) -> int:
    return int(row["modules"] * row["stacked_rank"] * (row["m"] + row["n"]))


def _times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 1.95 else f"{value:.2f}"


def _span(bounds: Sequence[int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


def _name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]
