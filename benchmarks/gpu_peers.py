"""What only a GPU is measured beside: the vendor's eigensolver, and the pipeline of torch's parts.

``XsyevBatched`` is called as its ABI is, through ctypes, because torch before 2.12 solves batches
of symmetric matrices one after the other.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.bench import correctness, roofline
from fedlora_kernels.bench.correctness import Check, Pair
from fedlora_kernels.bench.inputs import Stacks
from fedlora_kernels.bench.measure import Comparison, Variant

# cuSOLVER's and CUDA's constants as their ABI has them.
_VECTORS, _LOWER = 1, 0
_TYPES = {torch.float32: 0, torch.float64: 1}
_LIBRARIES = ("libcusolver.so.12", "libcusolver.so.11", "libcusolver.so")


def bmm_eigh(stacks: Stacks, energy: float, max_rank: int) -> list[Pair]:
    """Float64 Gram matrices by bmm, two batched eigh, two products: the best of torch's parts.

    D G_A D = V S V^T; with L = V S^(1/2), eigenvectors W of L^T G_B L give B_g = B L W and
    A_g = W^T L^+ D A, without equilibration.
    """
    b, a, scale = stacks.b, stacks.a, stacks.scale
    wide_b, wide_a = b.double(), a.double() * scale[:, :, None]
    values, vectors = torch.linalg.eigh(wide_a @ wide_a.mT)
    root = values.clamp_min(0).sqrt()
    root = root.where(values > values[:, -1:] * values.shape[1] * torch.finfo(values.dtype).eps, 0)
    factor = vectors * root[:, None, :]
    squares, rotation = torch.linalg.eigh(factor.mT @ (wide_b.mT @ wide_b) @ factor)
    squares, rotation = squares.flip(-1).clamp_min(0), rotation.flip(-1)[:, :, :max_rank]
    shares = squares.cumsum(-1) / squares.sum(-1, keepdim=True)
    ranks = ((shares < energy).sum(-1) + 1).clamp_max(max_rank)
    inverse = torch.where(root > 0, 1 / root, 0)
    b_g = (wide_b @ (factor @ rotation)).to(b.dtype)
    a_g = (((rotation.mT * inverse[:, None, :]) @ vectors.mT) @ wide_a).to(a.dtype)
    return [(b[:, :p], a[:p]) for b, a, p in zip(b_g, a_g, ranks.tolist(), strict=True)]


def eigenproblems(stacks: Stacks) -> Comparison:
    """All eigenpairs of the modules' A-side Gram matrices: torch's eigh beside XsyevBatched."""
    grams = reference.gram(stacks.a, True)
    case = stacks.case
    norm = torch.linalg.matrix_norm(grams)
    work = roofline.spectrum(case.modules, case.stacked_rank, case.stacked_rank)

    def checks(found: tuple[Tensor, Tensor]) -> list[Check]:
        values, vectors = (part.double() for part in found)
        residual = torch.linalg.matrix_norm(grams @ vectors - vectors * values[:, None, :])
        eps = torch.finfo(found[0].dtype).eps
        return [
            Check("residual / norm", float((residual / norm).max()), 8 * case.stacked_rank * eps)
        ]

    variants = [
        Variant("torch.linalg.eigh", lambda: tuple(torch.linalg.eigh(grams)), checks, work, "torch")
    ]
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        solve = Prepared(partial(xsyev_batched, grams.to(dtype)))
        variants.append(
            Variant(f"XsyevBatched, {name}", solve, checks, work, "cuSOLVER", before=solve.prepare)
        )
    return Comparison("eigenproblems", case, tuple(variants))


class Prepared:
    """A call that is prepared once, untimed; a failure there is the variant's own."""

    def __init__(self, make: Callable[[], Callable[[], Any]]) -> None:
        self._make = cache(make)

    def prepare(self) -> None:
        """Before every run; only the first does something."""
        self._make()

    def __call__(self) -> Any:
        """The call."""
        return self._make()()


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


def pipeline(stacks: Stacks, base: Comparison, energy: float, max_rank: int) -> Comparison:
    """stacked_svd's comparison with :func:`bmm_eigh` beside the others."""
    added = Variant(
        "bmm + 2 eigh + bmm",
        lambda: bmm_eigh(stacks, energy, max_rank),
        lambda found: correctness.near_optimal(stacks, found),
        base.variants[0].work,
        "torch.bmm and torch.linalg.eigh in float64",
    )
    return Comparison(base.stage, base.case, (*base.variants, added), base.name)
