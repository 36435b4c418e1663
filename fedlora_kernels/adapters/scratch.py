"""Scratch: tensors that are written to a file as they come or are made, and mapped from there.

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
from torch import Tensor

from fedlora_kernels.adapters.factors import Factors


def mapped(factors: Mapping[str, Factors], folder: str | Path | None) -> dict[str, Factors]:
    """The same factors on the CPU, in no anonymous memory.

    Args:
        factors: by module.
        folder: on the disk that holds the file; the system's temporary folder when None.
    """
    tensors = mapped_tensors(
        {
            f"{side} {module}": factor
            for module, pair in factors.items()
            for side, factor in (("B", pair.b), ("A", pair.a))
        },
        folder,
    )
    return {
        module: replace(pair, b=tensors[f"B {module}"], a=tensors[f"A {module}"])
        for module, pair in factors.items()
    }


def mapped_tensors(tensors: Mapping[str, Tensor], folder: str | Path | None) -> dict[str, Tensor]:
    """The same tensors on the CPU, contiguous, in no anonymous memory."""
    copies = {  # safetensors refuses what shares memory
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with TemporaryDirectory(prefix=".fedlora-", dir=folder) as made:
        save_file(copies, Path(made) / "tensors.safetensors")
        found: dict[str, Tensor] = load_file(Path(made) / "tensors.safetensors")
    copies.clear()
    _trimmed()
    return found


def _trimmed() -> None:
    """Give freed memory back to the system: small objects that stay, one per group, would leave
    holes that add up (25 MB of a stack's 64 modules of 4096 x 24).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
