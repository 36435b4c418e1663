"""What all tests share: one thread (matrices are small), no network, the backend in test ids."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Threads that spin while they wait slow each other down on two shared cores (46 s against 15 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if os.environ.get("TRITON_INTERPRET"):
    # Interpreted kernels multiply float32 tiles in numpy. OpenBLAS's kernel for Zen and Haswell
    # rounds equal rows differently by where they lie, which no GPU does; this one does not.
    os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"

import pytest
import torch
from federation import draw, write_client
from hypothesis import settings

import fedlora_kernels as flk

torch.set_num_threads(1)

# The same examples on every machine: a test that fails in CI fails on a desk.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> str:
    """The backend that this process uses; part of the id of the operators' tests."""
    return str(getattr(request, "param", flk.backend()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that asks for more threads asks for itself alone."""
    yield
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put the backend's name into the ids of the operators' tests."""
    if metafunc.definition.path.parent.name == "ops":
        metafunc.parametrize("backend", [flk.backend()], indirect=True)


def pytest_report_header() -> str:
    """Which backend these results belong to."""
    return f"fedlora_kernels {flk.__version__}, backend {flk.backend()}"


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three client folders, as typed from the folder that holds them."""
    monkeypatch.chdir(tmp_path)
    for k, client in enumerate(draw().drawn):
        write_client(tmp_path / f"site-{k}", client)
    return ["site-0", "site-1", "site-2"]
