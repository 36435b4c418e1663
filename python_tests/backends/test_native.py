"""libfedlora_cpu.so: what it is linked with, which process loads it, and what happens without."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from elf import DT_NEEDED, DT_RPATH, DT_RUNPATH, Elf
from processes import copy_sources, run

import fedlora_kernels as flk
from fedlora_kernels.backends import libraries

OPERATORS = flk.ops.__all__


def compiled(name: str) -> Path:
    """A compiled file of this installation, wherever an editable one keeps it."""
    library = libraries.library("fedlora_cpu")
    assert library is not None, libraries.missing("fedlora_cpu")
    return library.parent / name


@pytest.fixture(name="library", scope="module")
def _library() -> Elf:
    return Elf(compiled("libfedlora_cpu.so"))


@pytest.fixture(name="module", scope="module")
def _module() -> Elf:
    return Elf(compiled("_numpy" + sysconfig.get_config_var("EXT_SUFFIX")))


def of_python(symbols: set[str]) -> set[str]:
    return {name for name in symbols if name.startswith(("Py", "_Py"))}


# what it is linked with


def test_no_symbol_of_python(library: Elf, module: Elf) -> None:
    """One file serves every Python; the reader does see such symbols where there are some."""
    assert not of_python(library.undefined)
    assert "PyErr_SetString" in of_python(module.undefined)


def test_of_torch_only_the_stable_c_functions(library: Elf, module: Elf) -> None:
    """No C++ name of torch, whose ABI changes between versions; the numpy module needs no torch."""
    of_torch = {name for name in library.undefined if "torch" in name}
    assert "torch_library_impl" in of_torch
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in of_torch)
    assert not [name for name in library.undefined if name.startswith(("_ZN2at", "_ZN3c10"))]
    assert not [name for name in module.undefined if "torch" in name]


def test_needed_libraries(library: Elf, module: Elf) -> None:
    needed = library.dynamic[DT_NEEDED]
    assert not [name for name in needed if "python" in name]
    assert {name for name in needed if "torch" in name or "c10" in name} == {"libtorch_cpu.so"}
    assert [name for name in needed if "openblas" in name]
    assert not [name for name in module.dynamic[DT_NEEDED] if "torch" in name or "python" in name]


def test_no_path_of_the_machine_that_built_them(library: Elf, module: Elf) -> None:
    for file in (library, module):
        assert DT_RPATH not in file.dynamic
        assert file.dynamic[DT_RUNPATH] == ["$ORIGIN/../scipy_openblas64/lib"]


def test_nothing_of_the_core_is_exported(library: Elf, module: Elf) -> None:
    """Both files hold the core: one's functions must never stand in for the other's. Only what
    :func:`fedlora_kernels.solvers` asks is found by its name, in the file that is asked.
    """
    for file in (library, module):
        assert {name for name in file.defined if "fedlora" in name} <= {"fedlora_solvers"}


# which process loads it

STATE = """
import sys
import torch
import fedlora_kernels as flk
from pathlib import Path

has = torch._C._dispatch_has_kernel_for_dispatch_key
with_kernel = [name for name in flk.ops.__all__ if has(f"fedlora::{name}", "CPU")]
print(flk.backend())
print(len(with_kernel), len(flk.ops.__all__))
print("libfedlora_cpu.so" in Path("/proc/self/maps").read_text())
cpu = next(item for item in flk.backends.ordered() if item.name == "cpu")
print(cpu.serves, cpu.reason)
"""


def state(backend: str | None = None, tree: Path | None = None) -> list[str]:
    done = run(STATE, backend, tree=tree)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SERVES = "True C++, on a CPU; composed on other devices"


@pytest.mark.parametrize("forced", [None, "cpu"])
def test_cpu_is_loaded(forced: str | None) -> None:
    count = len(OPERATORS)
    assert state(forced) == ["cpu", f"{count} {count}", "True", SERVES]


@pytest.mark.parametrize("forced", ["composed", "reference"])
def test_other_backends_leave_it_unloaded(forced: str) -> None:
    assert state(forced) == [forced, f"0 {len(OPERATORS)}", "False", SERVES]


def test_kernels_of_other_keys_are_not_registered() -> None:
    """Other devices get the composed operators, tracing the fakes."""
    for name in OPERATORS:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(f"fedlora::{name}", "CompositeExplicitAutograd")
        if flk.backend() != "triton":  # serves a GPU's streaming stages alone
            assert has(f"fedlora::{name}", "CUDA") == (flk.backend() == "cuda")


# what happens without


@pytest.fixture(name="tree")
def _tree(tmp_path: Path) -> Path:
    """A copy of the package's sources, without what was compiled."""
    copy_sources(tmp_path)
    return tmp_path


NOT_BUILT = "libfedlora_cpu.so was not built with this installation"


def test_a_missing_library_leaves_composed(tree: Path) -> None:
    expected = ["composed", f"0 {len(OPERATORS)}", "False", f"False {NOT_BUILT}"]
    assert state(tree=tree) == expected


def test_the_copy_serves_with_its_libraries(tree: Path) -> None:
    """The control: beside the sources, the library is found and loaded from there."""
    for name in ("libfedlora_cpu.so", "_numpy" + sysconfig.get_config_var("EXT_SUFFIX")):
        shutil.copy(compiled(name), tree / "fedlora_kernels")
    code = "from fedlora_kernels.backends import libraries; print(libraries.library('fedlora_cpu'))"
    assert state(tree=tree)[0] == "cpu"
    done = run(code, tree=tree)
    assert done.stdout.strip() == str(tree / "fedlora_kernels" / "libfedlora_cpu.so"), done.stderr


def test_a_missing_library_cannot_be_forced(tree: Path) -> None:
    done = run("import fedlora_kernels.ops", "cpu", tree=tree)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"RuntimeError: FEDLORA_BACKEND=cpu cannot serve ({NOT_BUILT}); "
        "these can: composed, reference"
    )


def test_a_broken_library_leaves_composed(tree: Path) -> None:
    (tree / "fedlora_kernels" / "libfedlora_cpu.so").write_text("no library")
    name, kernels, _, reason = state(tree=tree)
    assert (name, kernels) == ("composed", f"0 {len(OPERATORS)}")
    assert reason.startswith("False libfedlora_cpu.so does not load: ")
    assert "libfedlora_cpu.so: " in reason, "the dynamic linker's text is missing"
    done = run("import fedlora_kernels.ops", "cpu", tree=tree)
    assert "FEDLORA_BACKEND=cpu cannot serve (libfedlora_cpu.so does not load" in done.stderr


def test_openblas_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = libraries.find_spec

    def hidden(name: str) -> object:
        return None if name == "scipy_openblas64" else find_spec(name)

    monkeypatch.setattr(libraries, "find_spec", hidden)
    monkeypatch.setattr(libraries, "library", lambda name: Path(f"lib{name}.so"))
    for linked in ("fedlora_cpu", "fedlora_cuda_emulated"):
        assert libraries.missing(linked) == "scipy-openblas64 is not installed"
    assert libraries.missing("fedlora_cuda") == ""


@pytest.mark.parametrize(
    ("name", "asked"), [("fedlora_cpu", 1), ("fedlora_cuda_emulated", 1), ("fedlora_cuda", 0)]
)
def test_openblas_is_loaded_for_what_is_linked_with_it(
    name: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = {"openblas": 0, "torch": 0}
    monkeypatch.setattr(
        libraries, "load_openblas", lambda: loaded.update(openblas=loaded["openblas"] + 1)
    )
    monkeypatch.setattr(
        torch.ops, "load_library", lambda path: loaded.update(torch=loaded["torch"] + 1)
    )
    libraries.load(name)
    assert loaded == {"openblas": asked, "torch": 1}


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("2.9.1+cpu", "torch 2.9.1+cpu is older than 2.10"),
        ("1.13", "torch 1.13 is older than 2.10"),
        ("2.10.0", ""),
        ("2.10.0a0+git1234", ""),
        ("2.11.0+cu130", ""),
        ("3.0", ""),
    ],
)
def test_versions_of_torch(version: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "version", lambda name: version)
    assert libraries.missing("fedlora_cpu") == reason


def test_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise libraries.PackageNotFoundError(name)

    monkeypatch.setattr(libraries, "version", missing)
    assert libraries.missing("fedlora_cpu") == "torch is not installed"


def test_a_library_that_nobody_built() -> None:
    assert libraries.library("fedlora_abacus") is None
