"""Bytes of one round, as the delivery of its result counts them from shapes."""

from __future__ import annotations

from collections.abc import Sequence

import fedlora_kernels as flk


def traffic(
    delivery: flk.Delivery, clients: Sequence[flk.Adapter], trains: str = "both"
) -> tuple[int, int]:
    """Bytes that these clients send, and bytes that they receive.

    `trains` is "both", or the factor that the clients train: "a" or "b". A factor that the clients
    hold fixed is the one that they were sent. It does not go up, and it does not go down again
    where the rule averages each factor by itself. What is merged counts once for each client of the
    round; those that sat it out are sent it when they come back, which no round counts.
    """
    up = sum(map(delivery.bytes_up, clients))
    down = sum(map(delivery.bytes_down, clients))
    if trains != "both" and delivery.rule.sends == "both":
        fixed = "b" if trains == "a" else "a"
        up -= sum(_bytes(client, fixed) for client in clients)
        if delivery.rule.separable:
            down -= len(clients) * _bytes(delivery.adapter, fixed)
    return up, down


def _bytes(adapter: flk.Adapter, side: str) -> int:
    """Bytes of one factor of every module, "a" or "b"."""
    return sum(tensor.nbytes for tensor in adapter.factor_tensors(side).values())
