"""Benchmarks: this library beside what a user would run instead, on the same inputs in one run.

    fedlora bench                    the short table, under a minute on two cores

Numbers appear only beside a passed check of the output they belong to. ``benchmarks/`` in the
repository measures every stage and writes the files that the README's table is made from.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

import fedlora_kernels as flk
from fedlora_kernels.bench import inputs, pipelines, results, stages
from fedlora_kernels.bench.device import Device, versions
from fedlora_kernels.bench.inputs import Stacks
from fedlora_kernels.bench.measure import Comparison, Row, Run
from fedlora_kernels.bench.roofline import Roofline
from fedlora_kernels.bench.shapes import Case, equal
from fedlora_kernels.bench.table import tables

_LLAMA = Case("Llama-3-8B", "q_proj", equal(8, 16), modules=4)
_TINY = Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2)

SHORT: tuple[tuple[Case, Callable[[Stacks], Comparison]], ...] = (
    (_LLAMA, stages.gram),
    (_LLAMA, stages.spectrum),
    (_LLAMA, stages.combine),
    (_LLAMA, stages.weighted_sum),
    (_LLAMA, pipelines.stacked_svd),
    (
        _TINY,
        lambda stacks: pipelines.stacked_svd(stacks, dense=True, merged=("svd", "cat")),
    ),
    (_LLAMA, pipelines.flora_na),
)


def main(
    short: bool = True,
    *,
    device: str | None = None,
    threads: int | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> int:
    """Measure, print the table, and say whether every check was green.

    Args:
        short: four modules and a few rounds; otherwise more rounds and 32 clients as well.
        device: a torch device, the CPU when None.
        threads: CPU threads, torch's own choice when None.
        out: folder to write ``<device>/short.json`` to.
        console: where to print.

    Returns:
        0, or 1 where a check refused a number of this library's own.
    """
    console = console or Console()
    chosen = Device.use(device, threads)
    roofline = Roofline.measure(chosen)
    found = versions()
    console.print(
        f"{chosen.model}, {chosen.threads} threads, backend {flk.backend()}, torch "
        f"{found['torch']}: copy {roofline.copy_bytes_per_second / 1e9:.1f} GB/s, GEMM "
        f"{roofline.fp64_flops_per_second / 1e9:.0f} (fp64) and "
        f"{roofline.fp32_flops_per_second / 1e9:.0f} (fp32) GFLOP/s"
    )
    rows: list[Row] = []
    for comparison in _comparisons(short, chosen.torch_device):
        rows += Run(comparison, chosen, roofline, budget_s=1.0 if short else 10.0).measured()
    console.print(
        "ratio: time over that of the block's first row; error: worst of the row's checks"
    )
    for shown in tables(rows):
        console.print(shown)
    for row in rows:
        if row.refused:
            console.print(f"[red]{row.stage} {row.variant}[/red] refused: {row.refused}")
    if out is not None:
        name = "short" if short else "long"
        results.write(out, chosen, results.of_rows(name, chosen, roofline, rows))
    return int(any(row.refused and not row.source for row in rows))


def _comparisons(short: bool, device: torch.device) -> Iterator[Comparison]:
    drawn: dict[Case, Stacks] = {}
    cases = list(SHORT)
    if not short:
        many = Case("Llama-3-8B", "q_proj", equal(32, 16), modules=4)
        cases += [(many, compare) for compare in (stages.gram, stages.spectrum)]
        cases.append((many, pipelines.stacked_svd))
    for case, compare in cases:
        if case not in drawn:
            drawn[case] = inputs.draw(case, device)
        yield compare(drawn[case])


__all__ = ["SHORT", "main"]
