"""Roofline: what this machine can do, and how long each stage must therefore take at least.

    floor = max(bytes / copy bandwidth, flops_64 / GEMM rate_64 + flops_32 / GEMM rate_32)

Bytes count each input once and each output once. Flops count the cheapest way that is known: a
symmetric product once (R^2 d per Gram matrix), LAPACK's counts for factorizations (LAPACK Working
Note 41). A share above 1 says that a rate, measured on another shape, was exceeded: inputs were
still in a cache, or a product ran faster than the GEMM that was timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.stand.device import Device

# 256 MB each way: eight times the last-level cache of a desktop CPU.
_COPY_ELEMENTS = 1 << 26
# A product of 2048 x 2048 matrices reaches the rate of larger ones to within some percent.
_GEMM_SIZE = 2048
_REPEATS = 5


@dataclass(frozen=True)
class Roofline:
    """Measured rates of one device; the best of some repeats, because a floor must not be soft."""

    copy_bytes_per_second: float
    """read and written bytes both count"""
    fp64_flops_per_second: float
    fp32_flops_per_second: float

    @classmethod
    def measure(
        cls, device: Device, elements: int = _COPY_ELEMENTS, size: int = _GEMM_SIZE
    ) -> "Roofline":
        """Copy ``elements`` floats, multiply ``size`` x ``size`` matrices: 2 s on two cores."""
        source = torch.ones(elements, device=device.torch_device)
        target = torch.empty_like(source)
        copy = _best(device, lambda: target.copy_(source))
        rates = []
        for dtype in (torch.float64, torch.float32):
            x = torch.randn(size, size, dtype=dtype, device=device.torch_device)
            out = torch.empty_like(x)
            rates.append(2 * size**3 / _best(device, _product(x, out)))
        return cls(2 * source.nbytes / copy, rates[0], rates[1])


@dataclass(frozen=True)
class Work:
    """What a stage must at least move and compute."""

    bytes: float
    flops_64: float = 0.0
    flops_32: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both, without a pass over the data between them."""
        return Work(
            self.bytes + other.bytes,
            self.flops_64 + other.flops_64,
            self.flops_32 + other.flops_32,
        )

    def floor(self, roofline: Roofline) -> float:
        """Seconds."""
        moved = self.bytes / roofline.copy_bytes_per_second
        computed = (
            self.flops_64 / roofline.fp64_flops_per_second
            + self.flops_32 / roofline.fp32_flops_per_second
        )
        return max(moved, computed)

    @property
    def flops(self) -> float:
        """In both precisions."""
        return self.flops_64 + self.flops_32


def gram(x: torch.Tensor, rows: bool, precision: str = "exact") -> Work:
    """R (R + 1) d flops per module, float64 unless "fast"."""
    modules, rank, depth = x.shape if rows else (x.shape[0], x.shape[2], x.shape[1])
    flops = float(modules * rank * (rank + 1) * depth)
    moved = float(x.nbytes + modules * rank * rank * 8)
    if precision == "fast" and x.dtype != torch.float64:
        return Work(moved, flops_32=flops)
    return Work(moved, flops_64=flops)


def spectrum(modules: int, rank: int, kept: int) -> Work:
    """Cholesky R^3/3, congruence R^3 (dpotrf, dsygst), and p vectors through M, left and right.

    Bytes: two R x R in, p columns of left and right and R values out.
    """
    flops = modules * (4 / 3 * rank**3 + 4 * rank**2 * kept)
    return Work(8.0 * modules * (2 * rank**2 + 2 * rank * kept + rank), flops_64=flops)


def select_rank(modules: int, rank: int) -> Work:
    """R values and a total in, one integer out; a multiplication and an addition per value."""
    return Work(8.0 * modules * (rank + 2), flops_64=2.0 * modules * rank)


def client_products(modules: int, clients: int, rank: int) -> Work:
    """The lower triangles of two R x R matrices in, K x K numbers out."""
    entries = rank * (rank + 1) / 2
    return Work(8.0 * modules * (2 * entries + clients**2), flops_64=2.0 * modules * entries)


def surrogate(modules: int, clients: int, rank: int) -> Work:
    """The K x K coupling (2 K R^2) and one pair of least-squares steps (8 R^2 + 2 K^3 / 3)."""
    stacked = clients * rank
    flops = modules * (2 * clients * stacked**2 + 8 * stacked**2 + 2 / 3 * clients**3)
    return Work(8.0 * modules * (2 * stacked**2 + 2 * clients), flops_64=flops)


def combine(b: torch.Tensor, a: torch.Tensor, kept: int, columns: int) -> Work:
    """2 R (m + n) flops per kept component, at the float32 rate for float32 and narrower data.

    Args:
        b: [L,m,R].
        a: [L,R,n].
        kept: components of all modules together.
        columns: how many components are written per module, zeros included.
    """
    modules, m, rank = b.shape
    n = a.shape[2]
    written = modules * columns * (m + n) * b.element_size()
    flops = 2.0 * rank * (m + n) * kept
    moved = float(b.nbytes + a.nbytes + written)
    if b.dtype == torch.float64:
        return Work(moved, flops_64=flops)
    return Work(moved, flops_32=flops)


def weighted_sum(stacked: torch.Tensor) -> Work:
    """Each element once, 1/K of them written."""
    return Work(stacked.nbytes * (1 + 1 / stacked.shape[1]))


def stacked_svd(
    b: torch.Tensor, a: torch.Tensor, kept: int, columns: int, precision: str = "exact"
) -> Work:
    """gram + spectrum + combine with every factor read once.

    Where R >= min(m, n) the dense update and the Gram matrix of its smaller side are cheaper.
    """
    modules, m, rank = b.shape
    n = a.shape[2]
    shorter = min(m, n)
    if rank < shorter:
        read = gram(b, rows=False, precision=precision) + gram(a, rows=True, precision=precision)
        core = spectrum(modules, rank, -(-kept // modules))
    else:
        dense = modules * (2.0 * m * n * rank + shorter**2 * max(m, n))
        read = Work(0.0, flops_64=dense)
        core = spectrum(modules, shorter, -(-kept // modules))
    written = combine(b, a, kept, columns)
    return Work(
        written.bytes,
        read.flops_64 + core.flops_64 + written.flops_64,
        read.flops_32 + core.flops_32 + written.flops_32,
    )


def flora_na(b: torch.Tensor, a: torch.Tensor, clients: int, precision: str = "exact") -> Work:
    """gram + surrogate + weighted_sum with every factor read once."""
    modules, m, rank = b.shape
    n = a.shape[2]
    read = gram(b, rows=False, precision=precision) + gram(a, rows=True, precision=precision)
    solve = surrogate(modules, clients, rank // clients)
    written = modules * (m + n) * (rank // clients) * b.element_size()
    return Work(float(b.nbytes + a.nbytes + written), read.flops_64 + solve.flops_64, read.flops_32)


def _product(x: torch.Tensor, out: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.mm(x, x, out=out)


def _best(device: Device, call: Callable[[], object]) -> float:
    call()
    return min(device.timed(call)[0] for _ in range(_REPEATS))
