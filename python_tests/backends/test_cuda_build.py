"""The CUDA kernels under nvcc: they compile for every architecture, and what ptxas makes of them.

And the library with them: that it is built where there is no OpenBLAS.

No GPU is needed. What ptxas said is kept under the temporary folder by the sources' contents, so
that only a change compiles again.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from elf import DT_NEEDED, Elf

from benchmarks import on_gpu

SOURCES = Path(__file__).parents[2] / "csrc"
KERNELS = [
    path.relative_to(SOURCES / "cuda").as_posix()
    for path in sorted((SOURCES / "cuda").rglob("*.cu"))
]
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3", "-Werror=all-warnings", "-Xptxas=-v")
CASES = [(kernel, architecture) for kernel in KERNELS for architecture in ARCHITECTURES]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one compiled kernel."""

    name: str
    spilled: int
    registers: int
    shared: int


def digest() -> str:
    """Of everything that a kernel's code depends on."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    content = hashlib.sha256((version.stdout + " ".join(FLAGS)).encode())
    sources = [path for path in SOURCES.glob("cuda/**/*") if path.is_file()]
    for path in sorted([*sources, *SOURCES.glob("core/*.h")]):
        content.update(path.relative_to(SOURCES).as_posix().encode())
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def compiled(folder: Path, case: tuple[str, str]) -> str:
    """nvcc's words on one file for one architecture; raises where it refuses."""
    name, architecture = case
    log = folder / f"{name.replace('/', '-')}.{architecture}.log"
    if not log.exists():
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        with tempfile.TemporaryDirectory() as scratch:
            command = ["nvcc", *FLAGS, f"-I{SOURCES}", target, "-cubin"]
            command += [str(SOURCES / "cuda" / name), "-o", f"{scratch}/out.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"refused: {done.stderr}"
        log.write_text(done.stderr)
    return log.read_text()


@pytest.fixture(name="logs", scope="session")
def _logs() -> dict[tuple[str, str], str]:
    folder = Path(tempfile.gettempdir()) / f"fedlora-ptxas-{digest()}"
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(lambda case: compiled(folder, case), CASES), strict=True))


def kernels_of(log: str) -> list[Kernel]:
    """One entry per kernel in a log of ptxas -v."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert spills is not None, part
        assert registers is not None, part
        found.append(
            Kernel(
                name,
                int(spills[1]) + int(spills[2]),
                int(registers[1]),
                int(shared[1]) if shared else 0,
            )
        )
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-sm_{case[1]}")
def test_compiles_without_spills(case: tuple[str, str], logs: dict[tuple[str, str], str]) -> None:
    """No warning, no register spilled, and all shared memory asked for at the launch."""
    log = logs[case]
    assert not log.startswith("refused: "), log
    for kernel in kernels_of(log):
        assert kernel.spilled == 0, f"{kernel.name} spills {kernel.spilled} bytes"
        assert kernel.registers <= 255
        assert kernel.shared == 0, (
            f"{kernel.name} has {kernel.shared} bytes of static shared memory"
        )


def test_every_stage_has_kernels(logs: dict[tuple[str, str], str]) -> None:
    """The reader of logs does read them: known kernels are found on every architecture."""
    for architecture in ARCHITECTURES:
        for source, kernel, count in (
            ("gram/gram.cu", "gram_tiles", 14),  # 4 types, 2 layouts, fast for 3 of the types
            ("combine.cu", "combine_tiles", 16),  # 4 types, 2 layouts, 2 widths
            ("weighted_sum.cu", "sum_units", 4),
        ):
            names = [found.name for found in kernels_of(logs[source, architecture])]
            assert sum(kernel in name for name in names) == count


def test_products_run_on_tensor_cores() -> None:
    """float64 products are one instruction from sm_90 on, and four of m8n8k4 before."""
    for architecture, instruction in (("80", "m8n8k4"), ("90a", "m16n8k16")):
        with tempfile.TemporaryDirectory() as scratch:
            command = ["nvcc", *FLAGS, f"-I{SOURCES}", f"-arch=compute_{architecture}", "-ptx"]
            command += [str(SOURCES / "cuda" / "combine.cu"), "-o", f"{scratch}/out.ptx"]
            subprocess.run(command, check=True, capture_output=True)
            ptx = Path(scratch, "out.ptx").read_text()
        assert f"mma.sync.aligned.{instruction}.row.col.f64" in ptx
        assert "cp.async.cg.shared.global" in ptx
        assert "ld.shared.v4" in ptx  # 16 bytes of factors at a time


@pytest.fixture(name="without_openblas")
def _without_openblas(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python finds a scipy_openblas64 that cannot be imported."""
    for name in ("scipy_openblas64", "pybind11"):
        (tmp_path / "hidden" / name).mkdir(parents=True)
        reason = f"raise ModuleNotFoundError('No module named {name}')"
        (tmp_path / "hidden" / name / "__init__.py").write_text(reason)
    found = os.environ | {"PYTHONPATH": str(tmp_path / "hidden")}
    code = "import scipy_openblas64"
    done = subprocess.run([sys.executable, "-c", code], env=found, capture_output=True, check=False)
    assert b"ModuleNotFoundError" in done.stderr
    return found


def configured(folder: Path, environment: dict[str, str], *options: str) -> None:
    """The preset as benchmarks/on_gpu.py configures it for an H100."""
    command = ["cmake", "--preset", "cuda", "-B", str(folder)]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *on_gpu.architecture("9.0"), *options]
    done = subprocess.run(
        command, cwd=SOURCES.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_cuda_preset_needs_no_openblas(
    tmp_path: Path, without_openblas: dict[str, str]
) -> None:
    """No command that builds the library names OpenBLAS, the core or more than one architecture."""
    configured(tmp_path / "build", without_openblas)
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "libfedlora_cuda.so" in rules
    assert "openblas" not in rules
    assert "fedlora_core" not in rules
    assert set(re.findall(r",code=\[?(\w+)", rules)) == {"sm_90a"}
    assert "-Werror" not in rules
    configured(tmp_path / "build", without_openblas, "-DFEDLORA_WERROR=ON")
    assert "-Werror" in (tmp_path / "build" / "build.ninja").read_text()


def test_the_handlers_for_jax_compile(tmp_path: Path) -> None:
    """csrc/bindings/jax_handlers.cpp in its flavor for CUDA, without a warning."""
    configured(tmp_path / "build", dict(os.environ), "-DFEDLORA_WERROR=ON")
    target = "csrc/bindings/CMakeFiles/fedlora_jax_cuda.dir/jax_handlers.cpp.o"
    command = ["cmake", "--build", str(tmp_path / "build"), "--target", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_cuda_library_is_built_without_openblas(
    tmp_path: Path, without_openblas: dict[str, str]
) -> None:
    """Minutes of nvcc; the library's own needs are torch, the CUDA runtime and the C++ library."""
    configured(tmp_path / "build", without_openblas, "-DFEDLORA_WERROR=ON")
    command = ["cmake", "--build", str(tmp_path / "build"), "--target", "fedlora_cuda"]
    done = subprocess.run(
        command, env=without_openblas, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    needed = Elf(tmp_path / "build/csrc/bindings/libfedlora_cuda.so").dynamic[DT_NEEDED]
    stems = {name.partition(".so")[0] for name in needed}
    assert stems >= {"libtorch_cpu", "libcudart", "libstdc++"}
    assert stems <= {
        "libtorch_cpu", "libcudart", "libstdc++", "libgcc_s", "libc", "libm", "ld-linux-x86-64"
    }  # fmt: skip
