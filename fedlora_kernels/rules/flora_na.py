"""FLoRA-NA (arXiv 2509.26399): surrogate averages that come closest to the ideal update.

    A_hat = sum_u p_u A_u    B_hat = sum_u q_u B_u    min over p, q of ||dW - s B_hat A_hat||_F

The paper leaves the solver open; ours is exact alternating least squares in Gram space
(ops.surrogate), started at FedIT's averages, so the error is never above FedIT's.

``shared``: one pair p, q for all modules, which minimizes the sum of their squared errors, as the
authors' development code does. The sum needs K^4 numbers, however many modules there are:

    sum_l <B^{uu'}, A^{vv'}>_l    sum_l M_l    sum_l ||dW_l||^2

``around``: p and q mix the clients' changes from a global adapter A_0, B_0:

    A_hat = A_0 + sum_u p_u (A_u - A_0)    B_hat = B_0 + sum_u q_u (B_u - B_0)

The authors' target is the uniform mean: give equal weights for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.rules._rule import Rule, at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.exact_sum import ExactSum
    from fedlora_kernels.gram_space.grams import Grams
    from fedlora_kernels.ops._surrogate import Bilinear

MOST_CLIENTS = 64
"""Of a shared pair: K^4 float64 numbers are 128 MiB then."""


@dataclass(frozen=True)
class FLoRANA(Rule):
    """The surrogate averages."""

    title = "FLoRA-NA"
    paper = "2509.26399"
    exact = "closest pair of averages"

    max_sweeps: int = option(
        50, "the largest number of sweeps, which are pairs of least-squares steps"
    )
    tol: float = option(
        1e-12, "stop when a sweep lowers the squared error by no more than tol * ||dW||^2"
    )
    shared: bool = option(
        False, f"one pair of mixing weights for all modules (at most {MOST_CLIENTS} clients)"
    )
    around: Any = option(
        None,
        "mix the clients' changes from this global adapter: its folder, or in Python an Adapter; "
        "'last' is the result of the last round, which is known only where it was given as carried",
    )
    pair: Any = field(default=None, repr=False, compare=False)
    """p and q of all clients, two tensors [K]; set by :meth:`prepared`, no option"""

    def __post_init__(self) -> None:
        """Raises ValueError: max_sweeps or tol is out of range."""
        at_least_one(max_sweeps=self.max_sweeps)
        if not self.tol >= 0:
            raise ValueError(f"tol must not be negative, found {self.tol}")

    def solve(self, grams: Grams) -> Solution:
        """The mixing weights p and q.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module. Or a client or
                the adapter ``around`` lacks a module that others have.
        """
        from fedlora_kernels.gram_space.coefficients import Mixture, Solution, common_scaling

        self.equal_rank(grams)
        p, q = self._pair(grams)
        scaling, folded = common_scaling(grams)
        return Solution(Mixture(q * folded, p, scaling, grams.ranks[0]))

    def _pair(self, grams: Grams) -> tuple[Tensor, Tensor]:
        """p and q of every module, [L,K] each."""
        from fedlora_kernels import ops
        from fedlora_kernels.ops._surrogate import alternate, starts

        if self.pair is not None:
            clients = list(grams.batch.clients)
            factor_b, factor_a = _of_means(grams)
            p, q = (side[clients].to(grams.weights).expand_as(grams.scalings) for side in self.pair)
            return (p * factor_a).contiguous(), (q * factor_b).contiguous()
        if not grams.batch.joined:
            p, q, _ = ops.surrogate(
                grams.b,
                grams.a,
                grams.weights,
                grams.scalings,
                max_sweeps=self.max_sweeps,
                tol=self.tol,
            )
            return p, q
        self._complete(grams)
        problem = _problem(grams)
        own = problem.own
        start = starts(grams.weights.expand_as(own), own)
        moves = _moves(len(grams.ranks), start)
        p, q, _ = alternate(problem.bilinear, start, self.max_sweeps, self.tol, moves)
        return p, q

    @property
    def joint(self) -> bool:
        """One pair for all modules."""
        return self.shared

    def noted(self, grams: Grams) -> Mapping[str, Any]:
        """What the objective of one pair is made of, under one name: it is a sum over all modules.

        Raises:
            AdapterError: there are too many clients, their ranks differ, or a client lacks a module
                beside ``around``.
        """
        batch = grams.batch
        clients = batch.federation - batch.joined
        if clients > MOST_CLIENTS:
            raise AdapterError(
                f"{clients} clients, expected at most {MOST_CLIENTS} for one pair of "
                "mixing weights for all modules; leave `shared` out, or aggregate fewer "
                "clients"
            )
        self.equal_rank(grams)
        if batch.joined:
            self._complete(grams)
        return {"all modules": _Sum.of(grams)}

    def knowing(self, notes: Mapping[str, Any]) -> FLoRANA:
        """The pair that minimizes the sum over all modules."""
        import torch

        from fedlora_kernels.ops._surrogate import Bilinear, alternate, starts

        if not notes:
            return self
        (found,) = notes.values()
        weights = found.weights
        count = weights.shape[0]
        products = found.products.value.view(1, count * count, count * count)
        identity = torch.eye(count * count, dtype=products.dtype, device=products.device)
        problem = Bilinear(
            found.total.value.view(1, 1), found.cross.value[None], products, identity[None]
        )
        each = torch.arange(count, device=products.device)
        own = products.view([count] * 4)[each, each, each, each].clamp_min(0).sqrt()[None]
        start = starts(weights[None], own)
        moves = _moves(count, start) if found.joined else None
        p, q, _ = alternate(problem, start, self.max_sweeps, self.tol, moves)
        if not found.joined:
            norm_p, norm_q = p.norm(), q.norm()
            balance = torch.where((norm_p > 0) & (norm_q > 0), (norm_p / norm_q).sqrt(), 1)
            p, q = p / balance, q * balance
        return replace(self, pair=(p[0], q[0]))

    def _complete(self, grams: Grams) -> None:
        """Refuse modules that only some have, or in another rank: no change is defined there."""
        from fedlora_kernels.adapters.peft_format import label

        batch = grams.batch
        if grams.ranks[-1] != grams.ranks[0] and len(batch.clients) == batch.federation:
            raise AdapterError(
                f"the adapter given with `around`, module {grams.modules[0]}: rank "
                f"{grams.ranks[-1]}, expected {grams.ranks[0]} as in {grams.labels[0]}"
            )
        for index in range(batch.federation):
            if index not in batch.clients:
                last = index == batch.federation - 1
                who = "the adapter given with `around`" if last else label(index, None)
                raise AdapterError(
                    f"{who}, module {grams.modules[0]}: is missing, which others have; changes "
                    "from a global adapter need every module on both sides (or leave `around` out)"
                )

    # ---- the last global adapter ---------------------------------------------------------------

    def joins(self, carried: Any) -> Sequence[tuple[Adapter, float]]:
        """The adapter that changes are counted from, with weight 0.

        Raises:
            TypeError: something is carried, and ``around`` is not "last".
            AdapterError: ``around`` is a folder that holds no adapter.
        """
        from fedlora_kernels.adapters.adapter import Adapter

        if self.around != "last":
            super().joins(carried)
        center = carried if self.around == "last" else self.around
        if center is None:
            return ()
        return ((center if isinstance(center, Adapter) else Adapter.load(center), 0.0),)

    def carry(self, result: Aggregation) -> Adapter | None:
        """The global adapter, where the next round is told to go around it."""
        return result.adapter if self.around == "last" else None


class _Problem:
    """One batch's bilinear problems, with FedIT's factors on both sides folded in."""

    def __init__(self, bilinear: Bilinear, own: Tensor) -> None:
        self.bilinear = bilinear
        self.own = own
        """||s_k B_k A_k|| of the clients, [L,K]"""


def _problem(grams: Grams) -> _Problem:

    from fedlora_kernels.ops._surrogate import Bilinear, blocks, cross_products

    rows = grams.scalings[:, grams.batch.owner]
    blocks_b = blocks(rows[:, :, None] * grams.b * rows[:, None, :], len(grams.ranks))
    blocks_a = blocks(grams.a, len(grams.ranks))
    cross = cross_products(blocks_b, blocks_a, grams.weights)
    total = (grams.weights * cross.diagonal(dim1=-2, dim2=-1)).sum(-1, keepdim=True)
    own = (blocks_b * blocks_a).sum((-2, -1)).diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    factor_b, factor_a = _of_means(grams)
    flat_b, flat_a = (each.flatten(1, 2).flatten(2) for each in (blocks_b, blocks_a))
    bilinear = Bilinear(
        total, cross * (factor_b * factor_a), flat_b * factor_b**2, flat_a * factor_a**2
    )
    return _Problem(bilinear, own)


def _of_means(grams: Grams) -> tuple[float | Tensor, float | Tensor]:
    """What p = q = (shares of all weights) is multiplied with to give FedIT's means of B and A.

    Clients without a module count as B = 0: the mean of A is over the others, and with
    absent="renormalize" so is that of B.
    """
    total = grams.batch.shares.sum()
    inverse = (1 / total).where(total > 0, 1)
    return (inverse if grams.batch.renormalized else 1.0), inverse


@dataclass(frozen=True)
class _Sum:
    """The sums over modules of what the objective of one pair depends on."""

    joined: int
    """how many adapters are not clients"""
    shares: Mapping[int, float]
    """client -> its share of all weights"""
    federation: int
    """K"""
    total: ExactSum
    """[]"""
    cross: ExactSum
    """[K,K]"""
    products: ExactSum
    """[K,K,K,K]"""

    @classmethod
    def of(cls, grams: Grams) -> _Sum:
        """One batch; clients that lack its modules add nothing."""
        import torch

        from fedlora_kernels.gram_space.exact_sum import ExactSum
        from fedlora_kernels.ops.product import product

        batch = grams.batch
        clients = torch.tensor(batch.clients)
        count = batch.federation
        places = clients[:, None, None, None], clients[:, None, None], clients[:, None], clients

        def of_all(of_these: Tensor) -> ExactSum:
            """With zeros for the clients that lack the modules."""
            whole = of_these.new_zeros([count] * of_these.dim())
            return ExactSum(whole.index_put(places[4 - of_these.dim() :], of_these))

        found: _Sum | None = None
        parts = (part.cpu() for part in _problem(grams).bilinear)  # sums of all processes' devices
        for total, cross, b, a in zip(*parts, strict=True):
            one = cls(
                batch.joined,
                dict(zip(batch.clients, batch.shares.tolist(), strict=True)),
                count,
                ExactSum(total[0]),
                of_all(cross),
                of_all(product(b[None], a.mT[None]).view([len(clients)] * 4)),
            )
            found = one if found is None else found + one
        assert found is not None
        return found

    def __add__(self, other: _Sum) -> _Sum:
        """Of more modules."""
        return _Sum(
            self.joined,
            {**self.shares, **other.shares},
            self.federation,
            self.total + other.total,
            self.cross + other.cross,
            self.products + other.products,
        )

    @property
    def weights(self) -> Tensor:
        """Every client's share of all weights, 0 of those without any module: [K] float64."""
        shares = [self.shares.get(k, 0.0) for k in range(self.federation)]
        return self.cross.value.new_tensor(shares)


def _moves(count: int, like: Tensor) -> Tensor:
    """The directions e_k - e_last, in which the weights keep their sum, [K,K-1]."""
    import torch

    identity = torch.eye(count - 1, dtype=like.dtype, device=like.device)
    return torch.cat([identity, -torch.ones_like(identity[:1])])
