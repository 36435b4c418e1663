"""A server's round on folders that must be refused: one clear error, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import draw, write

import fedlora_kernels as flk


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def serve(paths: list[str], out: str, rule: str = "fedit", **options: Any) -> None:
    """What a server does with the folders of a round."""
    adapters = [flk.Adapter.load(path) for path in paths]
    flk.aggregate(adapters, rule=rule, **options).save(out)


def assert_refused(
    paths: list[str],
    words: str,
    error: type[Exception] = flk.AdapterError,
    **options: Any,
) -> None:
    """The error matches; a new folder does not appear and an old one is untouched."""
    draw(seed=9).adapters[0].save("old")
    before = listing(Path())
    for out in ("new", "old"):
        with pytest.raises(error, match=words):
            serve(paths, out, **options)
    assert listing(Path()) == before
    assert not Path("new").exists()


def tensors_of(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(path) / "adapter_model.safetensors")


def config_of(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(path) / "adapter_config.json").read_text())
    return loaded


def rewrite(path: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = tensors_of(path)
    change(tensors)
    write(Path(path), tensors, config_of(path))


def reconfigure(path: str, **changes: Any) -> None:
    text = json.dumps({**config_of(path), **changes})
    (Path(path) / "adapter_config.json").write_text(text)
