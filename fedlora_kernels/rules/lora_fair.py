"""LoRA-FAIR (arXiv 2411.14961, ICCV 2025): FedIT's A, and a B that is corrected on the server.

    A = mean of A_k    B = mean of B_k    B + dB travels, where dB minimizes

    form="cosine"   1 - cos(dW, (B + dB) A) + penalty ||dB||_F      (the paper's)
    form="ridge"    ||dW - (B + dB) A||_F^2 + penalty ||dB||_F^2

The ridge form is solved by dB = (dW - B A) A^T (A A^T + penalty I)^-1. For the cosine the paper
descends on dB. Its minimizers are known up to two numbers, though: with A A^T = Q diag(l) Q^T,
P = dW A^T Q and B Q = [b_1 ... b_r], a minimizer has the columns

    dB Q e_i = (t P e_i - l_i b_i) / (l_i + v)    for some t, v >= 0

and its value needs inner products of P e_i and b_i only, which are r numbers each from the Gram
matrices. t and v are searched for on a grid that closes in. As in the paper, dB is measured in the
clients' own scale: where their scalings are equal, alpha/r is left out of B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from fedlora_kernels.rules._rule import Rule, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams

Form = Literal["cosine", "ridge"]

_LOOKS = 200
"""Boxes that the search for t and v looks into; a box that holds nothing better is halved."""


@dataclass(frozen=True)
class LoRAFAIR(Rule):
    """The mean of A beside the corrected mean of B."""

    title = "LoRA-FAIR"
    paper = "2411.14961"
    exact = "mean A, corrected B"

    form: Form = option("cosine", "what the correction minimizes: cosine (the paper's) or ridge")
    penalty: float = option(0.01, "weight of the correction's size, >= 0")

    def __post_init__(self) -> None:
        """Raises ValueError: form is unknown, or penalty is negative."""
        if self.form not in get_args(Form):
            expected = ", ".join(get_args(Form))
            raise ValueError(f"form must be one of {expected}, found {self.form!r}")
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"penalty must be a number >= 0, found {self.penalty}")

    def solve(self, grams: Grams) -> Solution:
        """The mean of A, and the coefficients of B + dB.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        import torch

        from fedlora_kernels.gram_space.coefficients import Product, Solution, mean
        from fedlora_kernels.ops.product import decomposed, product

        self.equal_rank(grams)
        averages = mean(grams)
        scaling = averages.scaling[:, None, None]
        x, y = averages.x / scaling, averages.y
        inner = product(product(y, grams.a), y.mT)
        lengths, basis = decomposed(torch.linalg.eigh, (inner + inner.mT) / 2)
        noise = grams.stacked_rank * torch.finfo(torch.float64).eps * lengths[:, -1:]
        lengths = lengths.where(lengths > noise, 0)
        target = product(product(grams.scale[:, :, None] * grams.a, y.mT) / scaling, basis)
        target = target.where(lengths[:, None, :] > 0, 0)
        columns = product(x, basis)
        t, v = self._numbers(grams, lengths, target, columns, averages.scaling)
        weights = (1 / (lengths + v)).where(lengths > 0, 0)[:, None, :]
        correction = (t[:, None, :] * target - lengths[:, None, :] * columns) * weights
        x = x + product(correction, basis.mT)
        ranks = grams.same_rank(grams.ranks[0])
        return Solution(Product(x * scaling, y, ranks, averages.scaling))

    def _numbers(
        self, grams: Grams, lengths: Tensor, target: Tensor, columns: Tensor, scaling: Tensor
    ) -> tuple[Tensor, Tensor]:
        """t and v of every module, [L,1] each."""
        import torch

        from fedlora_kernels.ops.product import product

        def inner(one: Tensor, other: Tensor) -> Tensor:
            return (one * product(grams.b, other)).sum(1)

        size = (grams.energy.sqrt() / scaling.abs())[:, None]
        ridge = torch.ones_like(size), torch.full_like(size, self.penalty)
        if self.form == "ridge" or self.penalty == 0:  # the cosine forgets the length
            return ridge
        problem = _Cosine(
            lengths,
            inner(target, target),
            inner(target, columns),
            inner(columns, columns),
            size,
            self.penalty,
        )
        t, v = problem.minimizer()
        # Beside a mean of zero the cosine has no minimizer, beside a zero update no meaning.
        free = (lengths * problem.bb).sum(-1, keepdim=True) <= 0
        t, v = ridge[0].where(free, t), ridge[1].where(free, v)
        return t.where(size > 0, 0), v.where(size > 0, torch.inf)


@dataclass(frozen=True)
class _Cosine:
    """1 - cos(dW, (B + dB) A) + penalty ||dB|| over the family of two numbers."""

    lengths: Tensor
    """l_i, the eigenvalues of A A^T, [L,r]"""
    pp: Tensor
    """||P e_i||^2, [L,r]"""
    pb: Tensor
    """<P e_i, b_i>"""
    bb: Tensor
    """||b_i||^2"""
    size: Tensor
    """||dW||, [L,1]"""
    penalty: float

    def minimizer(self) -> tuple[Tensor, Tensor]:
        """t and v of every module, [L,1] each; v = inf where no correction is better."""
        import torch

        longest = self.lengths.amax(-1, keepdim=True).clamp_min(1e-300)
        t, v = (torch.zeros_like(self.size) for _ in "tv")
        best = torch.full_like(self.size, torch.inf)

        def grid(reach: float, count: int) -> Tensor:
            return torch.linspace(-reach, reach, count, dtype=t.dtype, device=t.device)

        # log t and log v / l_1: 1e-5 to 1e5, and 1e-12 to 1e12; t also near where ||dB|| is
        # least, because a small correction is a narrow valley.
        across = grid(11.5, 47).expand(len(longest), -1)
        beside = torch.cat([-(10 ** grid(3, 13) / 1e3), 10 ** grid(3, 13) / 1e3])
        for height in grid(27.6, 64):
            pull = 1 / (self.lengths + height.exp() * longest)
            meets = (self.lengths * self.pb * pull**2).sum(-1, keepdim=True)
            least = meets / (self.pp * pull**2).sum(-1, keepdim=True).clamp_min(1e-300)
            near_least = least.clamp(1e-6, 1e6).log() + beside
            some = torch.cat([across, near_least], -1)
            best, t, v = self._better(best, t, v, some, height.expand_as(some))
        near = grid(1.0, 5)
        steps = torch.stack(torch.meshgrid(near, near, indexing="ij")).flatten(1)
        reach = torch.ones_like(best)
        for _ in range(_LOOKS):
            before = best
            best, t, v = self._better(best, t, v, t + reach * steps[0], v + reach * steps[1])
            reach = reach.where(best < before, reach / 2)
        none = self._value(torch.zeros_like(t), torch.full_like(v, 1e300))
        better = best < none
        return t.exp().where(better, 0), (v.exp() * longest).where(better, torch.inf)

    def _better(
        self, best: Tensor, t: Tensor, v: Tensor, some_t: Tensor, some_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best of these logarithms and those known, [L,1] each."""
        longest = self.lengths.amax(-1, keepdim=True).clamp_min(1e-300)
        value, place = self._value(some_t.exp(), some_v.exp() * longest).min(-1, keepdim=True)
        better = value < best
        t = some_t.gather(-1, place).where(better, t)
        v = some_v.gather(-1, place).where(better, v)
        return value.where(better, best), t, v

    def _value(self, t: Tensor, v: Tensor) -> Tensor:
        """The objective for t and v [L,n]: [L,n]."""
        t, v = t[:, :, None], v[:, :, None]
        lengths, pp, pb, bb = (x[:, None, :] for x in (self.lengths, self.pp, self.pb, self.bb))
        toward, kept = t / (lengths + v), v / (lengths + v)
        linear = (toward * pp + kept * pb).sum(-1)
        square = (lengths * (toward**2 * pp + 2 * toward * kept * pb + kept**2 * bb)).sum(-1)
        pulled = lengths / (lengths + v)
        moved = (toward**2 * pp - 2 * toward * pulled * pb + pulled**2 * bb).sum(-1)
        norm = self.size * square.clamp_min(0).sqrt()
        cosine = (linear / norm).where(norm > 0, 0)
        return 1 - cosine + self.penalty * moved.clamp_min(0).sqrt()
