"""Finding and loading what was compiled: torch's kernels, the numpy module, and OpenBLAS.

The numpy module and the libraries that compute on the CPU need OpenBLAS; the CUDA library does not.

The libraries lie beside the compiled numpy module: in the folder of ``fedlora_kernels``, or in
site-packages when an editable installation keeps the sources elsewhere. ``FEDLORA_LIBRARIES`` names
a folder that is searched first, for libraries that were built elsewhere.
"""

import ctypes
import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from fedlora_kernels.backends.solver import Problem, Step

_TORCH = (2, 10)  # the first with the stable ABI the kernels are built on
# The emulated CUDA library has LAPACK in the place of the vendor's eigensolver.
_WITH_OPENBLAS = ("fedlora_cpu", "fedlora_cuda_emulated")


def missing(name: str) -> str:
    """Why a library of compiled kernels cannot be loaded here, or nothing."""
    if library(name) is None:
        return f"lib{name}.so was not built with this installation"
    if name in _WITH_OPENBLAS and find_spec("scipy_openblas64") is None:
        return "scipy-openblas64 is not installed"
    try:
        found = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < _TORCH:
        return f"torch {found} is older than {'.'.join(map(str, _TORCH))}"
    return ""


def library(name: str) -> Path | None:
    """The file of a compiled library, where this installation has it."""
    module = find_spec("fedlora_kernels._numpy")
    folders = [Path(__file__).parent.parent]
    if elsewhere := os.environ.get("FEDLORA_LIBRARIES"):
        folders.insert(0, Path(elsewhere))
    if module is not None and module.origin is not None:
        folders.append(Path(module.origin).parent)
    return next((path for folder in folders if (path := folder / f"lib{name}.so").is_file()), None)


def load(name: str) -> None:
    """Register a compiled library's kernels with torch.

    Raises:
        ImportError: torch cannot be imported.
        OSError: the library cannot be loaded; the text is the dynamic linker's.
    """
    import torch

    if name in _WITH_OPENBLAS:
        load_openblas()
    torch.ops.load_library(str(library(name)))


class _Problem(ctypes.Structure):
    """`Problem` of csrc/bindings/solvers.h."""

    _fields_ = (
        ("rank", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("cap", ctypes.c_int64),
        ("energy", ctypes.c_double),
        ("fp64", ctypes.c_int64),
        ("fast", ctypes.c_int64),
    )


def solvers(name: str, problem: Problem) -> tuple[Step, ...]:
    """What a loaded library would use for a problem; on a GPU, on the one that is current.

    Raises:
        RuntimeError: the library cannot tell; the text is its own.
    """
    ask = ctypes.CDLL(str(library(name))).fedlora_solvers
    ask.restype = ctypes.c_char_p
    given = _Problem(
        problem.stacked_rank,
        *problem.size,
        min(problem.max_rank or problem.smaller, problem.stacked_rank),
        problem.energy,
        problem.dtype == "float64",
        problem.precision == "fast",
    )
    lines = ask(ctypes.byref(given)).decode().splitlines()
    rows = [line.split("\t") for line in lines]
    if any(len(row) != 4 for row in rows):
        raise RuntimeError(f"lib{name}.so: {' '.join(lines)}")
    return tuple(
        Step(solver, (int(first), int(last) or None), source)
        for solver, first, last, source in rows
    )


@cache
def load_openblas() -> None:
    """Load OpenBLAS, so that the libraries linked with it find it wherever its wheel lies."""
    import scipy_openblas64

    folder = Path(scipy_openblas64.get_lib_dir())
    ctypes.CDLL(str(folder / f"lib{scipy_openblas64.get_library()}.so"))
