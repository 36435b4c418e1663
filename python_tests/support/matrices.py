"""Matrix families: the stacks that clients really send, and the ones that break algorithms.

A family builds a batch of L modules of one shape.  Sizes are small, odd where the subject allows
it, and m != n everywhere.  Factors are drawn in float64 and rounded to the asked dtype; a reference
value must be computed from the rounded factors (``Batch.b``, ``Batch.a``).
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WIDE_RANGE = (torch.float64, torch.float32, torch.bfloat16)
"""Dtypes with at least the exponents of float32, for families that float16 cannot hold."""

ON_THE_CPU = ("cpu", "cuda-emulated")
"""Backends whose operators take the CPU's tensors, also where there is a GPU."""

DEVICE = torch.device(
    "cuda"
    if torch.cuda.is_available() and os.environ.get("FEDLORA_BACKEND") not in ON_THE_CPU
    else "cpu"
)
"""Where the operators under test get their inputs; batches and references stay on the CPU."""


@dataclass(frozen=True)
class Batch:
    """L modules of one shape: B [L, m, R], A [L, R, n], weights [K] and scalings [L, K]."""

    name: str
    seed: int
    dtype: torch.dtype
    b: torch.Tensor
    a: torch.Tensor
    ranks: tuple[int, ...]
    weights: torch.Tensor
    scalings: torch.Tensor

    @property
    def modules(self) -> int:
        return self.b.shape[0]

    @property
    def clients(self) -> int:
        return len(self.ranks)

    @property
    def stacked_rank(self) -> int:
        return self.b.shape[2]

    @property
    def attainable_rank(self) -> int:
        """min(R, m, n), the largest rank the update can have."""
        return min(self.stacked_rank, self.b.shape[1], self.a.shape[2])

    @property
    def scale(self) -> torch.Tensor:
        """[L, R] float64, the diagonal of D: w_k s_k repeated r_k times."""
        return (self.weights * self.scalings).repeat_interleave(torch.tensor(self.ranks), dim=1)

    def dense(self) -> torch.Tensor:
        """[L, m, n] float64, the ideal update of the rounded factors."""
        return (self.b.double() * self.scale[:, None]) @ self.a.double()

    def magnitude(self) -> torch.Tensor:
        """[L] float64, sum_k ||w_k s_k B_k A_k||_F: the scale of rounding when updates cancel."""
        total = torch.zeros(self.modules, dtype=torch.float64)
        for b, a, factor in zip(
            self.b.double().split(self.ranks, dim=2),
            self.a.double().split(self.ranks, dim=1),
            (self.weights * self.scalings).T,
            strict=True,
        ):
            total += factor.abs() * torch.linalg.matrix_norm(b @ a)
        return total

    def client_factors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The clients' own tensors, module-major: entry l*K + k is client k of module l."""
        bs = [block.clone() for module in self.b for block in module.split(self.ranks, dim=1)]
        as_ = [block.clone() for module in self.a for block in module.split(self.ranks, dim=0)]
        return bs, as_

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """b, a and scale on the device under test."""
        return self.b.to(DEVICE), self.a.to(DEVICE), self.scale.to(DEVICE)

    def reordered(self, order: list[int]) -> "Batch":
        """The same round with the clients in another order."""
        b, a = self.b.split(self.ranks, dim=2), self.a.split(self.ranks, dim=1)
        return Batch(
            f"{self.name}-reordered",
            self.seed,
            self.dtype,
            torch.cat([b[k] for k in order], dim=2),
            torch.cat([a[k] for k in order], dim=1),
            tuple(self.ranks[k] for k in order),
            self.weights[order],
            self.scalings[:, order],
        )


Builder = Callable[["Family", torch.Generator], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """A named way to draw stacks of a fixed size."""

    name: str
    draw: Builder
    m: int = 37
    n: int = 53
    ranks: tuple[int, ...] = (4, 4, 4)
    modules: int = 2
    weights: tuple[float, ...] | None = None
    scalings: tuple[float, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def id(self) -> str:
        """Readable, with the sizes: name-L2-m37-n53-r4.4.4."""
        ranks = ".".join(str(rank) for rank in self.ranks)
        if len(self.ranks) > 6:
            ranks = f"{len(self.ranks)}x{self.ranks[0]}"
        return f"{self.name}-L{self.modules}-m{self.m}-n{self.n}-r{ranks}"

    @property
    def equal_ranks(self) -> bool:
        return len(set(self.ranks)) == 1

    def build(self, dtype: torch.dtype, seed: int = 0) -> Batch:
        """Draw the batch; the seed is mixed with the family's name."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(self.name.encode()))
        b, a = self.draw(self, generator)
        clients = len(self.ranks)
        weights = torch.tensor(self.weights or [1.0 / clients] * clients, dtype=torch.float64)
        scalings = torch.tensor(self.scalings or [1.0] * clients, dtype=torch.float64)
        scalings = scalings.repeat(self.modules, 1)
        return Batch(
            self.name, seed, dtype, b.to(dtype), a.to(dtype), self.ranks, weights, scalings
        )


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def orthonormal_columns(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Float64 [..., rows, columns] with orthonormal columns, rows >= columns."""
    return torch.linalg.qr(normal(generator, *shape)).Q


def _independent(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    stacked_rank = sum(family.ranks)
    b = normal(generator, family.modules, family.m, stacked_rank)
    return b, normal(generator, family.modules, stacked_rank, family.n)


def _shared_start(noise: float) -> Builder:
    """A_k = A_0 + noise * N: one round after a common initialization."""

    def draw(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        b, a = _independent(family, generator)
        start = normal(generator, family.modules, max(family.ranks), family.n)
        starts = torch.cat([start[:, :rank] for rank in family.ranks], dim=1)
        return b, starts + noise * a

    return draw


def _round_zero(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    b, a = _shared_start(0.0)(family, generator)
    return torch.zeros_like(b), a


def _all_zero(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    b, a = _independent(family, generator)
    return torch.zeros_like(b), torch.zeros_like(a)


def _with_clients(
    change: Callable[[list[torch.Tensor], list[torch.Tensor]], None],
) -> Builder:
    """Independent clients, then ``change`` edits the lists of blocks B_k and A_k in place."""

    def draw(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        b, a = _independent(family, generator)
        bs, as_ = list(b.split(family.ranks, dim=2)), list(a.split(family.ranks, dim=1))
        change(bs, as_)
        return torch.cat(bs, dim=2), torch.cat(as_, dim=1)

    return draw


def _zero_client(bs: list[torch.Tensor], as_: list[torch.Tensor]) -> None:
    bs[1], as_[1] = torch.zeros_like(bs[1]), torch.zeros_like(as_[1])


def _duplicates(bs: list[torch.Tensor], as_: list[torch.Tensor]) -> None:
    bs[2], as_[2] = bs[0], as_[0]


def _sign_flipped(bs: list[torch.Tensor], as_: list[torch.Tensor]) -> None:
    bs[1], as_[1] = -bs[0], -as_[0]


def _canceling(bs: list[torch.Tensor], as_: list[torch.Tensor]) -> None:
    """B_1 = -B_0 with the same A: the mean of these two is exactly zero."""
    bs[1], as_[1] = -bs[0], as_[0]


def _nearly_canceling(bs: list[torch.Tensor], as_: list[torch.Tensor]) -> None:
    """The mean of the first two is 1e-3 of each: what is left sits below sqrt(eps) of float32."""
    bs[1], as_[1] = 1e-3 * bs[1] - bs[0], as_[0]


def _dominant(bs: list[torch.Tensor], as_: list[torch.Tensor]) -> None:
    bs[1] = 300.0 * bs[1]


def _badly_scaled(ratio: float) -> Callable[[list[torch.Tensor], list[torch.Tensor]], None]:
    def change(bs: list[torch.Tensor], as_: list[torch.Tensor]) -> None:
        bs[1], as_[1] = bs[1] * ratio, as_[1] / ratio

    return change


def _magnitude(b_factor: float, a_factor: float) -> Builder:
    def draw(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        b, a = _independent(family, generator)
        return b * b_factor, a * a_factor

    return draw


def _mixed_modules(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A zero module between a tiny and a huge one: no threshold may look across modules."""
    b, a = _independent(family, generator)
    return b * torch.tensor([1e-9, 0.0, 1e9], dtype=torch.float64)[:, None, None], a


def _rank_deficient(
    family: Family, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each client's B has rank 1 and its A rank 2, in small integers that every dtype holds."""
    bs, as_ = [], []
    for rank in family.ranks:

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(-2, 3, shape, generator=generator).double()

        bs.append(integers(family.modules, family.m, 1) @ integers(family.modules, 1, rank))
        as_.append(integers(family.modules, rank, 2) @ integers(family.modules, 2, family.n))
    return torch.cat(bs, dim=2), torch.cat(as_, dim=1)


def _padded(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same update from a stack of rank R, whose further columns and rows are zero.

    Rows of A that are dependent up to rounding would not do: their Gram matrix does not show what
    rounding adds, and B does not have to vanish there.
    """
    pad = torch.nn.functional.pad
    return pad(b, (0, rank - b.shape[2])), pad(a, (0, 0, 0, rank - a.shape[1]))


def _clustered(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values 4, 4, 4, 4, 1, 1, 1, 1, ... up to the rounding of the dtype."""
    stacked_rank = sum(family.ranks)
    rank = min(stacked_rank, family.m, family.n)
    b = orthonormal_columns(generator, family.modules, family.m, rank)
    a = orthonormal_columns(generator, family.modules, family.n, rank).mT
    values = torch.where(torch.arange(rank) % 8 < 4, 4.0, 1.0).double()
    return _padded(b * values * len(family.ranks), a, stacked_rank)


def _graded(family: Family, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values 1, 1/3, 1/9, ...: a gap everywhere, down to far below half precision."""
    stacked_rank = sum(family.ranks)
    rank = min(stacked_rank, family.m, family.n)
    b = orthonormal_columns(generator, family.modules, family.m, rank)
    a = orthonormal_columns(generator, family.modules, family.n, rank).mT
    values = 3.0 ** -torch.arange(rank, dtype=torch.float64)
    mixing = orthonormal_columns(generator, family.modules, rank, rank)
    return _padded((b * values) @ mixing * len(family.ranks), mixing.mT @ a, stacked_rank)


THRESHOLD_VALUES = ((9.0, 3.0, 3.0, 1.0), (2.0, 2.0, 1.0, 1.0), (7.0, 1.0, 1.0, 7.0))
"""Singular values of the three modules of ``energy_on_threshold``, up to one common factor."""

THRESHOLD_RANKS = {0.5: (1, 2, 2), 0.9: (2, 3, 2), 0.98: (3, 4, 2), 0.99: (3, 4, 3), 1.0: (4, 4, 4)}
"""What select_rank must return for them, with equality at the threshold in most entries."""


def _energy_on_threshold(
    family: Family, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative energies exactly 0.81, 0.9, 0.99, 1 in module 0; Hadamard vectors, no rounding."""
    del generator
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < max(family.m, family.n):
        hadamard = torch.kron(hadamard, two)
    small = hadamard[: family.m, : family.m]
    values = torch.tensor(THRESHOLD_VALUES[: family.modules], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    b = small[:, 1:5].expand(family.modules, -1, -1) * values[:, None, order]
    a = hadamard[5:9].expand(family.modules, -1, -1)
    return _padded(b, a, sum(family.ranks))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "independent",
            _independent,
            ranks=(5, 5, 5, 5),
            modules=3,
            weights=(0.4, 0.3, 0.2, 0.1),
            scalings=(1.0, 2.0, 4.0, 0.5),
        ),
        Family("shared_start_1e-2", _shared_start(1e-2), weights=(0.5, 0.25, 0.25)),
        Family("shared_start_1e-4", _shared_start(1e-4), weights=(0.5, 0.25, 0.25)),
        Family("round_zero", _round_zero),
        Family("all_zero", _all_zero),
        Family("zero_client", _with_clients(_zero_client)),
        Family("zero_weight", _independent, weights=(0.5, 0.0, 0.5)),
        Family("duplicate_clients", _with_clients(_duplicates), weights=(0.2, 0.5, 0.3)),
        Family("sign_flipped", _with_clients(_sign_flipped), ranks=(6, 6)),
        Family("canceling", _with_clients(_canceling), ranks=(6, 6)),
        Family("nearly_canceling", _with_clients(_nearly_canceling), ranks=(6, 6)),
        Family("dominant_client", _with_clients(_dominant)),
        Family("badly_scaled_1e6", _with_clients(_badly_scaled(1e6)), dtypes=WIDE_RANGE),
        Family("badly_scaled_1e8", _with_clients(_badly_scaled(1e8)), dtypes=WIDE_RANGE),
        Family("badly_scaled_1e2", _with_clients(_badly_scaled(1e2))),
        Family("rank_deficient", _rank_deficient),
        Family("clustered", _clustered, ranks=(8, 8)),
        Family("graded", _graded, ranks=(4, 4)),
        Family("energy_on_threshold", _energy_on_threshold, m=16, n=32, ranks=(2, 2), modules=3),
        Family("wide_stack", _independent, m=19, n=29, ranks=(8, 8, 8, 8, 8)),
        Family("wide_stack_tall", _shared_start(1e-2), m=47, n=17, ranks=(8, 8, 8)),
        Family("single_client", _independent, ranks=(6,), scalings=(2.0,)),
        Family("rank_one_clients", _independent, ranks=(1, 1, 1, 1, 1)),
        Family("rank_one_single", _independent, ranks=(1,), modules=1),
        Family("m_equals_r", _independent, m=8, n=24, ranks=(8, 8)),
        Family("n_equals_r", _independent, m=24, n=8, ranks=(8, 8)),
        Family("row_vector", _independent, m=1, n=11, ranks=(2, 2)),
        Family("primes", _independent, m=31, n=61, ranks=(3, 5, 7, 11), modules=1),
        Family(
            "heterogeneous_ranks",
            _independent,
            m=43,
            n=29,
            ranks=(8, 4, 2, 2, 1, 1),
            scalings=(2.0, 2.0, 4.0, 4.0, 1.0, 1.0),
        ),
        Family("signed_scalings", _independent, scalings=(1.0, -2.0, 0.5)),
        Family("tiny_1e-15", _magnitude(1e-15, 1.0), dtypes=WIDE_RANGE),
        Family("huge_1e15", _magnitude(1.0, 1e15), dtypes=WIDE_RANGE),
        Family("tiny_times_huge", _magnitude(1e-15, 1e15), dtypes=WIDE_RANGE),
        Family("mixed_modules", _mixed_modules, modules=3, dtypes=WIDE_RANGE),
        Family("tile_edges", _independent, m=129, n=257, ranks=(5,) * 13, modules=3),
        Family("many_clients", _shared_start(1e-2), m=120, n=161, ranks=(4,) * 24, modules=1),
    )
}

CASES = tuple((name, dtype) for name, family in FAMILIES.items() for dtype in family.dtypes)
"""Every family in every dtype that can hold it."""

EQUAL_RANK_CASES = tuple(case for case in CASES if FAMILIES[case[0]].equal_ranks)
"""The same for the rules that average factors."""


def case_id(case: tuple[str, torch.dtype]) -> str:
    """Readable id of a case: independent-L3-m37-n53-r5.5.5.5-float32."""
    name, dtype = case
    return f"{FAMILIES[name].id}-{str(dtype).removeprefix('torch.')}"


Shape = tuple[int, int, int]
"""m, n and the rank of each of two clients."""

CANCELLED: tuple[Shape, ...] = ((37, 53, 6), (19, 29, 12), (31, 17, 10), (90, 81, 36), (9, 7, 1))
"""Smaller and larger than the stack, and on both sides of the rank where solvers change."""

EXACT_AND_ROUNDED = ((0.5, 0.5), (0.3, 3 * 0.1))
"""Two clients' shares of D: equal, and equal up to rounding."""


def canceling(
    dtype: torch.dtype, shape: Shape, weights: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """b, a and scale of two modules whose two clients hold (B, A) and (-B, A)."""
    m, n, rank = shape
    generator = torch.Generator().manual_seed(m * n + rank)
    b = normal(generator, 2, m, rank).to(dtype)
    a = normal(generator, 2, rank, n).to(dtype)
    scale = torch.tensor(weights, dtype=torch.float64).repeat_interleave(rank).repeat(2, 1)
    return torch.cat([b, -b], dim=2), torch.cat([a, a], dim=1), scale


LARGE_RANKS = (64, 65, 160, 161, 168, 169, 236, 237, 320, 336, 337, 448, 472, 473, 512)
"""Stacked ranks on both sides of every border between two of the CUDA eigensolver's kernels."""

LARGE_FAMILIES = ("independent", "shared_start_1e-2")
"""Families at all of these ranks; the others at EVERY_FAMILY_AT alone, or in slow tests."""

EVERY_FAMILY_AT = (65, 169, 512)

FULL_ON_THE_CPU = 65
"""The largest rank at which an emulated decomposition of a full-rank stack takes about a second."""

SIDES = (19, 23)
"""m and n of a thin module: far below its stacked rank, so that the emulator takes a second."""


@dataclass(frozen=True)
class Large:
    """A family at another stacked rank R: thin (m, n < R) or full (the family's proportions)."""

    name: str
    rank: int
    full: bool

    def __str__(self) -> str:
        return f"{self.name}-R{self.rank}-{'full' if self.full else 'thin'}"

    def build(self, dtype: torch.dtype) -> Batch:
        """Draw it, 2 or 3 modules."""
        family = FAMILIES[self.name]
        m, n = (_side(side, family, self.rank) for side in (family.m, family.n))
        if self.name == "energy_on_threshold":  # Hadamard matrices of these sizes
            m, n = family.m, family.n
        elif not self.full:
            m, n = min(SIDES[0], m), min(SIDES[1], n)
        modules = max(2, family.modules)
        resized = replace(family, m=m, n=n, ranks=_ranks(family, self.rank), modules=modules)
        return resized.build(dtype)


def _side(side: int, family: Family, rank: int) -> int:
    """Above, at or below R as the family's own is."""
    before = sum(family.ranks)
    if side > before:
        return rank + 5 + side % 8
    return rank if side == before else max(1, side * rank // before)


def _ranks(family: Family, rank: int) -> tuple[int, ...]:
    """The clients' ranks in the family's proportions, summing to R.

    What is left over goes to a client that no family pairs with another: the second of three or
    more, else a further one.
    """
    before = sum(family.ranks)
    if set(family.ranks) == {1}:
        return (1,) * rank if len(family.ranks) > 1 else (rank,)
    ranks = [max(1, each * rank // before) for each in family.ranks]
    left = rank - sum(ranks)
    if len(ranks) == 2:
        return (*ranks, left) if left else tuple(ranks)
    ranks[min(1, len(ranks) - 1)] += left
    return tuple(ranks)


def large_cases() -> list[Any]:
    """Parameters of the tests of large stacked ranks.

    Thin stacks of two families at all ranks and of every family at three. Stacks of full rank, at
    which the eigensolver has its most to do, take minutes in the emulator: all of them are slow
    tests, and those of the two families run on a GPU in any case.
    """
    cases = []
    for rank in LARGE_RANKS:
        for name in FAMILIES:
            chosen = name in LARGE_FAMILIES
            at_once = chosen and (DEVICE.type == "cuda" or rank <= FULL_ON_THE_CPU)
            for full, now in ((False, chosen or rank in EVERY_FAMILY_AT), (True, at_once)):
                case = Large(name, rank, full)
                marks = () if now else pytest.mark.slow
                cases.append(pytest.param(case, marks=marks, id=str(case)))
    return cases
