"""Experts: parameters [E, ...] that target_parameters names, as one pair per expert.

    dW[e] = s B_e A_e    B_e [m, r] = lora_B[:, e::E]    A_e [r, n] = lora_A[e r : (e+1) r]

PEFT wraps a module once per parameter, so that the first parameter of two lies under
``experts.base_layer`` and the last one under ``experts``. The file does not say which parameter is
which; all parameters of one module are written with one rank and one scaling, so that it does not
matter. A parameter of two dimensions is one expert.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import torch
from torch import Tensor

from fedlora_kernels.adapters.kinds.kind import Kind
from fedlora_kernels.adapters.peft_format import Promised

INSIDE = ".base_layer"
"""What PEFT adds to the name of a module that it wraps more than once."""


@dataclass(frozen=True)
class Expert(Kind):
    """One expert of a parameter."""

    index: int
    count: int
    """E"""
    parameters: tuple[str, ...]
    """the full names of all parameters of its module that have factors"""

    name: ClassVar[str] = "expert"
    targeted: ClassVar[bool] = False

    @property
    def told(self) -> str:
        """See :attr:`Kind.told`."""
        return f"expert {self.index} of {self.count} ({', '.join(self.parameters)})"

    @property
    def place(self) -> int:
        """See :attr:`Kind.place`."""
        return self.index

    def module(self, pair: str) -> str:
        """See :meth:`Kind.module`."""
        return pair.rpartition(".")[0]

    def named(self, pair: str) -> tuple[str, ...]:
        """See :meth:`Kind.named`."""
        return self.parameters

    def group(self, pair: str) -> str | None:
        """See :meth:`Kind.group`."""
        return wrapped(self.module(pair))

    def joined(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """See :meth:`Kind.joined`."""
        b = torch.stack([b for b, _ in pairs], dim=2).flatten(1)
        return b, torch.cat([a for _, a in pairs])


_OF_PARAMETERS = re.compile(r"\.base_layer$|(?:^|\.)experts(?:\.(?!\d)|$)")


def told_by(module: str) -> bool:
    """Whether a module's name alone tells that its factors are those of a parameter: PEFT wrapped
    it again, or it is a model's ``experts`` and no list of layers.
    """
    return _OF_PARAMETERS.search(module) is not None


@dataclass(frozen=True)
class Found:
    """What is known of the tensors of one parameter."""

    parameters: tuple[str, ...]
    rank: int
    scaling: float


def wrapped(module: str) -> str:
    """The module's own name, without what PEFT added to it."""
    while module.endswith(INSIDE):
        module = module.removesuffix(INSIDE)
    return module


def parameters(targets: Iterable[str], module: str) -> tuple[str, ...]:
    """The full names of the module's parameters among target_parameters.

    Args:
        targets: target_parameters: names of parameters, or the ends of names.
        module: its own name.
    """
    found = set()
    for target in targets:
        parent, _, parameter = target.rpartition(".")
        if module == parent or not parent or module.endswith(f".{parent}"):
            found.add(f"{module}.{parameter}")
    return tuple(sorted(found))


def assigned(
    rows: Mapping[str, int], names: tuple[str, ...], promised: Promised
) -> dict[str, Found] | None:
    """Rank and scaling of each tensor of one wrapped module; None where the names do not tell.

    Args:
        rows: the name in the file -> how many rows its lora_A has, E r.
        names: the module's parameters, in no order.
        promised: what the config says of them.
    """
    known = {name: (promised.rank(name), promised.alpha(name)) for name in names}
    ways = {
        tuple(known[name] for name in chosen)
        for chosen in permutations(names, len(rows))
        if all(
            count % known[name][0] == 0 for count, name in zip(rows.values(), chosen, strict=True)
        )
    }
    if len(ways) > 1:  # the parameters of one module have as many experts
        ways = {
            way
            for way in ways
            if len({count // rank for count, (rank, _) in zip(rows.values(), way, strict=True)})
            == 1
        }
    if len(ways) != 1:
        return None
    (way,) = ways
    return {
        module: Found(names, rank, promised.scaled(alpha, rank))
        for module, (rank, alpha) in zip(rows, way, strict=True)
    }


def read(b: Tensor, a: Tensor, found: Found) -> list[tuple[Expert, Tensor, Tensor]]:
    """The kind and the pair of each expert.

    Raises:
        ValueError: the tensors do not fit each other or the rank.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(
            f"found B {list(b.shape)} and A {list(a.shape)}, expected [m,r E] and [E r,n]"
        )
    count = a.shape[0] // found.rank
    of_b = b.unflatten(1, (found.rank, count)).permute(2, 0, 1).contiguous().unbind()
    of_a = a.unflatten(0, (count, found.rank)).unbind()
    return [
        (Expert(index, count, found.parameters), *pair)
        for index, pair in enumerate(zip(of_b, of_a, strict=True))
    ]
