"""Memory: how much an operator needs at its peak beyond its inputs and outputs.

Each measurement is a process of its own: the kernel's high-water mark of the resident set is reset
after the inputs are drawn and a small call has loaded all code, and read after the call. Freed
memory is returned first, so nothing that was allocated before can hide the peak. On a GPU the same
question goes to torch's allocator.
"""

import ctypes
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import qr_core, three_svds
from benchmarks.stand import inputs
from benchmarks.stand.inputs import Round, Stacks
from benchmarks.stand.shapes import Case
from benchmarks.stand.tasks import ENERGY, MAX_RANK, Truncation
from fedlora_kernels import ops

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# glibc and Linux constants: mallopt's M_MMAP_THRESHOLD, prctl's PR_SET_THP_DISABLE.
_M_MMAP_THRESHOLD = -3
_PR_SET_THP_DISABLE = 41
# Allocations from here on get their own mapping, which is returned when they are freed.
_OWN_MAPPING = 1 << 16


@dataclass(frozen=True)
class Memory:
    """Bytes of one call."""

    inputs: int
    outputs: int
    peak: int
    """beyond inputs and outputs"""


def _svd(precision: str) -> Callable[[Stacks], Any]:
    return lambda s: ops.stacked_svd(s.b, s.a, s.scale, ENERGY, MAX_RANK, precision)


def _truncation(stacks: Stacks) -> Truncation:
    return Truncation(Round.of(stacks), ENERGY, MAX_RANK)


OPERATIONS: dict[str, Callable[[Stacks], Any]] = {
    "stacked_svd exact": _svd("exact"),
    "stacked_svd fast": _svd("fast"),
    "flora_na": lambda s: ops.flora_na(s.b, s.a, s.weights, s.scalings),
    "three SVDs": lambda s: three_svds.three_svds(_truncation(s)),
    "QR + QR + core SVD": lambda s: qr_core.qr_core(_truncation(s)),
}


def peak(operation: str, case: Case, threads: int) -> Memory | None:
    """Peak of one operation on a case, on the CPU, in a fresh process.

    Args:
        operation: a key of ``OPERATIONS``.
        case: what its inputs are drawn from.
        threads: torch's threads there.

    Returns:
        The bytes, or None where the system has no resettable high-water mark (Linux has).
    """
    if not (_STATUS.exists() and _CLEAR_REFS.exists()):
        return None
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.stand.memory"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, operation, case, threads).result()


def peak_on_gpu(operation: str, stacks: Stacks) -> Memory:
    """The same from torch's allocator, in this process."""
    device = stacks.b.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = OPERATIONS[operation](stacks)
    torch.cuda.synchronize(device)
    produced = _nbytes(result)
    highest = torch.cuda.max_memory_allocated(device)
    return Memory(stacks.nbytes, produced, highest - before - produced)


def _measured(operation: str, case: Case, threads: int) -> Memory:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)  # huge pages round every allocation up to 2 MB
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)
    call = OPERATIONS[operation]
    ranks = tuple(min(rank, 2) for rank in case.ranks[:4])
    call(inputs.draw(replace(case, size=(96, 96), ranks=ranks, modules=2)))
    stacks = inputs.draw(case)
    _ = stacks.scale, stacks.client_b, stacks.client_a
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    before = _status("RssAnon")
    _CLEAR_REFS.write_text("5", encoding="ascii")
    result = call(stacks)
    # Pages of code loaded meanwhile are not memory of the call.
    highest = _status("VmHWM") - _status("RssFile") - _status("RssShmem")
    produced = _nbytes(result)
    return Memory(stacks.nbytes, produced, max(0, highest - before - produced))


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the system's process status has no {field}")
    return int(found[1]) * 1024


def _nbytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.nbytes
    return sum(_nbytes(part) for part in result)
