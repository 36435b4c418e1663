"""merge: a node of a tree of servers makes one client of its clients.

    nodes = [flk.merge(clients, rule="florist", weights=weights) for clients, weights in machines]
    adapters, weights = zip(*nodes)
    result = flk.aggregate(adapters, rule="florist", energy=0.9, weights=weights)

    dW = sum_j W_j dW_j / sum_j W_j    dW_j = sum_k w_k s_k B_k A_k / W_j    W_j = sum_k w_k

Node j sends W_j and an adapter that stands for its clients k.

A merged adapter is an adapter like any other: it can be saved, sent, and merged again.
"""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedlora_kernels import rules
from fedlora_kernels._round import Round
from fedlora_kernels.adapters import agreement
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.peft_format import label
from fedlora_kernels.rules import Rule


class Merged(NamedTuple):
    """One client of the next level."""

    adapter: Adapter
    """what stands for the merged clients; saved and sent as any other"""
    weight: float
    """the sum of the merged clients' weights"""


def merge(
    adapters: Sequence[Adapter | str | Path],
    *,
    rule: str | Rule,
    weights: Sequence[float] | None = None,
    rtol: float = 0.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    same_base: bool = False,
    magnitudes: str | None = None,
    absent: str = "zero",
    memory_limit: int | None = None,
    scratch: str | Path | None = None,
    **options: Any,
) -> Merged:
    """Make one client of several, so that ``rule`` gives for merged clients what it gives for all.

    A rule that looks at the sum of the clients' products alone (``florist``, ``flora``, and
    ``flexlora`` with ``rank``) gets that sum as two factors of its numerical rank, at most
    min(m, n, R). A rule that averages gets the averages. What a rule cannot do without all clients
    is refused (:attr:`Rule.merging`).

    Args:
        adapters: the K clients of this node, or their PEFT folders; merged ones among them.
        rule: the rule of the root, or its name.
        weights: the clients' weights (numbers of examples, say); 1 each when None.
        rtol: ||merged - sum||_F / ||sum||_F that may be cut off, of each module, for fewer ranks.
            At 0, nothing but singular values that count as zero: R sqrt(eps) of the sum at worst,
            with the eps of float64. The errors of the levels add up.
        dtype: of the merged factors; the clients' own, and float32 at least, when None.
        device: see :class:`Round`.
        same_base: see :class:`Round`.
        magnitudes: see :class:`Round`.
        absent: that of the root. With "renormalize" every client must have every module.
        memory_limit: see :class:`Round`.
        scratch: see :class:`Round`.
        **options: of a rule given by name.

    Returns:
        The adapter and its weight: what :func:`aggregate` or another ``merge`` takes.

    Raises:
        AdapterError: as :func:`aggregate`; or a client lacks a module that others have, whose mean
            is over those that have it. The message names the client and the module.
        ValueError: the rule needs each client by itself, or rtol is out of range.
        TypeError: the rule has no such option.
    """
    chosen = rules.make(rule, **options)
    merging = chosen.merging
    if merging is None:
        able = [kind.name for kind in Rule.kinds() if kind.merging is not Rule.merging]
        raise ValueError(
            f"{chosen!r} cannot work on merged clients, its result depends on each of them; rules "
            f"that can, with some or all options: {', '.join(sorted(able))}"
        )
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must lie in [0, 1), found {rtol}")
    if "energy" in merging.options():
        merging = rules.make(merging.name, **{**merging.given, "energy": 1 - rtol**2})
    elif rtol:
        raise ValueError(f"rtol must be 0 for rule {chosen.name!r}, which averages: found {rtol}")
    round_ = Round(
        adapters,
        weights=weights,
        device=device,
        same_base=same_base,
        magnitudes=magnitudes,
        memory_limit=memory_limit,
        scratch=scratch,
    )
    if chosen.of_holders or absent == "renormalize":
        _refuse_absent(round_.clients)
    result = round_.aggregate(merging, dtype=dtype or _dtype(round_.clients), heads=chosen.heads)
    total = len(round_.clients) if weights is None else sum(map(float, weights))
    return Merged(result.adapter, float(total))


def _dtype(clients: Sequence[Adapter]) -> torch.dtype:
    """What holds every client's numbers, float32 at least."""
    found = (x.dtype for client in clients for x in client.factor_tensors().values())
    return reduce(torch.promote_types, found, torch.float32)


def _refuse_absent(clients: Sequence[Adapter]) -> None:
    """One weight stands for all modules of a node, so that none may have fewer clients."""
    for index, modules in agreement.absent(clients).items():
        raise AdapterError(
            f"{label(index, clients[index].name)}, module {modules[0]}: is missing, which others "
            "have; its mean is over the clients that have it, which the one weight of a merged "
            "client cannot tell: merge clients with the same modules"
        )
