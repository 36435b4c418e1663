"""Python processes of their own: a backend is chosen once in each."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import fedlora_kernels as flk


def run(
    code: str,
    backend: str | None = None,
    *,
    tree: Path | None = None,
    libraries: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Python on some code, with FEDLORA_BACKEND and FEDLORA_LIBRARIES as given or unset.

    With a ``tree``, the package comes from there and nowhere else.
    """
    given = {"FEDLORA_BACKEND": backend, "FEDLORA_LIBRARIES": libraries}
    environment = {key: value for key, value in os.environ.items() if key not in given}
    environment |= {key: str(value) for key, value in given.items() if value is not None}
    flags = []
    if tree is not None:  # without site there are no .pth files, hence no editable installation
        flags = ["-S"]
        paths = [str(tree), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        code = f"import sys; sys.path[:0] = {paths}\n{code}"
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def copy_sources(folder: Path) -> Path:
    """A copy of the package in ``folder``, without what was compiled."""
    source = Path(flk.__file__).parent
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(source, folder / source.name, ignore=ignored))
