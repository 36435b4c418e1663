"""Tile sizes per device: ``<device name>.json`` beside this file, else ``default.json``.

``python -m fedlora_kernels.backends.triton.tune`` measures the candidates on the present GPU and
writes such a file. What the numbers mean:

    ranks, depth, columns   sides of the tiles that tl.dot multiplies
    elements                of the result, per program of weighted_sum
    warps, stages           Triton's num_warps and num_stages
    programs                programs per multiprocessor that gram splits the depth for
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedlora_kernels.backends.triton import device

Tile = dict[str, int]

# tl.dot takes no side under 16.
SMALLEST = 16

_tried: dict[str, Tile] = {}
_log = logging.getLogger(__name__)


def chosen(kernel: str, where: torch.device) -> Tile:
    """The tile of a kernel on a device: gram_exact, gram_fast, gram_fast_float32, combine or
    weighted_sum.
    """
    tile: Tile = _tried.get(kernel) or _file(device.name(where))[kernel]
    return tile


@contextmanager
def trying(kernel: str, tile: Tile) -> Iterator[None]:
    """Give a kernel another tile inside this context: how candidates are measured."""
    _tried[kernel] = tile
    try:
        yield
    finally:
        del _tried[kernel]


def fitting(size: int, limit: int) -> int:
    """The smallest power of two from 16 on that covers ``size``, at most ``limit``."""
    side = SMALLEST
    while side < limit and side < size:
        side *= 2
    return side


def path(name: str) -> Path:
    """The file of a device."""
    return Path(__file__).parent / f"{name}.json"


@cache
def _file(name: str) -> dict[str, Any]:
    """A device's choices; said once for each device that has none."""
    own = path(name)
    if not own.is_file():
        _log.warning(
            "no tiles measured on %s: using the untuned defaults; "
            "`python -m fedlora_kernels.backends.triton.tune` measures and writes %s",
            name,
            own.name,
        )
        own = path("default")
    choices: dict[str, Any] = json.loads(own.read_text())
    return choices
