"""The wheel: what is in it, and an aggregation from it where there is no compiler and no checkout.

The clean environment sees the development environment's packages through a .pth file, so that
nothing is downloaded; fedlora_kernels itself must come from the wheel.
"""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import scipy_openblas64

import fedlora_kernels as flk

ROOT = Path(__file__).parents[2]
COMPILED = {
    "fedlora_kernels/libfedlora.so",
    "fedlora_kernels/libfedlora_cpu.so",
    "fedlora_kernels/libfedlora_jax.so",
    "fedlora_kernels/_numpy" + sysconfig.get_config_var("EXT_SUFFIX"),
}

TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*command: str | Path, **environment: str) -> str:
    """A command's output; what it printed is shown where it fails."""
    hidden = ("FEDLORA_BACKEND", "PYTHONPATH", "VIRTUAL_ENV")
    inherited = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**inherited, **environment},
        cwd=environment.get("PWD", ROOT),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(name="wheel", scope="module")
def _wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout with the development environment's tools: 20 s on two cores."""
    folder = tmp_path_factory.mktemp("wheel")
    flags = ("--wheel", "--no-isolation", "--outdir", folder, f"-Cbuild-dir={folder / 'build'}")
    run(sys.executable, "-m", "build", *flags, ROOT, PATH=TOOLS)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(name="contents", scope="module")
def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(name="python", scope="module")
def _python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment with the wheel."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, system_site_packages=False, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # Last on sys.path; its own .pth files, the editable installation's among them, are not read.
    Path(packages, "development.pth").write_text(sysconfig.get_path("purelib") + "\n")
    flags = ("--no-index", "--no-deps", "--no-compile", "--quiet")
    run(sys.executable, "-m", "pip", "--python", folder, "install", *flags, wheel)
    return python


# what is in it


def test_the_name_says_python_and_platform(wheel: Path) -> None:
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"fedlora_kernels-{flk.__version__}-{version}-{version}-{platform}.whl"


def test_compiled_files_and_the_typing_marker_are_in_it(contents: dict[str, bytes]) -> None:
    assert {name for name in contents if name.endswith(".so")} == COMPILED
    assert all(contents[name].startswith(b"\x7fELF") for name in COMPILED)
    assert {"fedlora_kernels/py.typed", "fedlora_kernels/_numpy.pyi"} <= contents.keys()


def test_every_source_of_the_package_is_in_it(contents: dict[str, bytes]) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fedlora_kernels").rglob("*")
        if path.suffix in (".py", ".pyi", ".json")
    }
    packed = {name for name in contents if name.endswith((".py", ".pyi", ".json"))}
    assert {name for name in packed if name.startswith("fedlora_kernels/")} == sources


def test_nothing_else_is_in_it(contents: dict[str, bytes]) -> None:
    """No tests, no integration, no C++ but the public header, no static library."""
    info = f"fedlora_kernels-{flk.__version__}.dist-info"
    assert {name.partition("/")[0] for name in contents} == {"fedlora_kernels", info}
    kinds = {Path(name).suffix for name in contents if name.startswith("fedlora_kernels/")}
    assert kinds == {".cmake", ".h", ".json", ".py", ".pyi", ".so", ".typed"}
    assert [name for name in contents if name.endswith(".h")] == [
        "fedlora_kernels/include/fedlora/fedlora.h"
    ]
    assert f"{info}/licenses/LICENSE" in contents


def test_metadata(contents: dict[str, bytes]) -> None:
    info = f"fedlora_kernels-{flk.__version__}.dist-info"
    lines = contents[f"{info}/METADATA"].decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist: ") and ";" not in line]
    names = {re.split(r"[ <>=!~]", line.removeprefix("Requires-Dist: "))[0] for line in needed}
    assert {"torch", "numpy", "scipy-openblas64", "safetensors"} <= names
    assert not names & {"ml_dtypes", "peft", "pybind11", "pytest", "scikit-build-core"}
    assert "Requires-Python: >=3.10" in lines
    assert "fedlora=fedlora_kernels.cli:main" in (
        contents[f"{info}/entry_points.txt"].decode().replace(" ", "")
    )


def test_every_import_is_of_a_declared_dependency(contents: dict[str, bytes]) -> None:
    """A package that only comes along with another one is gone with that one's next release."""
    info = f"fedlora_kernels-{flk.__version__}.dist-info"
    declared = re.findall(r"^Requires-Dist: ([\w.-]+)", contents[f"{info}/METADATA"].decode(), re.M)
    known = {name.replace("-", "_") for name in declared}
    imported: set[str] = set()
    for name, text in contents.items():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module is not None:
                    imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) - known == {"fedlora_kernels"}


# what runs from it

AGGREGATE = """
import json, shutil, sys, torch
import fedlora_kernels as flk

generator = torch.Generator().manual_seed(3)
clients = [
    flk.Adapter.from_state_dict(
        {
            "base_model.model.q.lora_A.weight": torch.randn(4, 29, generator=generator),
            "base_model.model.q.lora_B.weight": torch.randn(23, 4, generator=generator),
        },
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    )
    for _ in range(3)
]
result = flk.aggregate(clients, rule="florist", energy=1.0, weights=[1, 2, 3])
ideal = sum(w / 6 * client.delta("q").double() for w, client in zip([1, 2, 3], clients))
error = float((result.adapter.delta("q").double() - ideal).norm() / ideal.norm())

has = torch._C._dispatch_has_kernel_for_dispatch_key("fedlora::stacked_svd", "CPU")
print(json.dumps([flk.__file__, flk.backend(), has, error, shutil.which("gcc"), sys.path]))
"""

NUMPY = """
import json
import numpy as np
import fedlora_kernels.numpy as flk_numpy

b = np.random.default_rng(0).standard_normal((2, 5, 3))
error = abs(flk_numpy.gram(b, False) - b.swapaxes(1, 2) @ b).max()
print(json.dumps([flk_numpy._numpy.__file__, float(error)]))
"""


def test_an_aggregation_in_a_clean_environment(python: Path, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    output = run(
        python, "-c", AGGREGATE, PATH=str(tmp_path / "path"), PWD=str(tmp_path),
        FEDLORA_BACKEND="cpu",
    )  # fmt: skip
    file, backend, has_kernel, error, compiler, path = json.loads(output)
    assert Path(file).is_relative_to(python.parent.parent)
    assert str(ROOT) not in path
    assert compiler is None
    assert (backend, has_kernel) == ("cpu", True)
    assert error < 1e-6


def test_numpy_in_a_clean_environment(python: Path, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    output = run(python, "-c", NUMPY, PATH=str(tmp_path / "path"), PWD=str(tmp_path))
    file, error = json.loads(output)
    assert Path(file).is_relative_to(python.parent.parent)
    assert error < 1e-12


def test_the_command_in_a_clean_environment(python: Path, tmp_path: Path) -> None:
    assert "florist" in run(python.parent / "fedlora", "rules", PWD=str(tmp_path))


# C++


def assert_example_runs(prefix: Path, build: Path) -> None:
    """examples/cpp finds fedlora under the prefix, and prints what fedlora_kernels.numpy gives."""
    flags = ("-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-Wall -Werror")
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", build, *flags, PATH=TOOLS)
    run("cmake", "--build", build, PATH=TOOLS)
    found = [line for line in (build / "CMakeCache.txt").read_text().splitlines() if "_DIR" in line]
    assert f"fedlora_DIR:PATH={prefix}/fedlora_kernels/lib/cmake/fedlora" in found
    assert run(build / "aggregate") == "rank 3 of 5, relative error 0.0509\n"


def test_cpp_from_the_wheel(python: Path, tmp_path: Path) -> None:
    """OpenBLAS, which the clean environment borrows by a path, lies beside an installed wheel."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", code).strip())
    (packages / "scipy_openblas64").symlink_to(Path(scipy_openblas64.get_lib_dir()).parent)
    assert_example_runs(packages, tmp_path)


def test_cpp_from_a_prefix(wheel: Path, tmp_path: Path) -> None:
    """The wheel's build folder again, for a prefix and without Python's parts."""
    build, prefix = wheel.parent / "build", tmp_path / "prefix"
    run("cmake", "-S", ROOT, "-B", build, "-USKBUILD", "-DFEDLORA_PYTHON=OFF", PATH=TOOLS)
    run("cmake", "--build", build, PATH=TOOLS)
    run("cmake", "--install", build, "--prefix", prefix, PATH=TOOLS)
    assert_example_runs(prefix, tmp_path / "build")
