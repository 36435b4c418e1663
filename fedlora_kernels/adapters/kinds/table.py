"""The kinds by name, and one as JSON types."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedlora_kernels.adapters.kinds.convolution import Convolution
from fedlora_kernels.adapters.kinds.embedding import Embedding
from fedlora_kernels.adapters.kinds.experts import Expert
from fedlora_kernels.adapters.kinds.kind import Kind

KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Kind, Embedding, Convolution, Expert)}


def plain(kind: Kind) -> dict[str, Any]:
    """A kind as JSON types."""
    return {"name": kind.name, **asdict(kind)}


def restored(fields: Mapping[str, Any]) -> Kind:
    """The kind again."""
    given = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
    name = str(given.pop("name"))
    return KINDS[name](**given)
