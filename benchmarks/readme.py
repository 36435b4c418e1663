"""The README's benchmark section, as markdown made from one device's result files."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.stand.table import duration

BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"

Suites = Mapping[str, Mapping[str, Any]]
"""suite -> result document"""


def replaced(text: str, section: str) -> str:
    """The text with everything between the two markers exchanged.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the markers {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{section.strip()}\n{END}{after}"


def section(suites: Suites, figures: Sequence[str]) -> str:
    """All tables of a device, then its figures.

    Args:
        suites: what ``results.read`` found.
        figures: paths of the figures, relative to the README.
    """
    parts = [_head(suites)]
    if "acceptance" in suites:
        summary = suites["acceptance"]["summary"]
        parts.append("\n".join(_decompositions(suites["acceptance"])))
        parts.append("\n".join(_facts(summary)))
    if "flows" in suites:
        parts.append("\n".join(_flows(suites["flows"]["rows"])))
    if "surrogate" in suites:
        parts.append("\n".join(_descent(suites["surrogate"]["rows"])))
    parts.append("\n".join(_stages(suites)))
    parts += [f"![{_caption(path)}]({path})" for path in figures]
    return "\n\n".join(part for part in parts if part)


def _head(suites: Suites) -> str:
    found = next(iter(suites.values()))
    device, versions, roofline = found["device"], found["versions"], found["roofline"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "peft") if name in versions)
    return (
        f"{device['model']}{threads}, backend `{found['backend']}`, {named}; copy "
        f"{roofline['copy_bytes_per_second'] / 1e9:.0f} GB/s, GEMM "
        f"{roofline['fp64_flops_per_second'] / 1e9:.0f} (fp64) and "
        f"{roofline['fp32_flops_per_second'] / 1e9:.0f} (fp32) GFLOP/s. Medians of interleaved "
        "runs on the same inputs; outputs checked against float64 first."
    )


def _decompositions(acceptance: Mapping[str, Any]) -> Iterator[str]:
    """FLoRIST's factors: our time, and how many times as long the others take."""
    rows = acceptance["rows"]
    first = rows[0]
    yield (
        f"| `stacked_svd`, {first['modules']} modules {first['m']} x {first['n']}, "
        f"{first['dtype']}, energy 0.9 | ranks kept | precision | time | of floor "
        "| three SVDs | QR + QR + core SVD |"
    )
    yield "|---|---|---|---|---|---|---|"
    for case in acceptance["summary"]["stacked_svd"]:
        kept = _span(case["ranks_kept"])
        for precision, times in case["times_as_long_as"].items():
            row = _find(rows, case, precision)
            if row is None or row["seconds"] is None:
                continue
            yield (
                f"| R = {case['stacked_rank']}, {row['ranks']} clients | {kept} | {precision} "
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


def _facts(summary: Mapping[str, Any]) -> Iterator[str]:
    times = summary["peft"]["times_as_long_as"]["exact"].get("PEFT svd")
    if times is not None:
        yield (
            f'- PEFT `add_weighted_adapter(combination_type="svd")` on one of these modules '
            f"(R = 128) takes {_times(times)} times as long as `stacked_svd`."
        )
    share = summary["flora_na"]["solve_over_gram"]
    if share is not None:
        yield f"- FLoRA-NA (K = 10, r = 16): the solve adds {share:.1%} to its Gram pass."
    peaks = [found for found in summary["memory"] if found["operation"] == "stacked_svd exact"]
    for found in peaks:
        if found["family"] == "shared_start":
            yield (
                f"- Peak memory of `stacked_svd` beyond inputs and outputs at R = "
                f"{found['stacked_rank']}: {found['peak_bytes'] / 1e6:.1f} MB, "
                f"{found['peak_over_one_module']:.2f} of one module's stacks."
            )
    for found in summary["folders"]:
        if "outside_over_files" in found:
            yield (
                f'- `aggregate(rule="florist")` on {found["clients"]} PEFT folders of '
                f"{found['modules']} modules "
                f"({found['dtype']}, {found['bytes'] / 1e6:.0f} MB): "
                f"{duration(found['total_seconds'])}, of which "
                f"{duration(found['operators_seconds'])} in the operators; the rest is "
                f"{found['outside_over_files']:.2f} times what reading and writing the files costs."
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
            of_rule = cells.setdefault((ours["variant"], row["variant"] + " *" * row["less"]), {})
            of_rule[model] = f"{duration(ours['seconds'])}; {_times(row['times_first'])}"
    yield "| one call, adapters in memory | beside | " + " | ".join(rounds.values()) + " |"
    yield "|---|---" + "|---" * len(rounds) + "|"
    for (rule, peer), of_rule in cells.items():
        told = " | ".join(of_rule.get(model, "") for model in rounds.values())
        yield f"| `{rule}` | {peer} | {told} |"
    yield ""
    yield "Our time, then how many times as long the peer takes."


def _round(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['modules']} modules, {row['ranks']}"


def _descent(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """FLoRA-NA by gradient descent: the time and the objective reached."""
    yield (
        "| FLoRA-NA's p and q, one module | Gram matrices and solve | Adam, 1000 steps (best of "
        "three rates) | f / \\|dW\\|^2: FedIT | solve (sweeps) | Adam above the solve |"
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
    """Each stage at its largest case of 8 clients, beside its fastest peer."""
    shown = [name for name in _ORDER if name in suites]
    if not shown:
        return
    yield "| stage | measured on | ours | of floor | beside | times as long |"
    yield "|---|---|---|---|---|---|"
    for stage in shown:
        for block in _blocks(suites[stage]["rows"]):
            ours, others = block[0], [row for row in block if row["source"] and row["seconds"]]
            if ours["seconds"] is None or not others:
                continue
            beside = "<br>".join(f"{row['variant']}{' *' * row['less']}" for row in others)
            times = "<br>".join(_times(row["times_first"]) for row in others)
            modules = f"{ours['modules']} x " if ours["modules"] > 1 else ""
            family = "" if ours["family"] == "shared_start" else f", {ours['family']}"
            yield (
                f"| {ours['variant'] if stage == 'aggregate' else stage} | {ours['model']} "
                f"{ours['module']} {modules}{ours['m']} x {ours['n']}, {ours['ranks']}, "
                f"{ours['dtype']}{family} | {duration(ours['seconds'])} "
                f"| {ours['share_of_floor']:.0%} | {beside} | {times} |"
            )
    yield ""
    yield (
        "\\* gives less than the row's task: values without vectors, a stack, a stack without "
        "weights, a plain mean."
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
    """The comparison of each stage that README has room for: whole aggregations, else the one
    with most data among 8-client fp32 ones.
    """
    found = blocks(rows)
    if rows[0]["stage"] == "aggregate":
        return found
    if rows[0]["stage"] == "stacked_svd":
        return [block for block in found if any("PEFT" in row["variant"] for row in block)]
    return [max(found, key=lambda block: (block[0]["dtype"] == "fp32", _size(block[0])))]


def _size(row: Mapping[str, Any]) -> int:
    return int(row["modules"] * row["stacked_rank"] * (row["m"] + row["n"]))


def _times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 1.95 else f"{value:.2f}"


def _span(bounds: Sequence[int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


def _caption(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]
