"""The measuring step of ``on_gpu.sh``: stages and pipelines beside their peers on one device.

    python -m benchmarks.gpu_comparisons FILE [--device cuda] [--tiny] [--seconds 300] [--resume]

Writes FILE (rows, roofline, versions, what did not run) and FILE with .txt for its tables, anew
after every variant. A variant that raises is named and the others go on; no time is reported for
one whose check fails. Where the device no longer answers, the process ends with the status
``ANOTHER_PROCESS``; with ``--resume`` the next one goes on after the comparison in which that
happened.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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

ANOTHER_PROCESS = 75
"""The exit status after which a new process can go on: an error of a kernel stays with its own."""
PEERS_ONCE_S = 0.5
"""A peer that takes longer is run once."""
PATIENCE_S = 20.0
"""A peer that takes longer is interrupted."""

CASES = (
    # The hard ones first: R over 472 on cuSOLVER, many modules, too few modules to fill a GPU.
    Case("Llama-3-8B", "down_proj", equal(32, 16), modules=8),
    Case("Llama-3-8B", "q_proj", equal(8, 16), modules=224, dtype=torch.bfloat16),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2),
    Case("Llama-3-8B", "q_proj", equal(8, 16), modules=32, dtype=torch.bfloat16),
    Case("Llama-3-8B", "q_proj", equal(8, 16), modules=32),
)
PROFILED = CASES[1]
"""Most of the GPU's time in a round of an 8 billion parameter model: 7 x 32 modules."""
TINY = (Case("TinyLlama-1.1B", "v_proj", equal(2, 3), modules=2, size=(48, 40)),)


def comparisons(case: Case, device: Device) -> Iterator[tuple[str, Compare]]:
    """Everything measured on a case, the open questions first."""
    dense = case.m * case.n <= 1 << 20
    yield (
        "stacked_svd",
        lambda drawn: gpu_peers.pipeline(
            drawn, pipelines.stacked_svd(drawn, dense=dense), stages.ENERGY, stages.MAX_RANK
        ),
    )
    yield "spectrum", stages.spectrum
    if device.is_cuda:
        yield "eigenproblems", gpu_peers.eigenproblems
    yield "gram", stages.gram
    yield "combine", stages.combine
    yield "weighted_sum", stages.weighted_sum


class Sheet:
    """What has been measured, in a file that is replaced as a whole after every variant."""

    def __init__(self, file: Path, device: Device, roofline: Roofline) -> None:
        self.file, self.device, self.roofline = file, device, roofline
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}
        self.finished: list[str] = []
        self._begun = ""

    @classmethod
    def resumed(cls, file: Path, device: Device) -> "Sheet":
        """The one that an earlier process wrote; what it had begun is left as it is."""
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        sheet = cls(file, device, Roofline(**found["roofline"]))
        sheet.rows = [Row(**row) for row in found["rows"]]
        sheet.left_out = dict(found["left_out"])
        sheet.finished = list(found["finished"])
        if begun := found["begun"]:
            sheet.left_out.setdefault(begun, "the process ended during it")
            sheet.finished.append(begun)
        return sheet

    def begin(self, label: str) -> None:
        """Name the comparison that is about to run."""
        self._begun = label
        self.write()

    def finish(self, label: str, rows: Sequence[Row]) -> None:
        """Keep a comparison's rows for good."""
        self.rows += rows
        self.finished.append(label)
        self._begun = ""
        self.write()

    def leave_out(self, label: str, reason: str) -> None:
        """Say why a comparison has no rows."""
        self.left_out[label] = reason
        self.finish(label, ())

    def write(self, provisional: Sequence[Row] = ()) -> None:
        """Replace both files; ``provisional`` are the rows of the comparison that is running."""
        rows = [*self.rows, *provisional]
        found = results.of_rows("on_gpu", self.device, self.roofline, rows) | {
            "left_out": self.left_out,
            "finished": self.finished,
            "begun": self._begun,
        }
        replace(self.file, json.dumps(found, indent=1) + "\n")
        shown = self.file.with_suffix(".new.txt")
        with shown.open("w", encoding="utf-8") as file:
            console = Console(file=file, width=100)
            for table in tables(rows):
                console.print(table)
            for row in rows:
                if row.refused:
                    reason = f"{row.stage} {row.comparison}, {row.variant}: {row.refused}"
                    console.print(f"no time: {reason}", markup=False)
            for name, reason in self.left_out.items():
                console.print(f"not run: {name}: {reason}", markup=False)
        shown.replace(self.file.with_suffix(".txt"))


def replace(file: Path, text: str) -> None:
    """Write a file that is whole at any moment: under another name first."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def measure(cases: Sequence[Case], device: Device, sheet: Sheet, until: float) -> bool:
    """Fill the sheet; False where the device stopped answering and a new process has to go on."""
    for case in cases:
        stacks = None
        for name, compare in comparisons(case, device):
            label = f"{name} {case}"
            if label in sheet.finished:
                continue
            left = until - time.monotonic()
            if left <= 0:
                sheet.leave_out(label, "out of time")
                continue
            sheet.begin(label)
            try:
                stacks = stacks or inputs.draw(case, device.torch_device)
                run = Run(
                    compare(stacks),
                    device,
                    sheet.roofline,
                    peers_once_s=PEERS_ONCE_S,
                    patience_s=min(PATIENCE_S, max(left, 1.0)),
                    keep=sheet.write,
                )
                sheet.finish(label, run.measured())
            except Exception as problem:  # what a driver or a missing library raises is the finding
                sheet.leave_out(label, f"{type(problem).__name__}: {problem}")
            if not answers(device):
                return False
    return True


def answers(device: Device) -> bool:
    """Whether the device still computes: after an illegal access it does not, in this process."""
    try:
        return float(torch.ones(2, device=device.torch_device).sum()) == 2
    except RuntimeError:
        return False


def main() -> int:
    """Measure, write, and say whether this library's checks were all green."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small case, to rehearse")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--resume", action="store_true", help="go on with FILE")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    device = Device.use(options.device)
    if options.resume and options.file.is_file():
        sheet = Sheet.resumed(options.file, device)
    else:
        size = {"elements": 1 << 20, "size": 256} if options.tiny else {}
        sheet = Sheet(options.file, device, Roofline.measure(device, **size))
    if not measure(TINY if options.tiny else CASES, device, sheet, until):
        return ANOTHER_PROCESS
    return int(any(row.refused and not row.source for row in sheet.rows))


if __name__ == "__main__":
    raise SystemExit(main())
