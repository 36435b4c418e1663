"""The acceptance measurement: two threads, fp32, 4096 x 4096, clients that share A's start.

    python -m benchmarks.run --suite acceptance --threads 2 --results benchmarks/results

1. stacked_svd exact and fast beside three SVDs and QR + QR + core SVD, R = 128 and 512, with few
   and with many ranks kept; PEFT once on one module.
2. FLoRA-NA's solve as a share of its Gram pass, K = 10, r = 16.
3. Peak memory beyond inputs and outputs over one module's stacks, each in a process of its own.
4. ``aggregate(..., rule="florist")`` from PEFT folders on disk: what is spent outside the
   operators, over what reading and writing the same files costs.

Ranks equal to the float64 reference's and an error within 1e-6 of the optimum are checked first.
If a check fails, no time is reported for that variant. Part 4 writes to the folder of temporary
files: TMPDIR names the disk that is measured.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fedlora_kernels as flk
from benchmarks.peers import peft_merge
from benchmarks.stand import correctness, inputs, memory, overhead
from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Round
from benchmarks.stand.measure import Comparison, Row, Run, ratio
from benchmarks.stand.roofline import Roofline
from benchmarks.stand.shapes import NAMES, Case, equal
from benchmarks.stand.suite import Setting, Study
from benchmarks.stand.table import tables
from benchmarks.stand.tasks import ENERGY, MAX_RANK
from benchmarks.suites import aggregate, gram, stacked_svd, surrogate

ROUNDS = {128: 9, 512: 5}
"""Rounds per stacked rank: three SVDs of 16 modules take some 0.5 s and 7 s a round."""

SEED = 11
"""Of twelve tried, the one whose modules keep farthest from the energy threshold (2e-4 of it)."""

FOLDER_ROUNDS = 5
OURS = ("exact", "fast")
_TINY = (96, 96)


@dataclass(frozen=True)
class Extent:
    """How much is measured; the acceptance figures are those of the defaults."""

    modules: int = 16
    files: int = 64
    """modules of the adapters on disk"""
    tiny: bool = False
    """matrices that take no time, to try the script"""


def cases(extent: Extent) -> list[Case]:
    """R = 128 and 512; "shared_start" keeps about 5 ranks at energy 0.9, "drifted" R/4 and more."""
    found = [
        Case("Llama-2-7B", "q_proj", equal(clients, 16), extent.modules, family=family, seed=SEED)
        for clients in (8, 32)
        for family in ("shared_start", "drifted")
    ]
    return [_shrunk(case) for case in found] if extent.tiny else found


def _shrunk(case: Case) -> Case:
    """The same federation on matrices that take no time."""
    return replace(case, size=_TINY, ranks=equal(case.clients // 4 or 1, 4), modules=2)


def decompositions(device: Device, roofline: Roofline, chosen: Sequence[Case]) -> Iterator[Any]:
    """Part 1: rows, ranks and ratios of every case."""
    for case in chosen:
        stacks = inputs.draw(case, device.torch_device)
        comparison = stacked_svd.compare(stacks)
        rows = Run(comparison, device, roofline, rounds=ROUNDS.get(case.stacked_rank, 3)).measured()
        wanted = correctness.expected_ranks(stacks, ENERGY, None)
        kept = correctness.expected_ranks(stacks, ENERGY, MAX_RANK)
        yield (
            rows,
            {
                "case": str(case),
                "stacked_rank": case.stacked_rank,
                "family": case.family,
                "ranks_at_energy": [int(wanted.min()), int(wanted.max())],
                "ranks_kept": [int(kept.min()), int(kept.max())],
                "threshold_gap": correctness.threshold_gap(stacks, ENERGY),
                "times_as_long_as": _ratios(rows),
            },
        )


def merged_by_peft(device: Device, roofline: Roofline, extent: Extent) -> tuple[list[Row], Any]:
    """Part 1, PEFT: add_weighted_adapter forms the dense update; one module, once."""
    case = replace(cases(extent)[0], modules=1)
    drawn = inputs.draw(case, device.torch_device)
    comparison = stacked_svd.compare(drawn, (*stacked_svd.ON_FACTORS, peft_merge.SVD))
    rows = Run(comparison, device, roofline).measured()
    return rows, {"case": str(case), "times_as_long_as": _ratios(rows)}


def _ratios(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """ours -> peer -> how many times as long the peer takes: median over the rounds."""
    samples = {row.variant: row.samples for row in rows}
    return {
        mine: {row.variant: ratio(row.samples, samples[mine]) for row in rows if row.source}
        for mine in OURS
    }


def solve_share(device: Device, roofline: Roofline, extent: Extent) -> tuple[list[Row], Any]:
    """Part 2: the surrogate's solve over both Gram matrices of the same modules."""
    case = Case(
        "Llama-2-7B", "q_proj", equal(10, 16), extent.modules, family="unbalanced", seed=SEED
    )
    if extent.tiny:
        case = replace(case, size=_TINY, ranks=equal(4, 4), modules=2)
    stacks = inputs.draw(case, device.torch_device)
    grams = replace(gram.compare(stacks).variants[0], name="gram")
    comparison = Comparison("flora_na", case, (grams, surrogate.solve(stacks)))
    rows = Run(comparison, device, roofline, rounds=15).measured()
    return rows, {"case": str(case), "solve_over_gram": rows[1].times_first}


def peaks(device: Device, extent: Extent) -> list[dict[str, Any]]:
    """Part 3; the peers at the first case only: their loops hold one module at a time."""
    found = []
    for index, case in enumerate(cases(extent)[: 1 if extent.tiny else None]):
        one_module = (case.m + case.n) * case.stacked_rank * torch.finfo(case.dtype).bits // 8
        for operation in memory.OPERATIONS:
            ours = operation.startswith("stacked_svd")
            if operation == "flora_na" or not (ours or index == 0):
                continue
            measured = memory.peak(operation, case, device.threads)
            if measured is not None:
                found.append(
                    {
                        "case": str(case),
                        "stacked_rank": case.stacked_rank,
                        "family": case.family,
                        "operation": operation,
                        "peak_bytes": measured.peak,
                        "output_bytes": measured.outputs,
                        "one_module_bytes": one_module,
                        "peak_over_one_module": measured.peak / one_module,
                    }
                )
    return found


def from_folders(device: Device, extent: Extent) -> Iterator[dict[str, Any]]:
    """Part 4: 64 modules, 8 clients of rank 16, on disk in fp32 and in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("Llama-2-7B", "q_proj", equal(8, 16), extent.files, dtype, seed=SEED)
        if extent.tiny:
            case = replace(case, size=_TINY, ranks=equal(3, 4), modules=2)
        stacks = inputs.draw(case)
        round_ = Round.of(stacks)
        options = {"rule": "florist", "energy": ENERGY, "weights": stacks.weights.tolist()}
        with tempfile.TemporaryDirectory() as name:
            where = Path(name)
            folders = [where / str(k) for k in range(case.clients)]
            for client, folder in zip(aggregate.adapters(round_), folders, strict=True):
                client.save(folder)
            out = where / "global"
            overhead.aggregate_folders(device, folders, out, **options)
            pairs = aggregate.pairs_of(round_, flk.Adapter.load(out))
            check = correctness.near_optimal(stacks, pairs)[0]
            rounds = [
                {
                    **overhead.aggregate_folders(device, folders, out, **options),
                    **overhead.read_and_write(device, folders, out),
                }
                for _ in range(FOLDER_ROUNDS if check.passed else 0)
            ]
        found: dict[str, Any] = {
            "case": str(case),
            "dtype": NAMES[dtype],
            "clients": case.clients,
            "modules": case.modules,
            "bytes": stacks.nbytes,
            "check": {
                "quantity": check.quantity,
                "error": check.error,
                "tolerance": check.tolerance,
            },
        }
        if rounds:
            found |= {f"{key}_seconds": median(r[key] for r in rounds) for key in rounds[0]}
            found["outside_over_files"] = median(r["outside"] / r["files"] for r in rounds)
        yield found


def measure(setting: Setting) -> dict[str, Any]:
    """All four parts."""
    device, roofline, console = setting.device, setting.roofline, setting.console
    extent = Extent(tiny=setting.tiny)
    rows: list[Row] = []
    summary: dict[str, Any] = {"stacked_svd": []}

    def keep(measured: Sequence[Row], told: Any) -> None:
        rows.extend(measured)
        for shown in tables(measured):
            console.print(shown)
        for row in measured:
            if row.refused:
                console.print(f"no time: {row.variant}: {row.refused}", markup=False)
        console.print(told)

    for measured, told in decompositions(device, roofline, cases(extent)):
        summary["stacked_svd"].append(told)
        keep(measured, told)
    for name, (measured, told) in (
        ("peft", merged_by_peft(device, roofline, extent)),
        ("flora_na", solve_share(device, roofline, extent)),
    ):
        summary[name] = told
        keep(measured, told)
    summary["memory"] = peaks(device, extent)
    summary["folders"] = list(from_folders(device, extent))
    for told in summary["memory"] + summary["folders"]:
        console.print(told)
    failed = any(row.refused and not row.source for row in rows)
    return {"summary": summary, "rows": [row.as_dict() for row in rows], "failed": failed}


SUITE = Study("acceptance", measure)
