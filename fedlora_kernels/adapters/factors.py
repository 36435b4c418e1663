"""Factors: one module's pair B, A with its scaling, and what can be done with the pair alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.adapters.error import AdapterError


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
    embedding: bool = False
    """saved as lora_embedding_A and lora_embedding_B; the weight is the update's transpose"""
    finite_at: int = field(default=-1, repr=False, compare=False)
    """:attr:`version` when all entries were seen to be finite; -1 where nobody looked"""

    @property
    def version(self) -> int:
        """How often the tensors were written to; 0 where torch does not count (inference)."""
        try:
            return self.b._version + self.a._version
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

    def same_a(self, other: "Factors") -> bool:
        """Whether both have the same A, to the bit."""
        return self.a is other.a or torch.equal(self.a, other.a.to(self.a.device))

    def same_b(self, other: "Factors") -> bool:
        """Whether both have the same B, to the bit."""
        return self.b is other.b or torch.equal(self.b, other.b.to(self.b.device))

    @property
    def bytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


def of_vera(
    vera: Mapping[str, tuple[Tensor, Tensor]], extras: Mapping[str, Tensor]
) -> dict[str, Factors]:
    """VeRA as factors: diag(lambda_b) B and diag(lambda_d) A with the shared random projections.

    PEFT cuts the projections to each module; a module's own width is not in the file, so A keeps
    the projection's full width here.
    """
    shared_a, shared_b = extras.get("base_model.vera_A"), extras.get("base_model.vera_B")
    if shared_a is None or shared_b is None:
        return {}
    return {
        module: Factors(
            lambda_b[:, None] * shared_b[: lambda_b.shape[0]], lambda_d[:, None] * shared_a, 1.0
        )
        for module, (lambda_b, lambda_d) in vera.items()
    }


def fitted(module: str, update: Factors | None, target: Factors) -> Factors:
    """``update`` in the rank, scaling and dtype of ``target``: see :meth:`Adapter.fit`."""
    if update is None:
        return Factors(torch.zeros_like(target.b), target.a, target.scaling, target.embedding)
    b, a = update.b, update.a
    if b.shape[0] != target.b.shape[0] or a.shape[1] != target.a.shape[1]:
        raise AdapterError(
            f"module {module}: the update is {b.shape[0]} x {a.shape[1]}, the template's is "
            f"{target.b.shape[0]} x {target.a.shape[1]}"
        )
    if target.scaling == 0:
        raise AdapterError(
            f"module {module}: the template's scaling is 0, it cannot carry an update"
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
    return Factors(b, a, target.scaling, target.embedding)
