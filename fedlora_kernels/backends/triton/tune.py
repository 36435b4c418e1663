"""Choose tiles on the present GPU.

    python -m fedlora_kernels.backends.triton.tune [FILE] [--continue]

Every candidate runs the same few shapes, stacked, in bfloat16 and float32; the one with the
smallest geometric mean of times is taken. A candidate that does not compile, does not fit or gives
a wrong result is left out and said. The choices go to ``tiles/<device name>.json`` or to FILE,
after every kernel; with ``--continue`` the kernels that are in it already are not measured again.
"""

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fedlora_kernels.backends.triton import combine, device, gram, tiles, weighted_sum
from fedlora_kernels.backends.triton.runtime import interpreted, serves
from fedlora_kernels.backends.triton.tiles import Tile

Run = Callable[[], Tensor]
Timer = Callable[[Run], float]

# Between the rounding of float32 sums and any mistake.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shape:
    """A round of one kind of module: L modules, stacked rank R, long side d, rank p, K clients."""

    modules: int
    ranks: int
    depth: int
    columns: int
    clients: int


# Attention and MLP projections of a 7 to 8 billion parameter model, 8 and 32 clients of rank 16.
SHAPES = (Shape(32, 128, 4096, 64, 8), Shape(8, 512, 14336, 64, 32))

CANDIDATES: dict[str, tuple[Tile, ...]] = {}


def _candidates(**values: tuple[int, ...]) -> tuple[Tile, ...]:
    return tuple(dict(zip(values, choice, strict=True)) for choice in product(*values.values()))


for _kernel, _depths in (
    ("gram_exact", (16, 32, 64)),
    ("gram_fast", (32, 64, 128)),
    ("gram_fast_float32", (16, 32, 64)),
):
    CANDIDATES[_kernel] = _candidates(
        ranks=(32, 64, 128), depth=_depths, programs=(4,), warps=(4, 8), stages=(2, 3)
    )
CANDIDATES["combine"] = _candidates(
    depth=(32, 64, 128), ranks=(16, 32), columns=(32, 64), warps=(4, 8), stages=(2, 3)
)
CANDIDATES["weighted_sum"] = _candidates(elements=(512, 1024, 2048, 4096), warps=(4, 8))


def workloads(kernel: str, where: torch.device, shapes: tuple[Shape, ...]) -> list[tuple[Run, Run]]:
    """What a kernel is measured on: runs of it, each with the same result from torch in float64."""
    dtypes = {"gram_fast": (torch.bfloat16,), "gram_fast_float32": (torch.float32,)}
    return [
        _workload(kernel, shape, dtype, where)
        for shape in shapes
        for dtype in dtypes.get(kernel, (torch.bfloat16, torch.float32))
    ]


def _workload(
    kernel: str, shape: Shape, dtype: torch.dtype, where: torch.device
) -> tuple[Run, Run]:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=where, dtype=torch.float64)

    a = normal(shape.modules, shape.ranks, shape.depth).to(dtype)
    if kernel.startswith("gram"):
        precision = "exact" if kernel == "gram_exact" else "fast"
        return lambda: gram.gram(a, True, precision), lambda: a.double() @ a.double().mT
    if kernel == "combine":
        x = normal(shape.modules, shape.ranks, shape.columns)
        b = a.mT.contiguous()
        return lambda: combine.combine(b, a, x, x.mT)[1], lambda: x.mT @ a.double()
    stacked = a.unflatten(1, (shape.clients, -1))
    weights = normal(shape.modules, shape.clients)
    return (
        lambda: weighted_sum.weighted_sum(stacked, weights),
        lambda: torch.einsum("lk...,lk->l...", stacked.double(), weights),
    )


def fastest(
    kernel: str,
    timer: Timer,
    where: torch.device,
    candidates: tuple[Tile, ...],
    shapes: tuple[Shape, ...] = SHAPES,
) -> Tile:
    """The candidate with the smallest geometric mean of times.

    Raises:
        RuntimeError: none of them works on this device.
    """
    work = [(run, expected()) for run, expected in workloads(kernel, where, shapes)]
    found: list[tuple[float, int]] = []
    for index, tile in enumerate(candidates):
        with tiles.trying(kernel, tile):
            try:
                times = [_checked(run, expected, timer) for run, expected in work]
            except (RuntimeError, triton.TritonError) as problem:
                reason = str(problem).strip().partition("\n")[0]
                print(f"{kernel} {tile}: left out, {reason}", file=sys.stderr)
                continue
        found.append((math.prod(times) ** (1 / len(times)), index))
    if not found:
        raise RuntimeError(f"no candidate of {kernel} works on this device")
    return candidates[min(found)[1]]


def _checked(run: Run, expected: Tensor, timer: Timer) -> float:
    """The time of a run, whose result is right: to _TOLERANCE and one rounding to its dtype."""
    result = run()
    error = float((result.double() - expected).norm() / expected.norm())
    allowed = _TOLERANCE + torch.finfo(result.dtype).eps
    if not error <= allowed:
        raise RuntimeError(f"relative error {error:.1e}, allowed {allowed:.1e}")
    return timer(run)


def chosen(
    timer: Timer,
    where: torch.device,
    shapes: tuple[Shape, ...] = SHAPES,
    known: Collection[str] = (),
) -> Iterator[tuple[str, Tile]]:
    """Every kernel's fastest candidate, as they are found; not those of ``known`` kernels."""
    for kernel, candidates in CANDIDATES.items():
        if kernel in known:
            continue
        yield kernel, fastest(kernel, timer, where, candidates, shapes)


def main(arguments: list[str]) -> None:
    """Measure and write.

    Raises:
        SystemExit: there is no GPU to measure.
    """
    able, reason = serves()
    if not able or interpreted():
        raise SystemExit(f"tiles are measured on a GPU: {reason}")
    where = torch.device("cuda" if torch.cuda.is_available() else "xpu", 0)
    files = [argument for argument in arguments if argument != "--continue"]
    out = Path(files[0]) if files else tiles.path(device.name(where))
    source = f"measured on {device.name(where)}, torch {torch.__version__}, {reason}"
    choices: dict[str, Any] = {"source": source}
    if "--continue" in arguments and out.is_file():
        choices |= json.loads(out.read_text())
    for kernel, tile in chosen(triton.testing.do_bench, where, known=choices):
        print(kernel, tile, flush=True)
        choices[kernel] = tile
        write(out, choices)
    print(out)


def write(out: Path, choices: Mapping[str, Any]) -> None:
    """A kernel a line, written as a whole."""
    lines = ",\n".join(
        f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in choices.items()
    )
    new = out.with_name(f"{out.name}.new")
    new.write_text(f"{{\n{lines}\n}}\n")
    new.replace(out)


if __name__ == "__main__":
    main(sys.argv[1:])
