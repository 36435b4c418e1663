"""What lies in a folder that is not a PEFT adapter, and the one thing that helps.

Files are told apart by their names, their first bytes and the names of their tensors. Nothing is
unpickled here.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedlora_kernels.adapters.peft_format import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    listed,
)

_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_DEPTH = 3
_DIFFUSERS = (
    "unet.", "transformer.", "text_encoder.", "text_encoder_2.", "prior.", "controlnet.",
)  # fmt: skip
_AS_KOHYA = (
    "a kohya file; load it in a diffusers pipeline and use "
    "Adapter.from_model(pipeline.unet), or pipeline.transformer"
)
_AS_DIFFUSERS = (
    "a diffusers file; load it in a pipeline and use "
    "Adapter.from_model(pipeline.unet), or pipeline.transformer"
)
_AS_TORCHTUNE = (
    "a torchtune file; convert it with "
    "torchtune.models.convert_weights.tune_to_peft_adapter_weights"
)
_AS_MLX = "MLX tensors; mlx-lm's own folder (adapters.safetensors and its config) can be loaded"
_AS_LIVE = (
    "names of a live model's state_dict(); use Adapter.from_model(model), or "
    "peft.get_peft_model_state_dict(model)"
)


def of_keys(keys: Iterable[str]) -> str | None:
    """Which program names tensors like this, and what helps; None where nobody is known to."""
    names = list(keys)
    if any(".lora_down." in name or name.startswith(("lora_unet_", "lora_te")) for name in names):
        return _AS_KOHYA
    if any(name.startswith(_DIFFUSERS) and ".lora" in name for name in names):
        return _AS_DIFFUSERS
    if any(".lora.up." in name or "_lora.up." in name for name in names):
        return _AS_DIFFUSERS
    if any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names):
        return _AS_TORCHTUNE
    if any(name.endswith((".lora_a", ".lora_b")) for name in names):
        return _AS_MLX
    if any(".lora_A." in name and not name.endswith(".lora_A.weight") for name in names):
        return _AS_LIVE
    return None


def pointer(file: Path) -> bool:
    """Whether Git LFS left its pointer in place of the file."""
    return _begins(file, len(_POINTER)) == _POINTER


def unreadable(file: Path) -> str | None:
    """Why a weights file that should hold safetensors does not, or None where nothing is known."""
    if pointer(file):
        return (
            "is a Git LFS pointer, expected the file itself; run `git lfs pull` in the repository "
            "it came from"
        )
    start = _begins(file, 4)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            f"holds a pickle (torch.save), expected safetensors; name it {PICKLE_FILE} and load "
            "with pickled=True or --pickled"
        )
    if start == b"GGUF":
        return "holds GGUF for llama.cpp, expected safetensors; use the adapter it was made from"
    return None


def folder(path: Path) -> str:
    """What a folder without PEFT's two files holds, for a message that begins with its name.

    Returns:
        What was missing, what was found and, where there is a way, the remedy.
    """
    if path.is_file():
        return (
            f"is not a folder but a file{_kind_of(path)}; expected the folder that holds it and "
            f"{CONFIG_FILE}"
        )
    if not path.is_dir():
        return "is not a folder; expected a PEFT adapter folder"
    missing = WEIGHTS_FILE if (path / CONFIG_FILE).is_file() else CONFIG_FILE
    return f"has no {missing}; {_found(path, missing)}"


def _found(path: Path, missing: str) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    inside = [] if missing == WEIGHTS_FILE else _adapters_under(path)
    if inside:
        return f"an adapter lies in {listed(inside)}: give that folder"
    if missing == WEIGHTS_FILE and PICKLE_FILE in names:
        return (
            f"found {PICKLE_FILE}, a pickle: load it with pickled=True or --pickled, or save "
            "the adapter with safe_serialization=True"
        )
    for name in names:
        if what := _file(path / name):
            return f"found {name}, {what}"
    if missing == WEIGHTS_FILE and (below := _adapters_under(path)):
        return f"an adapter lies in {listed(below)}: give that folder"
    if any(name.startswith("global_step") or name == "zero_to_fp32.py" for name in names):
        return (
            "found a DeepSpeed checkpoint of shards: gather it with zero_to_fp32.py and save the "
            "adapter with save_pretrained"
        )
    if any(name.endswith(".distcp") or name.startswith("pytorch_model_fsdp") for name in names):
        return (
            "found an FSDP checkpoint of shards: gather it with `accelerate merge-weights` and "
            "save the adapter with save_pretrained"
        )
    return f"found {listed(names) or 'nothing'}; expected a PEFT adapter folder"


def _file(file: Path) -> str | None:
    """What a file of an unknown folder is, and what helps."""
    name, end = file.name, file.suffix.lower()
    if file.is_dir():
        return None
    if end in (".safetensors", *_PICKLES) and pointer(file):
        return "a Git LFS pointer; run `git lfs pull`"
    if end == ".safetensors":
        known = of_keys(_keys(file))
        if known is None and name.startswith("pytorch_lora_weights"):
            known = _AS_DIFFUSERS
        if known is None and name.startswith("model"):
            known = "the weights of a whole model; give the folder of the adapter"
        return known
    if end == ".npz" and name.startswith("adapters"):
        return "an old MLX file; convert it with a current mlx-lm, whose folders can be loaded"
    if end == ".gguf":
        return "a GGUF file for llama.cpp; give the adapter it was made from"
    if end in _PICKLES and name.startswith("adapter_") and name != PICKLE_FILE:
        return _AS_TORCHTUNE
    if end in _PICKLES and name.startswith("pytorch_lora_weights"):
        return _AS_DIFFUSERS
    if end in _PICKLES and name == PICKLE_FILE:
        return f"which is of no use without its {CONFIG_FILE}: copy that file beside it"
    if end in _PICKLES and name.startswith("pytorch_model"):
        return "the weights of a whole model; give the folder of the adapter"
    return None


def _kind_of(file: Path) -> str:
    if file.suffix == ".safetensors" and (known := of_keys(_keys(file))):
        return f", {known.partition(';')[0]}"
    return ""


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError):
        return []


def _adapters_under(path: Path) -> list[str]:
    """Folders below, at most three deep, that hold an adapter; later checkpoints last."""
    found = []
    for here, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(here)
        if below != path and CONFIG_FILE in files:
            found.append(below)
        if len(below.relative_to(path).parts) >= _DEPTH:
            folders.clear()
    return [str(folder) for folder in sorted(found, key=_natural)]


def _natural(path: Path) -> list[tuple[str, int]]:
    """Sort key with checkpoint-50 before checkpoint-100."""
    return [
        (part.rstrip("0123456789"), int("0" + part[len(part.rstrip("0123456789")) :]))
        for part in path.parts
    ]


def _begins(file: Path, count: int) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(count)
    except OSError:
        return b""
