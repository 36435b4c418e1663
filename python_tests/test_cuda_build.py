"""The CUDA kernels under nvcc: they compile for every architecture, and what ptxas makes of them.

No GPU is needed. What ptxas said is kept under the temporary folder by the sources' contents, so
that only a change compiles again.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "csrc"
KERNELS = sorted((SOURCES / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3", "-Werror=all-warnings", "-Xptxas=-v")
CASES = [(kernel.name, architecture) for kernel in KERNELS for architecture in ARCHITECTURES]

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
    for path in sorted([*SOURCES.glob("cuda/*"), *SOURCES.glob("core/*.h")]):
        content.update(path.name.encode())
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def compiled(folder: Path, case: tuple[str, str]) -> str:
    """nvcc's words on one file for one architecture; raises where it refuses."""
    name, architecture = case
    log = folder / f"{name}.{architecture}.log"
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
        for stage, kernel, count in (
            ("gram", "gram_tiles", 14),  # 4 types, 2 layouts, fast for 3 of the types
            ("combine", "combine_tiles", 16),  # 4 types, 2 layouts, 2 widths
            ("weighted_sum", "sum_units", 4),
        ):
            names = [found.name for found in kernels_of(logs[f"{stage}.cu", architecture])]
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
