"""DoRA (arXiv 2402.09353): a layer's weight is W = m V / ||V|| with V = W0 + s B A.

||V|| [m] holds the norm of every output's weights, and m [m] the magnitude that takes its place.
The update W - W0 depends on the base, which the server does not have, so it is no sum of products.
Where magnitudes="average" asks for it, the direction V is aggregated by the rule, m by the mean:

    m_g = sum_k w_k m_k    over the clients that have the module
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.finite import finite
from fedlora_kernels.adapters.peft_format import label

if TYPE_CHECKING:
    from fedlora_kernels.adapters.adapter import Adapter

KEY = "lora_magnitude_vector"

MAGNITUDES = ("average",)
"""what can be asked for"""

NOTE = (
    "DoRA: energies and errors are those of the direction, the update s B A before the magnitudes "
    "rescale the weight"
)


def used(adapters: Sequence[Adapter]) -> bool:
    """Whether the clients, which agree about it, train with DoRA."""
    return bool(adapters[0].config.get("use_dora"))


def check(adapters: Sequence[Adapter], magnitudes: str | None, *, renormalizes: bool) -> None:
    """Refuse DoRA where nobody asked for the mean of the magnitudes, or where there is none.

    Args:
        adapters: the clients; they agree about ``use_dora``.
        magnitudes: "average", or None.
        renormalizes: whether a client without a module counts as if it were not there.

    Raises:
        AdapterError: names the client and the module.
        ValueError: magnitudes is unknown.
    """
    if magnitudes is not None and magnitudes not in MAGNITUDES:
        raise ValueError(f"magnitudes must be average or None, found {magnitudes!r}")
    known: dict[str, int] = {}
    for index, adapter in enumerate(adapters):
        for module, item in adapter.trained.items():
            if item.magnitude is None:
                continue
            if magnitudes is None:
                raise AdapterError(
                    f"{label(index, adapter.name)}, module {module}: found DoRA, whose magnitudes "
                    "rescale the whole weight, which no pair of factors represents; "
                    "magnitudes='average' (--magnitudes average) averages them beside the factors, "
                    "or train with use_dora=False"
                )
            known.setdefault(module, index)
    for index, adapter in enumerate(() if renormalizes else adapters):
        for module in sorted(known.keys() - adapter.trained.keys()):
            owner = known[module]
            raise AdapterError(
                f"{label(index, adapter.name)}, module {module}: found no DoRA magnitudes, which "
                f"{label(owner, adapters[owner].name)} has, and those of the base are unknown "
                "here; absent='renormalize' (--absent renormalize) takes the mean of the clients "
                "that have the module"
            )


def averaged(
    made: Mapping[str, Factors], clients: Sequence[Adapter], weights: Tensor
) -> dict[str, Factors]:
    """The factors of a result beside the mean of the clients' magnitudes, summed in float64.

    Raises:
        AdapterError: the clients that have a module all have weight 0, or the result's dtype
            cannot hold the mean; names the module.
    """
    finished = {}
    for module, item in made.items():
        total = torch.zeros(item.b.shape[0], dtype=torch.float64, device=item.b.device)
        weight = 0.0
        for client, share in zip(clients, weights.tolist(), strict=True):
            own = client.factors.get(module)
            if own is not None and own.magnitude is not None:
                total += share * own.magnitude.to(total)
                weight += share
        if weight == 0:
            raise AdapterError(
                f"module {module}: all clients that have it have weight 0, so that its DoRA "
                "magnitudes have no mean"
            )
        mean = (total / weight).to(item.b.dtype)
        if not finite([mean]):
            raise AdapterError(
                f"module {module}: the mean of the DoRA magnitudes overflows {mean.dtype}; give a "
                "wider dtype= (--dtype)"
            )
        finished[module] = replace(item, magnitude=mean)
    return finished
