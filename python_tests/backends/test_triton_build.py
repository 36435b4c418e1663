"""The Triton kernels compiled for GPUs that need not be present.

They compile with the default tiles, reach the matrix units, read 16 bytes at a time, spill no
registers and fit into shared memory.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora_kernels.backends.triton import interpreted, release, tiles

pytest.importorskip("triton", reason="triton is not installed")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedlora_kernels.backends.triton import combine, gram, weighted_sum

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Where float64 products run on matrix units, and as which instruction. On sm_100 they are fma.
FLOAT64 = {
    "sm_80": "mma.sync.aligned.m8n8k4.row.col.f64",
    "sm_90": "mma.sync.aligned.m16n8k16.row.col.f64",
    "gfx942": "v_mfma_f64_16x16x4",
}
# Where a float32 product is three TF32 ones.
SPLITS = ("sm_80", "sm_90") if release() < (3, 7) else ("sm_80", "sm_90", "sm_100")
SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KB a program may have."""

TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

ahead = pytest.mark.skipif(
    interpreted(), reason="TRITON_INTERPRET=1 makes the kernels Python functions: nothing compiles"
)


def assembly(
    kernel: Any, target: str, tile: dict[str, int], types: dict[str, str], constants: dict[str, Any]
) -> tuple[str, Any]:
    """A kernel's assembly and compiled form; integers are multiples of 16, as aligned data has."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        constants,
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names},
    )
    options = {"num_warps": tile["warps"], "num_stages": tile.get("stages", 3)}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return compiled.asm.get("ptx") or compiled.asm["amdgcn"], compiled


def default(kernel: str) -> dict[str, int]:
    choices: dict[str, dict[str, int]] = json.loads(tiles.path("default").read_text())
    return choices[kernel]


def spilled(compiled: Any, assembly: str) -> int:
    """Bytes of registers that went to memory, per thread."""
    if "cubin" not in compiled.asm:
        return int(re.search(r"\.private_segment_fixed_size: (\d+)", assembly)[1])
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [folder / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def assert_fits(compiled: Any, assembly: str, target: str) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY[target] << 10
    # ptxas keeps a few bytes of stack where it spills nothing.
    assert spilled(compiled, assembly) <= 16


@ahead
@pytest.mark.parametrize("listed", [False, True], ids=["stack", "list"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_gram_compiles(target: str, dtype: str, precision: str, listed: bool) -> None:
    if precision == "fast" and dtype == "fp64":
        precision = "exact"
    fast = precision == "fast"
    tile = default(gram.tile_name(fast, TYPES[dtype]))
    for adjacent in ("stride_rank", "stride_depth"):
        text, compiled = assembly(
            gram.gram_tiles,
            target,
            tile,
            {"source": f"*{dtype}", "table": "*i64", "shares": "*fp64"},
            {
                adjacent: 1,
                "LISTED": listed,
                "UNIT": listed and adjacent == "stride_depth",
                "ALIGNED": listed,
                "FAST": fast,
                "SPLIT": fast and dtype == "fp32" and target in SPLITS,
                "CHUNK": 512,
                "RANKS": tile["ranks"],
                "DEPTH": tile["depth"],
            },
        )
        assert_fits(compiled, text, target)
        if not fast and target in FLOAT64:
            assert FLOAT64[target] in text
        if fast and dtype == "bf16":
            assert re.search(r"(mma|wgmma|tcgen05)[.\w]*bf16|mfma_f32\w*_bf16|kind::f16", text)
        # Factors are read 16 bytes at a time, 8 on gfx942 for tiles that narrow.
        narrow = r"ld\.global\.b16|global_load_(ushort|short)"
        assert not re.search(narrow, text), "elements are loaded one by one"


@ahead
@pytest.mark.parametrize("listed", [False, True], ids=["stack", "list"])
@pytest.mark.parametrize("coefficients", ["fp64", "fp32"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_combine_compiles(target: str, dtype: str, coefficients: str, listed: bool) -> None:
    tile = default("combine")
    tile["stages"] = combine.stages(listed, tile)
    narrow = dtype in ("bf16", "fp16") and coefficients == "fp32" and target != "gfx942"
    text, compiled = assembly(
        combine.product,
        target,
        tile,
        {
            "source": f"*{dtype}",
            "table": "*i64",
            "coefficients": f"*{coefficients}",
            "out": f"*{dtype}",
        },
        {
            "stride_rank": 1,
            "coefficient_column": 1,
            "out_column": 1,
            "LISTED": listed,
            "UNIT": False,
            "ALIGNED": listed,
            "PRECISION": "tf32x3" if narrow else "ieee",
            "DEPTH": tile["depth"],
            "RANKS": tile["ranks"],
            "COLUMNS": tile["columns"],
        },
    )
    assert_fits(compiled, text, target)
    if coefficients == "fp64" and target in FLOAT64:
        assert FLOAT64[target] in text


@ahead
@pytest.mark.parametrize("listed", [False, True], ids=["stack", "list"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_weighted_sum_compiles(target: str, dtype: str, listed: bool) -> None:
    tile = default("weighted_sum")
    text, compiled = assembly(
        weighted_sum.weighted_run,
        target,
        tile,
        {"source": f"*{dtype}", "table": "*i64", "weights": "*fp64", "out": f"*{dtype}"},
        {
            "stride_column": 1,
            "LISTED": listed,
            "ALIGNED": listed,
            "ONE_ROW": True,
            "ELEMENTS": tile["elements"],
        },
    )
    assert_fits(compiled, text, target)
    widest = r"ld\.global\.v(4\.b32|2\.b64)|global_load_dwordx4"
    assert re.search(widest, text), "factors are not read 16 bytes at a time"
