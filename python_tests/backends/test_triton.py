"""The Triton backend beyond the operators' own tests: what serves, tiles, tables, torch.compile.

The operators' tests run on it with FEDLORA_BACKEND=triton TRITON_INTERPRET=1; test_triton_build.py
compiles the kernels for GPUs.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedlora_kernels as flk
from fedlora_kernels.backends.triton import interpreted, serves, tiles

pytest.importorskip("triton", reason="triton is not installed")

from fedlora_kernels.backends.triton import device, factors


def run(code: str, **variables: str) -> str:
    """What a process of its own prints; the backend is chosen at import."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("FEDLORA_BACKEND", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CHOICE = """
import fedlora_kernels as flk
try:
    print(flk.backend())
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that triton serves")
def test_forced_without_gpu_and_interpreter_raises_with_what_can_serve() -> None:
    code = (
        "import sys\ntry:\n    import fedlora_kernels.ops\nexcept RuntimeError as e:\n    print(e)"
    )
    said = run(code, FEDLORA_BACKEND="triton")
    assert said.startswith("FEDLORA_BACKEND=triton cannot serve (there is no GPU")
    assert "composed" in said.partition("these can: ")[2]


def test_interpreted_serves_only_when_forced() -> None:
    assert run(CHOICE, FEDLORA_BACKEND="triton", TRITON_INTERPRET="1") == "triton\n"
    assert run(CHOICE, TRITON_INTERPRET="1") != "triton\n"


def test_says_why() -> None:
    able, reason = serves()
    assert reason
    assert able or "GPU" in reason
    assert ("triton", able, reason) in [
        (b.name, b.serves, b.reason) for b in flk.backends.ordered()
    ]


STAGES = """
import torch
from fedlora_kernels import ops
from fedlora_kernels.backends.triton import combine, gram, weighted_sum

calls = dict.fromkeys(("gram", "combine", "weighted_sum"), 0)
for name, stage in (("gram", gram), ("combine", combine), ("weighted_sum", weighted_sum)):
    def counted(*args, name=name, launch=stage._launch, **kwargs):
        calls[name] += 1
        return launch(*args, **kwargs)
    stage._launch = counted

b, a = torch.randn(2, 30, 8), torch.randn(2, 8, 40)
scale, weights = torch.ones(2, 2), torch.tensor([0.5, 0.5])
ops.stacked_svd(b, a, torch.ones(2, 8), 0.9)
print(list(calls.values()))
ops.flora_na(b, a, weights, scale)
print(list(calls.values()))
"""


def test_composed_operators_use_the_kernels() -> None:
    """stacked_svd: two Grams and two products. flora_na: two Grams and two sums more."""
    said = run(STAGES, FEDLORA_BACKEND="triton", TRITON_INTERPRET="1")
    assert said.splitlines() == ["[2, 2, 0]", "[4, 2, 2]"]


TRACED = """
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fedlora_kernels import ops
from fedlora_kernels.backends.triton import combine, device, gram, weighted_sum
from fedlora_kernels.backends.triton.compiled import open_up

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
device.name, device.units = lambda where: "default", lambda where: 132
for stage in (gram, combine, weighted_sum):
    for name, launch in stage.OPERATORS.items():
        if not name.endswith("_list"):
            open_up(name, launch, stage.KERNELS)

def show(graph, inputs):
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    wrapped = sum("triton_kernel_wrapper" in name for name in names)
    print(wrapped, any("fedlora" in name for name in names))
    return graph

def trace(face, *arguments):
    compiled = torch.compile(
        face, backend=aot_autograd(fw_compiler=show), fullgraph=True, dynamic=True
    )
    compiled(*arguments)

with FakeTensorMode():
    def gpu(*sizes, dtype=torch.float64):
        return torch.empty(*sizes, dtype=dtype, device="cuda")
    b, a = gpu(3, 100, 65, dtype=torch.bfloat16), gpu(3, 65, 4096, dtype=torch.bfloat16)
    trace(ops.gram, a, True)
    trace(ops.combine, b, a, gpu(3, 65, 20), gpu(3, 20, 65))
    trace(ops.weighted_sum, a, gpu(3, 65))
    on_cpu = torch.empty(2, 5, 70)
    trace(ops.gram, on_cpu, True)
"""


@pytest.mark.skipif(interpreted(), reason="interpreted kernels are Python: nothing to see")
def test_compile_sees_the_kernels_on_a_gpu_and_the_operator_elsewhere() -> None:
    """Traced with fake tensors, dynamic shapes and a stand-in for the driver: no GPU is needed."""
    said = run(TRACED, FEDLORA_BACKEND="composed")
    assert said.splitlines() == ["2 False", "2 False", "1 False", "0 True"]


TUNED = """
import torch
from fedlora_kernels.backends.triton import tiles, tune

# The time is the distance from a wanted tile; the first candidate gives a wrong result.
wanted = {
    "gram_exact": {"ranks": 32, "depth": 64, "programs": 4, "warps": 8, "stages": 2},
    "combine": {"depth": 32, "ranks": 16, "columns": 32, "warps": 4, "stages": 3},
    "weighted_sum": {"elements": 512, "warps": 4},
}
cpu = torch.device("cpu")
shapes = (tune.Shape(1, 12, 70, 5, 3), tune.Shape(2, 6, 40, 5, 2))
for kernel, tile in wanted.items():
    def timer(run, kernel=kernel, tile=tile):
        now = tiles.chosen(kernel, cpu)
        return 1.0 + sum(abs(now[key] - value) for key, value in tile.items())
    few = tune.CANDIDATES[kernel][:9] + (tile,)
    print(tune.fastest(kernel, timer, cpu, few, shapes) == tile)

good = tune.workloads
tune.workloads = lambda *arguments: [(run, lambda: run() * 1.01) for run, _ in good(*arguments)]
try:
    tune.fastest("weighted_sum", lambda run: 1.0, cpu, tune.CANDIDATES["weighted_sum"], shapes)
except RuntimeError as error:
    print(error)
"""


def test_tuner_takes_the_fastest_right_candidate() -> None:
    said = run(TUNED, FEDLORA_BACKEND="composed", TRITON_INTERPRET="1")
    assert said.splitlines() == ["True"] * 3 + ["no candidate of weighted_sum works on this device"]


def test_tile_files_are_whole() -> None:
    kernels = {"gram_exact", "gram_fast", "gram_fast_float32", "combine", "weighted_sum"}
    default = json.loads(tiles.path("default").read_text())
    for file in tiles.path("default").parent.glob("*.json"):
        choices = json.loads(file.read_text())
        assert choices.pop("source"), file
        assert set(choices) == kernels, file
        for kernel, tile in choices.items():
            assert set(tile) == set(default[kernel]), (file, kernel)
            for key in tile.keys() & {"ranks", "depth", "columns", "elements"}:
                assert tile[key] >= tiles.SMALLEST, (file, kernel, key)
                assert tile[key].bit_count() == 1, (file, kernel, key)


def test_tiles_of_a_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A file of the device's name serves; without one the defaults do, and that is logged once."""
    here = torch.device("cpu")
    (tmp_path / "default.json").write_text(json.dumps({"combine": {"warps": 4}}))
    (tmp_path / "Some_GPU.json").write_text(json.dumps({"combine": {"warps": 8}}))
    monkeypatch.setattr(tiles, "path", lambda name: tmp_path / f"{name}.json")
    tiles._file.cache_clear()
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(device, "name", lambda where: "Some_GPU")
        assert tiles.chosen("combine", here) == {"warps": 8}
        assert not caplog.records
        monkeypatch.setattr(device, "name", lambda where: "Other_GPU")
        assert [tiles.chosen("combine", here) for _ in range(3)] == [{"warps": 4}] * 3
    tiles._file.cache_clear()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no tiles measured on Other_GPU"
    ]
    with tiles.trying("combine", {"warps": 2}):
        assert tiles.chosen("combine", here) == {"warps": 2}


@pytest.mark.parametrize(("size", "side"), [(1, 16), (16, 16), (17, 32), (33, 64), (900, 64)])
def test_fitting(size: int, side: int) -> None:
    assert tiles.fitting(size, 64) == side


def test_table_of_a_list() -> None:
    """Addresses of every rank, and what is known of them, for contiguous and other tensors."""
    a = [torch.zeros(rank, 32, dtype=torch.float16) for rank in (3, 8, 3, 8)]
    table = factors.listed(a, 2, rows=True)
    assert (table.modules, table.ranks, table.depth) == (2, 11, 32)
    assert (table.unit, table.aligned) == (True, True)
    ranks = [[row.data_ptr() for factor in half for row in factor] for half in (a[:2], a[2:])]
    assert table.table[0].tolist() == ranks
    assert table.table[1].eq(1).all()

    odd = [torch.zeros(3, 33, dtype=torch.float16)[:, 1:]]
    assert (factors.listed(odd, 1, rows=True).unit, factors.listed(odd, 1, rows=True).aligned) == (
        True,
        False,
    )
    runs = [torch.zeros(32, rank, dtype=torch.float16) for rank in (8, 16)]
    table = factors.listed(runs, 1, rows=False)
    assert (table.unit, table.aligned) == (False, True)
    assert table.table[1].tolist() == [[8] * 8 + [16] * 16]
    broken = [torch.zeros(32, rank, dtype=torch.float16) for rank in (8, 12)]
    assert not factors.listed(broken, 1, rows=False).aligned


def test_list_across_devices_raises() -> None:
    with pytest.raises(RuntimeError, match="tensor 1 of a list must be on cpu, found meta"):
        factors.listed([torch.zeros(2, 3), torch.zeros(2, 3, device="meta")], 1, rows=True)
