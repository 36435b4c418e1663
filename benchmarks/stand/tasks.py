"""Tasks: what a suite asks of this library and of its peers, and what must hold of an answer.

    GramMatrices     both sides' Gram matrices of the stacks
    Spectrum         singular values and coefficients from two Gram matrices
    Eigenproblems    all eigenpairs of the A-side Gram matrices
    Selection        ranks from singular values
    Combination      B X and Y A
    Mean             the clients' weighted mean of A
    Surrogate        FLoRA-NA's p and q
    Truncation       leading components of the ideal update: FLoRIST's and FlexLoRA's factors
    Averages         the clients' weighted means of both factors
    Stack            FLoRA's stack

A task holds the inputs, drawn and fixed; ``work`` is what every answer must at least cost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.stand import correctness, roofline
from benchmarks.stand.correctness import Check, Pair
from benchmarks.stand.inputs import Round, Stacks
from benchmarks.stand.roofline import Work
from fedlora_kernels import ops, reference

ENERGY = 0.9
MAX_RANK = 64

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class GramMatrices:
    """B^T B and A A^T."""

    stacks: Stacks
    precision: str = "exact"
    """whose tolerance and flops"""

    @property
    def work(self) -> Work:
        """Both sides."""
        b, a = self.stacks.b, self.stacks.a
        return roofline.gram(b, False, self.precision) + roofline.gram(a, True, self.precision)

    def checks(self, found: tuple[Tensor, Tensor]) -> list[Check]:
        """Every entry beside its float64 value."""
        bound = correctness.EXACT if self.precision == "exact" else correctness.FAST
        return [
            correctness.same_gram(found[0], self.stacks.b, False, bound),
            correctness.same_gram(found[1], self.stacks.a, True, bound),
        ]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the ideal update from its Gram matrices."""

    stacks: Stacks
    leading: bool = False
    """those that ``ENERGY`` needs, or all"""

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """B^T B and A A^T, float64."""
        return reference.gram(self.stacks.b, False), reference.gram(self.stacks.a, True)

    @cached_property
    def ranks(self) -> Tensor:
        """What every module keeps at ``ENERGY``, [L]; beyond it nothing need be computed."""
        return correctness.expected_ranks(self.stacks, ENERGY, MAX_RANK)

    @property
    def kept(self) -> int:
        """The largest of them."""
        return int(self.ranks.max())

    @property
    def work(self) -> Work:
        """Of all components, or of those kept."""
        rank = self.stacks.case.stacked_rank
        return roofline.spectrum(
            self.stacks.case.modules, rank, self.kept if self.leading else rank
        )

    def values(self, sigma: Tensor, ranks: Tensor | None = None) -> Check:
        """The leading values (all when None) beside those from QR + QR + core SVD."""
        return correctness.same_singular_values(self.stacks, sigma, ranks)

    def vectors(self, left: Tensor, right: Tensor) -> Check:
        """|error at each module's rank - its SVD floor| in squares, from the Gram matrices."""
        (gram_b, gram_a), stacks = self.grams, self.stacks
        used = torch.arange(left.shape[2], device=left.device) < self.ranks[:, None]
        gap = torch.diag_embed(stacks.scale) - left.where(used[:, None, :], 0) @ right
        found = ((gap.mT @ gram_b @ gap) * gram_a).sum((-2, -1))
        expected = correctness.svd_floors(stacks, self.ranks.tolist()).square()
        error = ((found - expected).abs() / stacks.total_energy).max()
        return Check("squared error beside the SVD floor", float(error), correctness.ENERGY_EXACT)


@dataclass(frozen=True)
class Eigenproblems:
    """All eigenpairs of the modules' A-side Gram matrices."""

    stacks: Stacks

    @cached_property
    def matrices(self) -> Tensor:
        """[L,R,R] float64"""
        return reference.gram(self.stacks.a, True)

    @property
    def work(self) -> Work:
        """Of a spectrum with all its vectors."""
        case = self.stacks.case
        return roofline.spectrum(case.modules, case.stacked_rank, case.stacked_rank)

    def checks(self, found: tuple[Tensor, Tensor]) -> list[Check]:
        """||G V - V S|| beside ||G||; V in columns, its dtype's rounding allowed."""
        values, vectors = (part.double() for part in found)
        residual = torch.linalg.matrix_norm(self.matrices @ vectors - vectors * values[:, None, :])
        error = residual / torch.linalg.matrix_norm(self.matrices)
        bound = 8 * self.stacks.case.stacked_rank * torch.finfo(found[0].dtype).eps
        return [Check("residual / norm", float(error.max()), bound)]


@dataclass(frozen=True)
class Selection:
    """The smallest rank that holds ``ENERGY``, of every module."""

    sigma: Tensor
    """[L,R]"""

    @cached_property
    def total(self) -> Tensor:
        """[L]"""
        return self.sigma.square().sum(-1)

    @property
    def work(self) -> Work:
        """Values in, ranks out."""
        return roofline.select_rank(*self.sigma.shape)

    def checks(self, found: Sequence[int]) -> list[Check]:
        """No difference to the reference."""
        expected = reference.select_rank(self.sigma, self.total, ENERGY, MAX_RANK).tolist()
        wrong = max(abs(mine - theirs) for mine, theirs in zip(found, expected, strict=True))
        return [Check("ranks beside the float64 reference", float(wrong), 0.0)]


@dataclass(frozen=True)
class Combination:
    """B X and Y A at the ranks of ``ENERGY``."""

    stacks: Stacks

    @cached_property
    def coefficients(self) -> tuple[Tensor, Tensor]:
        """X [L,R,p] and Y [L,p,R], float64."""
        stacks = self.stacks
        grams = reference.gram(stacks.b, False), reference.gram(stacks.a, True)
        _, _, left, right, _ = ops.spectrum(*grams, stacks.scale)
        return left[:, :, : self.kept].contiguous(), right[:, : self.kept].contiguous()

    @cached_property
    def kept(self) -> int:
        """p."""
        return int(correctness.expected_ranks(self.stacks, ENERGY, MAX_RANK).max())

    @property
    def work(self) -> Work:
        """Both products."""
        stacks = self.stacks
        kept = self.kept * stacks.case.modules
        return roofline.combine(stacks.b, stacks.a, kept, self.kept)

    @cached_property
    def _expected(self) -> tuple[Tensor, Tensor]:
        return reference.combine(self.stacks.b, self.stacks.a, *self.coefficients)

    def checks(self, found: tuple[Tensor, Tensor]) -> list[Check]:
        """Both products beside the reference's."""
        bound = 4 * correctness.OUTPUT_EPS[self.stacks.case.dtype]
        return [
            correctness.same_tensor(mine, theirs, bound)
            for mine, theirs in zip(found, self._expected, strict=True)
        ]


@dataclass(frozen=True)
class Mean:
    """sum_k w_k A_k of every module."""

    stacks: Stacks

    @cached_property
    def stacked(self) -> Tensor:
        """[L,K,r,n]"""
        stacked: Tensor = self.stacks.a.unflatten(1, (self.stacks.case.clients, -1))
        return stacked

    @property
    def work(self) -> Work:
        """Every element read once."""
        return roofline.weighted_sum(self.stacked)

    def arrays(self) -> list[list[Array]]:
        """client -> module -> A."""
        case, a = self.stacks.case, self.stacks.client_a
        return [[a[i][k].cpu().numpy() for i in range(case.modules)] for k in range(case.clients)]

    def checks(self, found: Tensor, room: float = 1.0) -> list[Check]:
        """Beside the reference; ``room`` times the rounding of one sum."""
        expected = reference.weighted_sum(self.stacked, self.stacks.weights)
        bound = room * correctness.OUTPUT_EPS[self.stacks.case.dtype]
        return [correctness.same_tensor(found, expected, bound)]


@dataclass(frozen=True)
class Surrogate:
    """FLoRA-NA's p and q: min ||dW - (sum q_u s_u B_u) (sum p_v A_v)||."""

    stacks: Stacks
    steps: int = 1000
    """of a descent"""

    @property
    def work(self) -> Work:
        """Both Gram matrices and one pair of steps."""
        stacks = self.stacks
        return roofline.flora_na(stacks.b, stacks.a, stacks.case.clients)

    @cached_property
    def fedit(self) -> Tensor:
        """f / ||dW||^2 at the start, p = q = w: [L]."""
        even = self.stacks.weights.expand_as(self.stacks.scalings)
        return self.shortfall(even, even)

    @cached_property
    def solved(self) -> Tensor:
        """f / ||dW||^2 that the solve in Gram space reaches: [L]."""
        stacks = self.stacks
        grams = ops.gram(stacks.b, False), ops.gram(stacks.a, True)
        p, q, _ = ops.surrogate(*grams, stacks.weights, stacks.scalings)
        return self.shortfall(p, q)

    def shortfall(self, p: Tensor, q: Tensor) -> Tensor:
        """f(p, q) / ||dW||^2 of every module in float64, without Gram matrices: [L]."""
        stacks = self.stacks
        clients = stacks.case.clients
        blocks_b = stacks.b.double().unflatten(2, (clients, -1))
        blocks_a = stacks.a.double().unflatten(1, (clients, -1))
        b_hat = torch.einsum("lk,lmkr->lmr", q * stacks.scalings, blocks_b)
        a_hat = torch.einsum("lk,lkrn->lrn", p, blocks_a)
        error = correctness.distances(stacks, list(zip(b_hat, a_hat, strict=True)))
        return error.square() / stacks.total_energy

    def facts(self, found: tuple[Tensor, ...]) -> dict[str, object]:
        """f / ||dW||^2, means over the modules; the last before it is rounded for the file."""
        reached = self.shortfall(found[0], found[1])
        return {
            "objective": float(reached.mean()),
            "objective_fedit": float(self.fedit.mean()),
            "above_gram_solve": float((reached - self.solved).mean()),
        }

    def checks(self, found: tuple[Tensor, ...]) -> list[Check]:
        """f / ||dW||^2 at or under its value at FedIT's start."""
        rise = self.shortfall(found[0], found[1]) - self.fedit
        return [Check("f above FedIT's / |dW|^2", float(rise.max()), correctness.ENERGY_EXACT)]


@dataclass(frozen=True)
class Truncation:
    """B_g A_g = the leading components of dW: as many as an energy needs, or a fixed rank."""

    round: Round
    energy: float = ENERGY
    max_rank: int | None = None
    precision: str = "exact"
    """whose flops the work counts"""
    live: bool = False
    """the factors lie with the clients, so that stacking them is part of the task"""

    @property
    def fixed_rank(self) -> int:
        """For peers that cannot choose by energy."""
        case = self.round.case
        limit = min(min(part.m, part.n) for part in case.parts)
        return min(self.max_rank or case.stacked_rank, case.stacked_rank, limit)

    @property
    def work(self) -> Work:
        """gram, spectrum and combine of every part."""
        works = []
        for part in self.round.parts:
            ranks = correctness.expected_ranks(part, self.energy, self.max_rank)
            columns = int(ranks.max()) if self.max_rank is None else self.max_rank
            kept = int(ranks.sum())
            works.append(roofline.stacked_svd(part.b, part.a, kept, columns, self.precision))
        return added(works)

    def stacked(self) -> Iterator[Pair]:
        """[B_1 | ... | B_K] and D [A_1 ; ... ; A_K], module by module."""
        if self.live:
            yield from stacked_and_scaled(self.round)
            return
        for part in self.round.parts:
            for b, a, scale in zip(part.b, part.a, part.scale, strict=True):
                yield b, scale[:, None].to(a.dtype) * a

    def dense(self) -> Iterator[Tensor]:
        """sum_k w_k s_k B_k A_k, client by client, in the factors' dtype, module by module."""
        for b, a, scales in self.round.modules:
            terms = [s * (x @ y) for x, y, s in zip(b, a, scales, strict=True)]
            yield torch.stack(terms).sum(dim=0)

    def checks(self, pairs: Sequence[Pair], room: float = 1.0, ranks: bool = True) -> list[Check]:
        """As close to dW as the best update of the same rank, and of the reference's rank."""
        checks = []
        for part, mine in zip(self.round.parts, self.round.split(pairs), strict=True):
            bound = room * correctness.OUTPUT_EPS[part.case.dtype]
            checks += correctness.near_optimal(part, mine, bound)
            if ranks:
                found = [pair[1].shape[0] for pair in mine]
                checks += correctness.same_ranks(part, found, self.energy, self.max_rank)
        return checks

    def facts(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """The least and the largest rank."""
        counts = [a.shape[0] for _, a in pairs]
        return {"rank_min": min(counts), "rank_max": max(counts)}


@dataclass(frozen=True)
class Averages:
    """sum_k w_k B_k and sum_k w_k A_k of every module."""

    round: Round

    @property
    def work(self) -> Work:
        """Every element read once, 1/K of them written."""
        case = self.round.case
        return Work(self.round.nbytes * (1 + max(case.ranks) / case.stacked_rank))

    def arrays(self) -> list[list[Array]]:
        """client -> B and A of every module."""
        return [
            [x[k].cpu().numpy() for b, a, _ in self.round.modules for x in (b, a)]
            for k in range(self.round.case.clients)
        ]

    def checks(self, bs: Sequence[Tensor] | None, as_: Sequence[Tensor]) -> list[Check]:
        """Both factors beside their float64 means; A alone where ``bs`` is None."""
        checks = []
        for found, side in ((bs, "client_b"), (as_, "client_a")):
            if found is None:
                continue
            for part, mine in zip(self.round.parts, self.round.split(found), strict=True):
                stacked = torch.stack([torch.stack(module) for module in getattr(part, side)])
                expected = reference.weighted_sum(stacked, part.weights)
                bound = correctness.OUTPUT_EPS[part.case.dtype]
                checks.append(correctness.same_tensor(torch.stack(list(mine)), expected, bound))
        return checks


@dataclass(frozen=True)
class Stack:
    """[B_1 | ... | B_K] and [w_1 s_1 A_1 ; ... ; w_K s_K A_K] of every module."""

    round: Round

    @property
    def work(self) -> Work:
        """Everything read and written."""
        return Work(2 * self.round.nbytes)

    def checks(self, pairs: Sequence[Pair]) -> list[Check]:
        """The product is dW."""
        each = zip(self.round.parts, self.round.split(pairs), strict=True)
        return [check for part, mine in each for check in correctness.exact_product(part, mine)]

    def scaled(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Stacks of factors as they are, with the weights and scalings put in for a check."""
        scales = chain.from_iterable(part.scale for part in self.round.parts)
        return [(b * scale, a) for (b, a), scale in zip(pairs, scales, strict=True)]


def stacked_and_scaled(round_: Round) -> Iterator[Pair]:
    """FLoRA's stack of every module from the clients' own tensors, by torch.cat."""
    for b, a, scales in round_.modules:
        scaled = [factor * scale for factor, scale in zip(a, scales, strict=True)]
        yield torch.cat(b, dim=1), torch.cat(scaled)


def added(works: Sequence[Work]) -> Work:
    """All of them."""
    total = works[0]
    for work in works[1:]:
        total = total + work
    return total
