"""Overhead: what a whole aggregation costs beside its operators and beside reading the files."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

import fedlora_kernels as flk
from benchmarks.stand.device import Device
from fedlora_kernels.ops.operator import Operator

WEIGHTS_FILE = "adapter_model.safetensors"
"""PEFT's name."""


class Stopwatch:
    """Seconds spent inside ``torch.ops.fedlora.*``, by a clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = 0.0
        self.calls: dict[str, int] = {}
        self._depth = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """An operator's call, timed where it is not called by another operator."""

        def timed(operator: Operator[Any], *arguments: Any) -> Any:
            self._depth += 1
            start = self.clock()
            try:
                return call(operator, *arguments)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += self.clock() - start
                    self.calls[operator.name] = self.calls.get(operator.name, 0) + 1

        return timed


@contextmanager
def operators_timed(clock: Callable[[], float] = time.perf_counter) -> Iterator[Stopwatch]:
    """Time every call of this library's operators inside the block; on a CPU only."""
    watch = Stopwatch(clock)
    with patch.object(Operator, "__call__", watch.around(Operator.__call__)):
        yield watch


def aggregate_folders(
    device: Device, folders: list[Path], out: Path, **options: Any
) -> dict[str, float]:
    """Load, aggregate and save once: whole, inside the operators, and the rest, in seconds."""

    def whole() -> None:
        clients = [flk.Adapter.load(folder) for folder in folders]
        flk.aggregate(clients, **options).adapter.save(out)

    with operators_timed() as watch:
        total, _ = device.timed(whole)
    return {"total": total, "operators": watch.seconds, "outside": total - watch.seconds}


def read_and_write(device: Device, folders: list[Path], out: Path) -> dict[str, float]:
    """What the files alone cost, in seconds: every client's tensors read into memory of their own
    (safetensors maps a file, and reads it when its values are touched), the result's written.
    """

    def read() -> list[torch.Tensor]:
        tensors = []
        for folder in folders:
            tensors += [x.clone() for x in load_file(folder / WEIGHTS_FILE).values()]
        return tensors

    result = {name: x.clone() for name, x in load_file(out / WEIGHTS_FILE).items()}
    again = out.parent / f"{out.name}.copy.safetensors"
    reading, _ = device.timed(read)
    writing, _ = device.timed(lambda: save_file(result, again))
    again.unlink()
    return {"read": reading, "write": writing, "files": reading + writing}
