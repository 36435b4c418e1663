"""Keys: which tensor of a client's file belongs to which module.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    PEFT's prefix    the module's own name           the factor

Wrappers that training puts around a model leave segments in its keys that PEFT's loader does not
find again. The functions here drop them; no other place turns a key into a module's name.
"""

import re
from typing import NamedTuple

PREFIX = "base_model.model."

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments that torch.compile, FSDP and activation checkpointing add, wherever they stand."""

_IN_PATTERN = re.compile(rf"(?:{'|'.join(_WRAPPERS)})\\?\.")

_FACTOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?:lora_(?P<lora>[AB])\.weight|lora_B\.(?P<bias>bias)|lora_embedding_(?P<embedding>[AB])|"
    r"lora_(?P<magnitude>magnitude)_vector(?:\.weight)?|vera_lambda_(?P<vera>[bd]))$"
)
_STRAY = re.compile(
    r"(?:^|\.)(?:lora_(?:[ABab]|up|down|mid|embedding_[AB]|magnitude_vector)|vera_lambda_[bd])"
    r"(?:\.|$)"
)
_ALPHA = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.alpha$")


class Factor(NamedTuple):
    """What a key says of a factor."""

    kind: str
    """lora, bias, embedding, magnitude or vera"""
    module: str
    """the module's own name, without PEFT's prefix"""
    side: str
    """A or B; bias; magnitude, of DoRA; of VeRA d or b"""


def plain(key: str) -> str:
    """The key without what wrappers added to it.

    Dropped are ``_orig_mod``, ``_fsdp_wrapped_module`` and ``_checkpoint_wrapped_module`` anywhere;
    ``module.`` in front or directly after PEFT's prefix; one ``model.`` before that prefix.

    Raises:
        ValueError: other text stands before PEFT's prefix, which may belong to the model.
    """
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    begin = _prefix_at(parts)
    if begin is None:
        return ".".join(_without_module(parts))
    front = [part for part in parts[:begin] if part != "module"]
    if front not in ([], ["model"]):
        raise ValueError(
            f"found {'.'.join(front)!r} before PEFT's prefix {PREFIX!r}, which may belong to the "
            "model; expected nothing; save the PeftModel itself, or rename the tensors"
        )
    prefix, rest = parts[begin : begin + 2], parts[begin + 2 :]
    return ".".join([*prefix, *_without_module(rest)])


def _prefix_at(parts: list[str]) -> int | None:
    """Where PEFT's prefix begins: base_model.model, or base_model.vera_A of VeRA's projections."""
    for index, part in enumerate(parts[:-1]):
        if part == "base_model" and parts[index + 1] in ("model", "vera_A", "vera_B"):
            return index
    return None


def _without_module(parts: list[str]) -> list[str]:
    """Without the segments that DistributedDataParallel puts in front."""
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return parts


def module_name(path: str) -> str:
    """The module's own name, from its path in a live model.

    Raises:
        ValueError: as in :func:`plain`.
    """
    return plain(path).removeprefix(PREFIX)


def pattern(text: str) -> str:
    """A key of rank_pattern or alpha_pattern without what wrappers added to it."""
    return _IN_PATTERN.sub("", text)


def factor(key: str) -> Factor | None:
    """What a plain key says of a factor, or None for the other tensors of a file."""
    found = _FACTOR.match(key)
    if found is None:
        return None
    kind = str(found.lastgroup)
    return Factor(kind, found["module"], found[kind])


def alpha_of(key: str) -> str | None:
    """The module whose alpha a tensor of this key holds in kohya's and diffusers' files."""
    found = _ALPHA.match(key)
    return None if found is None else found["module"]


def stray(key: str) -> bool:
    """Whether a key that is no :func:`factor` names a factor in a way that PEFT does not load."""
    return _STRAY.search(key) is not None


def alike(one: str, other: str) -> bool:
    """Whether two names may be one layer under different wrappers.

    They may when they end alike and one has further segments in front or in between, or when the
    segments before the first numbered list stand in another order.
    """
    short, long = sorted((one.split("."), other.split(".")), key=len)
    if len(short) < len(long):
        rest = iter(long)
        return short[-1] == long[-1] and all(part in rest for part in short)
    (one_head, one_tail), (other_head, other_tail) = _split(short), _split(long)
    return one_tail == other_tail and sorted(one_head) == sorted(other_head) and short != long


def _split(parts: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first numbered list of layers, and the rest."""
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    begin = max(first - 1, 0)
    return parts[:begin], parts[begin:]
