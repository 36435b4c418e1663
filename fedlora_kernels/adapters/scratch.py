"""Scratch: factors that are written to a file as they are made, and mapped from there.

The file has no name any more when this returns: the system frees it with the last mapping, whatever
happens to the process.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from fedlora_kernels.adapters.factors import Factors


def mapped(factors: Mapping[str, Factors], folder: str | Path | None) -> dict[str, Factors]:
    """The same factors on the CPU, in no anonymous memory.

    Args:
        factors: by module.
        folder: on the disk that holds the file; the system's temporary folder when None.
    """
    tensors = {  # copies: safetensors refuses what shares memory
        f"{side} {module}": factor.cpu().clone(memory_format=torch.contiguous_format)
        for module, pair in factors.items()
        for side, factor in (("B", pair.b), ("A", pair.a))
    }
    with TemporaryDirectory(prefix=".fedlora-", dir=folder) as made:
        save_file(tensors, Path(made) / "factors.safetensors")
        tensors = load_file(Path(made) / "factors.safetensors")
    _trimmed()
    return {
        module: replace(pair, b=tensors[f"B {module}"], a=tensors[f"A {module}"])
        for module, pair in factors.items()
    }


def _trimmed() -> None:
    """Give freed memory back to the system: small objects that stay, one per group, would leave
    holes that add up (25 MB of a stack's 64 modules of 4096 x 24).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
