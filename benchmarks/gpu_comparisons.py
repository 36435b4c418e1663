"""The measuring step of ``on_gpu.sh``: stages and pipelines beside their peers on one device.

    python -m benchmarks.gpu_comparisons FILE [--device cuda] [--tiny] [--seconds 300]

Writes FILE (rows, roofline, versions, what did not run) and FILE with .txt for its tables. A
comparison that raises is named and the others go on; one whose check is red has no number.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import gpu_peers
from fedlora_kernels.bench import inputs, pipelines, results, stages
from fedlora_kernels.bench.device import Device
from fedlora_kernels.bench.inputs import Stacks
from fedlora_kernels.bench.measure import Comparison, Row, Run
from fedlora_kernels.bench.roofline import Roofline
from fedlora_kernels.bench.shapes import Case, equal
from fedlora_kernels.bench.table import tables

Compare = Callable[[Stacks], Comparison]

CASES = (
    Case("Llama-3-8B", "q_proj", equal(8, 16), modules=32, dtype=torch.bfloat16),
    Case("Llama-3-8B", "q_proj", equal(8, 16), modules=32),
    Case("Llama-3-8B", "down_proj", equal(32, 16), modules=8),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2),
)
TINY = (Case("TinyLlama-1.1B", "v_proj", equal(2, 3), modules=2, size=(48, 40)),)


def comparisons(case: Case, stacks: Stacks) -> Iterator[tuple[str, Compare]]:
    """Everything measured on a case, the cheap ones first."""
    yield "gram", stages.gram
    yield "combine", stages.combine
    yield "weighted_sum", stages.weighted_sum
    yield "spectrum", stages.spectrum
    if stacks.b.is_cuda:
        yield "eigenproblems", gpu_peers.eigenproblems
    dense = case.m * case.n <= 1 << 20
    yield (
        "stacked_svd",
        lambda drawn: gpu_peers.pipeline(
            drawn, pipelines.stacked_svd(drawn, dense=dense), stages.ENERGY, stages.MAX_RANK
        ),
    )


def measured(
    cases: tuple[Case, ...], device: Device, roofline: Roofline, until: float
) -> tuple[list[Row], dict[str, str]]:
    """Rows of what ran, and what did not with its reason."""
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for case in cases:
        stacks = inputs.draw(case, device.torch_device)
        for name, compare in comparisons(case, stacks):
            if time.monotonic() > until:
                left_out[f"{name} {case}"] = "out of time"
                continue
            try:
                rows += Run(compare(stacks), device, roofline).measured()
            except Exception as problem:  # what a driver or a missing library raises is the finding
                left_out[f"{name} {case}"] = f"{type(problem).__name__}: {problem}"
    return rows, left_out


def main() -> int:
    """Measure, write, and say whether this library's checks were all green."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small case, to rehearse")
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    device = Device.use(options.device)
    size = {"elements": 1 << 20, "size": 256} if options.tiny else {}
    roofline = Roofline.measure(device, **size)
    rows, left_out = measured(TINY if options.tiny else CASES, device, roofline, until)
    found = results.of_rows("on_gpu", device, roofline, rows) | {"left_out": left_out}
    options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    with options.file.with_suffix(".txt").open("w", encoding="utf-8") as file:
        console = Console(file=file, width=100)
        for table in tables(rows):
            console.print(table)
        for name, reason in left_out.items():
            console.print(f"not run: {name}: {reason}", markup=False)
    return int(any(row.refused and not row.source for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
