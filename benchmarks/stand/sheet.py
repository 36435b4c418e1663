"""Sheet: the rows of one suite, kept in a file that is replaced as a whole after every variant.

A variant that raises is named and the others go on; no time is reported for one whose check fails.
Where the device no longer answers, the process has to end; the next one goes on, after the
comparison in which that happened, with what the file has (``Sheet.resumed``).
"""

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from benchmarks.stand import results
from benchmarks.stand.device import Device
from benchmarks.stand.measure import Comparison, Row, Run
from benchmarks.stand.roofline import Roofline
from benchmarks.stand.suite import Make, Suite
from benchmarks.stand.table import tables


class Beside(Protocol):
    """Adds variants to a comparison; another revision of this library does."""

    def added(self, suite: str, label: str, comparison: Comparison) -> Comparison:
        """The comparison with more variants."""


class Sheet:
    """What has been measured of one suite."""

    def __init__(
        self,
        suite: str,
        device: Device,
        roofline: Roofline,
        file: Path | None = None,
        text: Path | None = None,
    ) -> None:
        """An empty one.

        Args:
            suite: its name.
            device: where it is measured.
            roofline: the device's.
            file: where its rows are kept.
            text: where its tables are kept.
        """
        self.suite, self.device, self.roofline = suite, device, roofline
        self.file, self.text = file, text
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}
        self.finished: list[str] = []
        self._begun = ""

    @classmethod
    def resumed(cls, file: Path, device: Device, text: Path | None = None) -> "Sheet":
        """The one that an earlier process wrote; what it had begun is left as it is."""
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        sheet = cls(found["suite"], device, Roofline(**found["roofline"]), file, text)
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
        """Replace the file and its tables; ``provisional`` are rows of what is running."""
        rows = [*self.rows, *provisional]
        if self.text is not None:
            shown = io.StringIO()
            self.show(Console(file=shown, width=100), rows)
            results.replace(self.text, shown.getvalue())
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        found = results.of_rows(self.suite, self.device, self.roofline, rows) | {
            "left_out": self.left_out,
            "finished": self.finished,
            "begun": self._begun,
        }
        results.replace(self.file, results.text(found))

    def show(self, console: Console, rows: Sequence[Row] | None = None) -> None:
        """Tables of all rows (or of those given), then what has no time and why."""
        rows = self.rows if rows is None else rows
        for table in tables(rows):
            console.print(table)
        for row in rows:
            if row.refused:
                reason = f"{row.stage} {row.comparison}, {row.variant}: {row.refused}"
                console.print(f"no time: {reason}", markup=False)
        for name, reason in self.left_out.items():
            console.print(f"not run: {name}: {reason}", markup=False)

    @property
    def failed(self) -> bool:
        """Whether a check of this library's own failed, or one of its calls raised."""
        return any(row.refused and not row.source for row in self.rows)


def measure(
    suite: Suite,
    chosen: Mapping[str, Make],
    sheet: Sheet,
    until: float | None = None,
    beside: Beside | None = None,
) -> bool:
    """Fill the sheet; False where the device stopped answering and a new process has to go on.

    Args:
        suite: whose limits hold.
        chosen: label -> comparison.
        sheet: where rows are kept; what it has finished is not run again.
        until: time.monotonic() after which no comparison begins.
        beside: adds variants to every comparison.
    """
    device = sheet.device
    for label, make in chosen.items():
        if label in sheet.finished:
            continue
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            sheet.leave_out(label, "out of time")
            continue
        sheet.begin(label)
        patience = suite.patience_s
        if patience is not None and left is not None:
            patience = min(patience, max(left, 1.0))
        try:
            comparison = make(device)
            if beside is not None:
                comparison = beside.added(suite.name, label, comparison)
            run = Run(
                comparison,
                device,
                sheet.roofline,
                budget_s=suite.budget_s,
                peers_once_s=suite.peers_once_s,
                patience_s=patience,
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
