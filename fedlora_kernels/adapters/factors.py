"""Factors: one module's pair B, A with its scaling, and what can be done with the pair alone."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.finite import all_finite
from fedlora_kernels.adapters.kinds.kind import LINEAR, Kind


class Layout(NamedTuple):
    """What must agree before modules can be worked on together."""

    rows: int
    """m"""
    columns: int
    """n"""
    rank: int
    """r"""
    dtype_b: torch.dtype
    dtype_a: torch.dtype
    device_b: torch.device
    device_a: torch.device


@dataclass(frozen=True)
class Factors:
    """One module's update ``scaling * b @ a``."""

    b: Tensor
    """[m, r]"""
    a: Tensor
    """[r, n]"""
    scaling: float
    """alpha / r, or alpha / sqrt(r) with rsLoRA"""
    kind: Kind = LINEAR
    """how PEFT's file holds the pair"""
    bias: Tensor | None = None
    """[m], of lora_bias: the module adds scaling * bias"""
    magnitude: Tensor | None = None
    """[m], of DoRA: the norm that every output's weights have after the update"""
    finite_at: int = field(default=-1, repr=False, compare=False)
    """:attr:`version` when all entries were seen to be finite; -1 where nobody looked"""

    @property
    def beside(self) -> dict[str, Tensor]:
        """What is beside the pair, under the names that messages have for it."""
        found = {"lora_bias": self.bias, "DoRA's magnitude": self.magnitude}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """B, A and what is beside them."""
        return {"B": self.b, "A": self.a, **self.beside}

    @property
    def version(self) -> int:
        """How often the tensors were written to; 0 where torch does not count (inference)."""
        try:
            of_bias = 0 if self.bias is None else self.bias._version
            of_magnitude = 0 if self.magnitude is None else self.magnitude._version
            return self.b._version + self.a._version + of_bias + of_magnitude
        except RuntimeError:
            return 0

    @cached_property
    def layout(self) -> Layout:
        """Shapes, dtypes and devices, read once."""
        (b, a), (rank, columns) = (self.b, self.a), self.a.shape
        return Layout(b.shape[0], columns, rank, b.dtype, a.dtype, b.device, a.device)

    @property
    def rank(self) -> int:
        """r"""
        return self.a.shape[0]

    @property
    def told(self) -> str:
        """What is not a plain pair of factors about it, as messages tell it."""
        if self.magnitude is not None:
            return "DoRA"
        return self.kind.told if self.bias is None else "lora_bias"

    def same_a(self, other: "Factors") -> bool:
        """Whether both have the same A, to the bit."""
        return self.a is other.a or torch.equal(self.a, other.a.to(self.a.device))

    def same_b(self, other: "Factors") -> bool:
        """Whether both have the same B, to the bit."""
        return self.b is other.b or torch.equal(self.b, other.b.to(self.b.device))

    @property
    def bytes(self) -> int:
        """Bytes of both factors and of what is beside them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def rescaled(self, scaling: float) -> "Factors":
        """The same update under another scaling: B and the bias take the ratio."""
        ratio = self.scaling / scaling
        b = (self.b.double() * ratio).to(self.b.dtype)
        bias = None if self.bias is None else (self.bias.double() * ratio).to(self.bias.dtype)
        return replace(self, b=b, bias=bias, scaling=scaling)

    def plus(self, other: "Factors") -> "Factors":
        """The sum of both updates, under the other's scaling: the factors side by side."""
        mine = self.rescaled(other.scaling)
        b = torch.cat([mine.b, other.b.to(mine.b)], dim=1)
        return replace(mine, b=b, a=torch.cat([mine.a, other.a.to(mine.a)]), finite_at=-1)

    def padded(self, rank: int) -> "Factors":
        """Zeros beside the factors, up to a rank."""
        spare, pad = rank - self.rank, torch.nn.functional.pad
        return replace(self, b=pad(self.b, (0, spare)), a=pad(self.a, (0, 0, 0, spare)))


def fitted(module: str, update: Factors | None, target: Factors) -> Factors:
    """``update`` in the rank, scaling and dtype of ``target``: see :meth:`Adapter.fit`."""
    if (None if update is None else update.magnitude) is None and target.magnitude is not None:
        raise AdapterError(
            f"module {module}: the update has no DoRA magnitudes, the template has; those of a "
            "zero update are the base's, which are unknown here"
        )
    if update is None:
        zero = None if target.bias is None else torch.zeros_like(target.bias)
        return replace(target, b=torch.zeros_like(target.b), bias=zero, finite_at=-1)
    lacks = any(
        mine is not None and theirs is None
        for mine, theirs in ((update.bias, target.bias), (update.magnitude, target.magnitude))
    )
    if update.kind != target.kind or lacks:
        raise AdapterError(
            f"module {module}: the update is {update.told}, the template's is {target.told}"
        )
    b, a = update.b, update.a
    if b.shape[0] != target.b.shape[0] or a.shape[1] != target.a.shape[1]:
        raise AdapterError(
            f"module {module}: the update is {b.shape[0]} x {a.shape[1]}, the template's is "
            f"{target.b.shape[0]} x {target.a.shape[1]}"
        )
    if target.scaling == 0:
        raise AdapterError(
            f"module {module}: the template of fit() has scaling 0, with which every update is "
            "zero; expected another scaling"
        )
    rank, ratio = target.rank, update.scaling / target.scaling
    if update.rank > rank:
        dtype = torch.promote_types(b.dtype, a.dtype)
        scale = torch.full((1, update.rank), ratio, dtype=torch.float64, device=b.device)
        wide = (b[None].to(dtype), a[None].to(dtype))
        top_b, top_a, _, _ = ops.stacked_svd(*wide, scale, energy=1.0, max_rank=rank)
        b, a = top_b[0], top_a[0]
    elif ratio != 1.0:
        b = (b.double() * ratio).to(b.dtype)
    b, a = b.to(target.b), a.to(target.a)
    if a.shape[0] < rank:
        spare = rank - a.shape[0]
        b = torch.cat([b, b.new_zeros(b.shape[0], spare)], dim=1)
        a = torch.cat([a, target.a[-spare:]], dim=0)
    idle = (a == 0).all(dim=1) & (b == 0).all(dim=0)
    if bool(idle.any()):  # zero beside zero gets no gradient
        a = torch.where(idle[:, None], target.a, a)
    bias = target.bias
    if bias is not None:
        given = torch.zeros_like(bias) if update.bias is None else update.bias
        bias = (given.double() * ratio).to(bias)
    magnitude = target.magnitude
    if magnitude is not None and update.magnitude is not None:
        magnitude = update.magnitude.to(magnitude)
    if not all(all_finite(x) for x in (b, a, bias, magnitude) if x is not None):
        raise AdapterError(
            f"module {module}: the update overflows {target.b.dtype} at scaling {target.scaling:g}"
        )
    return replace(target, b=b, a=a, bias=bias, magnitude=magnitude, finite_at=-1)
