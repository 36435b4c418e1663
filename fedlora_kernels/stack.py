"""stack: the clients' factors as batches of modules of one shape.

    B = [B_1 | ... | B_K]    [L,m,R]        A = [A_1 ; ... ; A_K]    [L,R,n]

The factors stay where they are: a batch holds the clients' tensors, the operators' ``*_list`` forms
read them there, and a stack is copied together only for who asks for one. Modules are batched
together when their sizes, the clients that have them and those clients' ranks agree, so a
homogeneous federation is one or a few batches however many layers the model has; a batch ends where
its R x R Gram matrices would outgrow GRAM_BYTES, so memory does not grow with the number of layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.adapter import Adapter
from fedlora_kernels.factors import AdapterError
from fedlora_kernels.ops.gram import stack as stacked
from fedlora_kernels.peft_format import label

ABSENT = ("zero", "renormalise")

GRAM_BYTES = 1 << 27
"""What the matrices G_B of one batch may take: 128 MiB, 1024 modules at R = 128 and 64 at R = 512.

Some ten such arrays live while a batch is worked on; one module is a batch however large it is.
"""


class Signature(NamedTuple):
    """What the modules of one batch have in common."""

    size: tuple[int, int]
    clients: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Batch:
    """L modules of one shape from K clients."""

    modules: tuple[str, ...]
    """L module names"""
    clients: tuple[int, ...]
    """indices of the K clients that have these modules"""
    labels: tuple[str, ...]
    """the K clients as messages name them"""
    ranks: tuple[int, ...]
    """r_k"""
    weights: Tensor
    """w_k [K] float64"""
    scalings: Tensor
    """s_lk [L,K] float64"""
    list_b: tuple[Tensor, ...]
    """the factors where they lie, module-major: list_b[l*K + k] is [m,r_k]"""
    list_a: tuple[Tensor, ...]
    """list_a[l*K + k] is [r_k,n]"""

    @cached_property
    def b(self) -> Tensor:
        """The stack [L,m,R]: a copy, for what cannot read the factors where they lie."""
        return stacked(self.list_b, len(self.modules), rows=False)

    @cached_property
    def a(self) -> Tensor:
        """The stack [L,R,n]: a copy."""
        return stacked(self.list_a, len(self.modules), rows=True)

    @cached_property
    def scale(self) -> Tensor:
        """The diagonal of D, w_k s_k once per rank: [L,R] float64."""
        repeats = torch.tensor(self.ranks, device=self.scalings.device)
        return (self.weights * self.scalings).repeat_interleave(repeats, dim=1)

    def widened(self, dtype: torch.dtype) -> "Batch":
        """The same batch in a dtype that holds both its own numbers and ``dtype``'s exactly."""
        wide = torch.promote_types(self.list_b[0].dtype, dtype)
        list_b = tuple(factor.to(wide) for factor in self.list_b)
        return replace(self, list_b=list_b, list_a=tuple(factor.to(wide) for factor in self.list_a))


def stack(
    adapters: Sequence[Adapter],
    weights: Tensor,
    *,
    absent: str = "zero",
    device: torch.device | str | None = None,
) -> list[Batch]:
    """Batches of all modules of all clients.

    Args:
        adapters: the K clients.
        weights: [K] float64, summing to 1.
        absent: a client without a module contributed a zero update ("zero"), or the others'
            weights are scaled up to sum to 1 for that module ("renormalise").
        device: where the batches are made; the adapters' device when None.

    Raises:
        AdapterError: clients disagree about a module's size; the message names both.
    """
    if absent not in ABSENT:
        raise ValueError(f"absent must be one of {', '.join(ABSENT)}, found {absent!r}")
    groups: dict[Signature, list[str]] = {}
    for module in sorted({name for adapter in adapters for name in adapter.factors}):
        groups.setdefault(_signature(adapters, module), []).append(module)
    return [
        _batch(adapters, signature, part, weights, absent, device)
        for signature, modules in groups.items()
        for part in _parts(modules, sum(signature.ranks))
    ]


def _parts(modules: Sequence[str], stacked_rank: int) -> Iterator[Sequence[str]]:
    """The modules in runs whose Gram matrices fit GRAM_BYTES, as equal as can be."""
    fit = max(1, GRAM_BYTES // max(1, 8 * stacked_rank**2))
    count = -(-len(modules) // fit)
    for part in range(count):
        begin, end = (len(modules) * index // count for index in (part, part + 1))
        yield modules[begin:end]


def _signature(adapters: Sequence[Adapter], module: str) -> Signature:
    """A module's signature; checks that the clients agree on its size."""
    present = [k for k, adapter in enumerate(adapters) if module in adapter.factors]
    first = adapters[present[0]].factors[module]
    size = (first.b.shape[0], first.a.shape[1])
    dtype = first.b.dtype
    ranks = []
    for k in present:
        factors = adapters[k].factors[module]
        found = (factors.b.shape[0], factors.a.shape[1])
        if found != size:
            raise AdapterError(
                f"{label(k, adapters[k].name)}, module {module}: the update is {found[0]} x "
                f"{found[1]}, expected {size[0]} x {size[1]} as in "
                f"{label(present[0], adapters[present[0]].name)}"
            )
        dtype = torch.promote_types(torch.promote_types(dtype, factors.b.dtype), factors.a.dtype)
        ranks.append(factors.rank)
    return Signature(size, tuple(present), tuple(ranks), dtype)


def _batch(
    adapters: Sequence[Adapter],
    signature: Signature,
    modules: Sequence[str],
    weights: Tensor,
    absent: str,
    device: torch.device | str | None,
) -> Batch:
    _, present, ranks, dtype = signature
    clients = [adapters[k] for k in present]
    device = clients[0].factors[modules[0]].b.device if device is None else device
    pairs = [client.factors[module] for module in modules for client in clients]
    present_weights = weights[list(present)]
    if absent == "renormalise" and bool(present_weights.sum() > 0):
        present_weights = present_weights / present_weights.sum()
    scalings = [[client.factors[module].scaling for client in clients] for module in modules]
    return Batch(
        modules=tuple(modules),
        clients=present,
        labels=tuple(label(k, adapters[k].name) for k in present),
        ranks=ranks,
        weights=present_weights.to(device),
        scalings=torch.tensor(scalings, dtype=torch.float64, device=device),
        list_b=tuple(factors.b.to(device, dtype) for factors in pairs),
        list_a=tuple(factors.a.to(device, dtype) for factors in pairs),
    )
