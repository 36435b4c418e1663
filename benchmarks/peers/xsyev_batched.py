"""cuSOLVER's batched eigensolver, called as its ABI is, through ctypes.

torch before 2.12 solves batches of symmetric matrices one after the other.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Eigenproblems

# cuSOLVER's and CUDA's constants as their ABI has them.
_VECTORS, _LOWER = 1, 0
_TYPES = {torch.float32: 0, torch.float64: 1}
_LIBRARIES = ("libcusolver.so.12", "libcusolver.so.11", "libcusolver.so")


def xsyev_batched(matrices: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that solves symmetric [L,R,R]: eigenvalues ascending and eigenvectors in columns.

    Workspaces are made once and zeroed before every call: cuSOLVER 11.7.1 returns wrong vectors
    from one that is not.

    Raises:
        RuntimeError: there is no cuSOLVER with this function, or a call fails.
    """
    library = _load(matrices.device)
    count, size, _ = matrices.shape
    kind, device = _TYPES[matrices.dtype], matrices.device
    handle, parameters = ctypes.c_void_p(), ctypes.c_void_p()
    _expect("cusolverDnCreate", library.cusolverDnCreate(ctypes.byref(handle)))
    _expect("cusolverDnCreateParams", library.cusolverDnCreateParams(ctypes.byref(parameters)))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _expect("cusolverDnSetStream", library.cusolverDnSetStream(handle, stream))
    vectors = torch.empty_like(matrices)
    values = matrices.new_empty((count, size))
    info = torch.zeros(count, dtype=torch.int32, device=device)
    problem: Sequence[Any] = (
        handle,
        parameters,
        ctypes.c_int(_VECTORS),
        ctypes.c_int(_LOWER),
        ctypes.c_int64(size),
        ctypes.c_int(kind),
        ctypes.c_void_p(vectors.data_ptr()),
        ctypes.c_int64(size),
        ctypes.c_int(kind),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int(kind),
    )
    on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
    asked = library.cusolverDnXsyevBatched_bufferSize(
        *problem, ctypes.byref(on_device), ctypes.byref(on_host), ctypes.c_int64(count)
    )
    _expect("cusolverDnXsyevBatched_bufferSize", asked)
    workspace = torch.empty(max(1, on_device.value), dtype=torch.uint8, device=device)
    host = ctypes.create_string_buffer(max(1, on_host.value))

    def solve() -> tuple[Tensor, Tensor]:
        vectors.copy_(matrices)
        workspace.zero_()
        status = library.cusolverDnXsyevBatched(
            *problem,
            ctypes.c_void_p(workspace.data_ptr()),
            on_device,
            host,
            on_host,
            ctypes.c_void_p(info.data_ptr()),
            ctypes.c_int64(count),
        )
        _expect("cusolverDnXsyevBatched", status)
        return values, vectors.mT  # column-major, so a row in memory is a vector

    return solve


def _load(device: torch.device) -> ctypes.CDLL:
    """The cuSOLVER that torch uses: it loads its own with the first decomposition, wherever that
    lies, and its name then finds it.
    """
    torch.linalg.eigh(torch.eye(2, device=device))
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(library, "cusolverDnXsyevBatched"):
            return library
    raise RuntimeError("no cuSOLVER with XsyevBatched (CUDA 12.6.2) was found")


def _expect(call: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{call} failed with status {status}")


def _prepare(task: Eigenproblems, dtype: torch.dtype) -> Prepared:
    """Workspaces are made before the first call, so that a failure there is the variant's own."""
    made = cache(lambda: xsyev_batched(task.matrices.to(dtype)))

    def before() -> None:
        made()

    return Prepared(lambda: made()(), before)


DOUBLE = Peer(
    "XsyevBatched, float64",
    "cuSOLVER",
    lambda task: _prepare(task, torch.float64),
    Eigenproblems.checks,
)
SINGLE = Peer(
    "XsyevBatched, float32",
    "cuSOLVER",
    lambda task: _prepare(task, torch.float32),
    Eigenproblems.checks,
)
