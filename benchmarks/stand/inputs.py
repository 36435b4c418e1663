"""Inputs: clients' factors as federated training leaves them, drawn anew from a committed seed.

    A_k = A_0 + drift * noise      A_0 uniform in +-1/sqrt(n), PEFT's start, common to all clients
    B_k = (C + own * noise) S Q^T  common and own directions, S geometric, Q a random rotation

so the stacked A is close to rank-deficient and the update's spectrum decays: the ordinary case.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.stand.shapes import Case

Item = TypeVar("Item")


@dataclass(frozen=True)
class Family:
    """How far clients moved, and how fast the spectrum falls."""

    drift: float
    """of A, relative to its start"""
    common: float
    """size of what the clients' B share"""
    own: float
    """size of what each client's B has alone"""
    decay: float
    """ratio of successive singular values"""
    imbalance: float = 1.0
    """scale of the last client's update relative to the first's"""
    flipped: bool = False
    """every other client holds (-B_k, -A_k): the same update, factors that cancel in a mean"""


FAMILIES = {
    # At energy 0.9 these keep about 5 ranks, as FLoRIST's adapters do (arXiv 2506.09199, 3 to 7).
    "shared_start": Family(drift=0.1, common=1.0, own=0.5, decay=0.78),
    # Long local training: R/4 and more are needed for the same energy (58 of 128, 147 of 512).
    "drifted": Family(drift=0.7, common=0.0, own=1.0, decay=0.95),
    # Clients of very different size, where FedIT's mean is a poor start.
    "unbalanced": Family(drift=0.3, common=0.5, own=1.0, decay=0.9, imbalance=16.0),
    # FFA-LoRA's clients never train A.
    "fixed_a": Family(drift=0.0, common=1.0, own=0.5, decay=0.78),
    "flipped": Family(drift=0.1, common=1.0, own=0.5, decay=0.78, flipped=True),
}
# Trained B are small beside A_0: about 1e-2 after a round at learning rate 3e-4.
_SIZE_B = 1e-2


@dataclass(frozen=True)
class Stacks:
    """One round's factors of L modules: what every stage and every peer is given."""

    case: Case
    b: Tensor
    """[L,m,R]"""
    a: Tensor
    """[L,R,n]"""
    weights: Tensor
    """[K] float64, summing to 1"""
    scalings: Tensor
    """[L,K] float64, alpha / r"""

    @cached_property
    def scale(self) -> Tensor:
        """The diagonal of D: w_k s_k, r_k times; [L,R] float64."""
        repeats = torch.tensor(self.case.ranks, device=self.b.device)
        return (self.weights * self.scalings).repeat_interleave(repeats, dim=1)

    @cached_property
    def sigma(self) -> Tensor:
        """[L,min(R,m,n)] float64: singular values of the ideal update, by QR + QR + core SVD.

        The specification's values without its dense matrix; no Gram matrix is involved.
        """
        rows = []
        for b, a, scale in zip(self.b.double(), self.a.double(), self.scale, strict=True):
            upper_b = torch.linalg.qr(b * scale, mode="r")[1]
            upper_a = torch.linalg.qr(a.mT, mode="r")[1]
            rows.append(torch.linalg.svdvals(upper_b @ upper_a.mT))
        return torch.stack(rows)

    @cached_property
    def total_energy(self) -> Tensor:
        """||dW||^2 [L] float64."""
        return self.sigma.square().sum(-1)

    @cached_property
    def client_b(self) -> list[list[Tensor]]:
        """B_k [m,r_k] per module and client, contiguous as a client sends them."""
        return [[x.contiguous() for x in b.split(self.case.ranks, dim=1)] for b in self.b]

    @cached_property
    def client_a(self) -> list[list[Tensor]]:
        """A_k [r_k,n] per module and client."""
        return [[x.contiguous() for x in a.split(self.case.ranks, dim=0)] for a in self.a]

    def update(self, module: int) -> Tensor:
        """The ideal update dW of one module, dense, [m,n] float64."""
        return (self.b[module].double() * self.scale[module]) @ self.a[module].double()

    @property
    def nbytes(self) -> int:
        """Bytes of both stacks."""
        return self.b.nbytes + self.a.nbytes


@dataclass(frozen=True)
class Round:
    """Stacks of several kinds of modules from the same clients, a whole model's for example."""

    case: Case
    parts: tuple[Stacks, ...]
    """one per kind of module"""

    @classmethod
    def draw(cls, case: Case, device: torch.device | str = "cpu") -> "Round":
        """Every part from a seed of its own."""
        return cls(case, tuple(draw(part, device) for part in case.parts))

    @classmethod
    def of(cls, stacks: Stacks) -> "Round":
        """A round of one kind of modules."""
        return cls(stacks.case, (stacks,))

    @property
    def shares(self) -> list[float]:
        """The clients' weights, summing to 1."""
        return list(self.parts[0].weights.tolist())

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks."""
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def modules(self) -> list[tuple[list[Tensor], list[Tensor], list[float]]]:
        """The clients' B_k, A_k and w_k s_k of every module, as the clients sent them."""
        return [
            (part.client_b[index], part.client_a[index], scales)
            for part in self.parts
            for index, scales in enumerate((part.weights * part.scalings).tolist())
        ]

    def split(self, found: Sequence[Item]) -> list[Sequence[Item]]:
        """One item per module as one sequence per part."""
        split, first = [], 0
        for part in self.parts:
            split.append(found[first : first + part.case.modules])
            first += part.case.modules
        return split


class Origin:
    """What the clients of a case have in common, and each client's factors, one after the other."""

    def __init__(self, case: Case) -> None:
        self._case, self._family = case, FAMILIES[case.family]
        self._generator = torch.Generator().manual_seed(case.seed)
        widest = max(case.ranks)
        self._bound = 1 / math.sqrt(case.n)
        uniform = torch.rand(case.modules, widest, case.n, generator=self._generator)
        self._start = (2 * uniform - 1) * self._bound
        self._rotation = torch.linalg.qr(self._normal(widest, widest))[0].mT
        self._common = self._family.common * self._normal(case.m, widest)
        sizes = torch.logspace(0, widest - 1, widest, base=self._family.decay) * _SIZE_B
        self._sizes = sizes / sizes.square().sum().sqrt() * _SIZE_B

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(self._case.modules, *size, generator=self._generator)

    def client(self, k: int) -> tuple[Tensor, Tensor]:
        """B_k [L,m,r_k] and A_k [L,r_k,n], float32; to be asked for in the clients' order."""
        case, family, rank = self._case, self._family, self._case.ranks[k]
        growth = family.imbalance ** (k / max(1, case.clients - 1))
        sign = -1.0 if family.flipped and k % 2 else 1.0
        own = family.own * self._normal(case.m, max(case.ranks))
        b = (sign * growth * ((self._common + own) * self._sizes)) @ self._rotation[:, :, :rank]
        noise = family.drift * self._bound / math.sqrt(3) * self._normal(rank, case.n)
        return b, sign * (self._start[:, :rank] + noise)


def draw(case: Case, device: torch.device | str = "cpu") -> Stacks:
    """A round of the case's family; the same seed gives the same factors on every machine.

    Weights fall linearly from the first client to the last (2 : 1), scalings are alpha / r = 2.
    """
    origin = Origin(case)
    b = torch.empty(case.modules, case.m, case.stacked_rank, dtype=case.dtype)
    a = torch.empty(case.modules, case.stacked_rank, case.n, dtype=case.dtype)
    first = 0
    for k, rank in enumerate(case.ranks):
        last = first + rank
        b[:, :, first:last], a[:, first:last] = origin.client(k)
        first = last

    weights = torch.linspace(2, 1, case.clients, dtype=torch.float64)
    scalings = torch.full((case.modules, case.clients), 2.0, dtype=torch.float64)
    return Stacks(
        case,
        b.to(device),
        a.to(device),
        (weights / weights.sum()).to(device),
        scalings.to(device),
    )


def spectra(case: Case) -> Tensor:
    """Singular values alone, [L,R] float64, geometric at the family's decay with 10 % of noise."""
    generator = torch.Generator().manual_seed(case.seed)
    rank = case.stacked_rank
    decay = FAMILIES[case.family].decay
    values = torch.logspace(0, rank - 1, rank, base=decay, dtype=torch.float64)
    noise = torch.rand(case.modules, rank, generator=generator, dtype=torch.float64)
    return (values * (1 + 0.1 * noise)).sort(dim=-1, descending=True)[0]
