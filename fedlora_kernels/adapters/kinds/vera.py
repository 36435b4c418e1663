"""VeRA (arXiv 2310.11454): dW = diag(lambda_b) B diag(lambda_d) A, where B and A are frozen.

A kind of a whole adapter. Clients send vectors; lambda_d is averaged and lambda_b stays with its
client. The update is a pair of factors where the file has the projections (save_projection).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlora_kernels.adapters import keys
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.keys import PREFIX
from fedlora_kernels.adapters.peft_format import label

if TYPE_CHECKING:
    from fedlora_kernels.adapters.adapter import Adapter

Vectors = Mapping[str, tuple[Tensor, Tensor]]
"""module -> lambda_b [m], lambda_d [r]"""

PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
"""PEFT's keys of the frozen projections: equal in all clients, not averaged."""


def read(who: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The vectors of a file.

    Raises:
        AdapterError: a module has one vector without the other; names the module.
    """
    vectors = {}
    for module, sides in sorted(tensors.items()):
        if len(sides) != 2:
            have, other = ("b", "d") if "b" in sides else ("d", "b")
            raise AdapterError(
                f"{who}, module {module}: found vera_lambda_{have} without vera_lambda_{other}"
            )
        vectors[module] = (sides["b"], sides["d"])
    return vectors


def written(vectors: Vectors, sides: str) -> dict[str, Tensor]:
    """The vectors under PEFT's saved keys; "b" is lambda_b alone, "a" lambda_d."""
    tensors: dict[str, Tensor] = {}
    for module, (lambda_b, lambda_d) in vectors.items():
        if sides != "a":
            tensors[f"{PREFIX}{module}.vera_lambda_b"] = lambda_b
        if sides != "b":
            tensors[f"{PREFIX}{module}.vera_lambda_d"] = lambda_d
    return tensors


def parted(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The vectors among tensors under PEFT's keys, and the other tensors."""
    sides: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        factor = keys.factor(key)
        if factor is not None and factor.kind == "vera":
            sides.setdefault(factor.module, {})[factor.side] = tensor
        else:
            rest[key] = tensor
    return {module: (found["b"], found["d"]) for module, found in sides.items()}, rest


def shared(vectors: Vectors) -> dict[str, tuple[Tensor, Tensor]]:
    """What all clients have in common: lambda_d, beside a lambda_b of zeros."""
    return {module: (torch.zeros_like(b), d) for module, (b, d) in vectors.items()}


def pairs(vectors: Vectors, extras: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Factors diag(lambda_b) B and diag(lambda_d) A; none where the projections were not saved.

    PEFT cuts the projections to each module; a module's own width is not in the file, so A keeps
    the projection's full width here.
    """
    shared_a, shared_b = (extras.get(key) for key in PROJECTIONS)
    if shared_a is None or shared_b is None:
        return {}
    return {
        module: Factors(
            lambda_b[:, None] * shared_b[: lambda_b.shape[0]], lambda_d[:, None] * shared_a, 1.0
        )
        for module, (lambda_b, lambda_d) in vectors.items()
    }


def projections(adapter: Adapter) -> dict[str, Tensor]:
    """The frozen projections, where the adapter's file has them."""
    return {key: adapter.extras[key] for key in PROJECTIONS if key in adapter.extras}


def mean(clients: Sequence[Adapter], weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean of lambda_d beside a lambda_b of zeros."""
    vectors = {}
    for module, (zeros, lambda_d) in shared(clients[0].vera).items():
        stacked = torch.stack([client.vera[module][1].double() for client in clients])
        vectors[module] = (zeros, (weights.to(stacked) @ stacked).to(lambda_d.dtype))
    return vectors


def received(own: Vectors, shared: Vectors) -> dict[str, tuple[Tensor, Tensor]]:
    """A client's own lambda_b beside the shared lambda_d."""
    return {module: (lambda_b, shared[module][1]) for module, (lambda_b, _) in own.items()}


def check(adapters: Sequence[Adapter]) -> None:
    """Refuse clients whose frozen projections, modules or vectors' shapes differ.

    Raises:
        AdapterError: names the client and the tensor or module.
    """
    first = adapters[0]
    for index, adapter in enumerate(adapters):
        who = label(index, adapter.name)
        _check_projections(adapter, first, who)
        for module in sorted(adapter.vera.keys() ^ first.vera.keys()):
            have, lack = (who, label(0, first.name))
            if module in first.vera:
                have, lack = lack, have
            raise AdapterError(
                f"{lack}, module {module}: has no VeRA vectors, which {have} has; all clients must "
                "have the same VeRA modules"
            )
        for module, vectors in adapter.vera.items():
            expected = [list(vector.shape) for vector in first.vera[module]]
            found = [list(vector.shape) for vector in vectors]
            if found != expected:
                raise AdapterError(
                    f"{who}, module {module}: lambda_b and lambda_d have shapes {found}, expected "
                    f"{expected} as in {label(0, first.name)}"
                )


def _check_projections(adapter: Adapter, first: Adapter, who: str) -> None:
    for key in PROJECTIONS:
        expected, found = first.extras.get(key), adapter.extras.get(key)
        if (expected is None) != (found is None):
            have = "no" if found is None else "a"
            raise AdapterError(
                f"{who}: has {have} tensor {key}, unlike {label(0, first.name)}; save all clients "
                "with the same save_projection"
            )
        if expected is None or found is None or found is expected:
            continue
        if found.shape != expected.shape or not torch.equal(found, expected):
            raise AdapterError(
                f"{who}, tensor {key}: differs from that of {label(0, first.name)}; VeRA's "
                "projections are frozen and must be equal in all clients"
            )
