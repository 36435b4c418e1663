"""Many clients from folders on disk: time, peak anonymous memory, and time after the last arrival.

    TMPDIR=/a/disk python -m benchmarks.run --suite scale --threads 2 --results benchmarks/results

With ``--only`` the parts are those named, by the names in ``PARTS``, and the file has no others.

1. 1,000 clients of rank 16 with 64 modules of 4096 x 4096, bf16: 17 GB of files, R = 16,000. Each
   rule aggregates under a memory limit. The products are compared with the best of their rank.
2. 100 such clients through a Stream: ``result()`` after the last ``add``, beside aggregate.
3. FedIT's report at R = 1600, beside the spectrum of the R x R matrices, which it once needed.
4. Growth with the clients, their rank and the modules.
5. The same round in 1, 2, 4, ... processes of one group, which share the threads out.

The folders are written by benchmarks/stand/clients.py and deleted afterwards. Each measurement is a
process of its own. Memory is the peak of RssAnon beyond what there was before: mapped files are in
the resident set and not in it.
"""

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import fedlora_kernels as flk
from benchmarks.stand import clients
from benchmarks.stand.roofline import Roofline, Work
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Setting, Study, named

RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fedit", {}),
    ("florist", {"energy": 0.9}),
    ("flexlora", {}),
)
MEMORY_LIMIT = 1 << 30
TOLERANCE = 1e-6
"""Of the relative error above the optimum of the rank; results are float32 for this reason."""

MANY = Case("Llama-2-7B", "q_proj", equal(1000, 16), modules=64, dtype=torch.bfloat16)
ARRIVING = replace(MANY, ranks=equal(100, 16))
REPORTED = Case("TinyLlama-1.1B", "q_proj", equal(100, 16), modules=1, dtype=torch.bfloat16)
BASE = replace(MANY, size=(1024, 1024), ranks=equal(32, 16), modules=4)
TINY = replace(MANY, size=(48, 40), ranks=equal(40, 16), modules=2)
SHARED = replace(BASE, modules=16)
"""What several processes share."""
SAMPLED = 2
"""Modules that are compared with the optimum."""


@dataclass(frozen=True)
class Curve:
    """Cases along one axis."""

    axis: str
    cases: tuple[tuple[int, Case], ...]


def curves(base: Case, doublings: int) -> Iterator[Curve]:
    """Against K, r and L, each from an eighth of the base upward."""
    steps = [2**e for e in range(doublings)]
    first = max(1, base.clients // 8)
    ranks = [(first * s, replace(base, ranks=equal(first * s, 16))) for s in steps]
    yield Curve("clients", tuple(ranks))
    yield Curve(
        "rank", tuple((2 * s, replace(base, ranks=equal(base.clients, 2 * s))) for s in steps)
    )
    yield Curve("modules", tuple((s, replace(base, modules=s)) for s in steps))


# ---- in a process of its own -------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[list[int]]:
    """The peak of RssAnon in the block, beyond what there was: one number, there at the end."""
    status = Path("/proc/self/status")

    def anonymous() -> int:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text(encoding="ascii"))
        return int(found[1]) << 10 if found else 0

    start, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def one_shot(folders: Sequence[Path], rule: str, options: dict[str, Any], out: Path) -> Any:
    """Load, aggregate and save: seconds of each, and the peak memory of all."""
    with watched() as peak:
        begin = time.perf_counter()
        adapters = [flk.Adapter.load(folder) for folder in folders]
        loaded = time.perf_counter()
        result = flk.aggregate(
            adapters,
            rule=rule,
            memory_limit=MEMORY_LIMIT,
            scratch=out.parent,
            dtype=torch.float32,
            **options,
        )
        aggregated = time.perf_counter()
        result.adapter.save(out)
        saved = time.perf_counter()
    ranks = [pair.rank for pair in result.adapter.factors.values()]
    return {
        "load_seconds": loaded - begin,
        "aggregate_seconds": aggregated - loaded,
        "save_seconds": saved - aggregated,
        "peak_bytes": peak[0],
        "ranks": [min(ranks), max(ranks)],
    }


def streamed(folders: Sequence[Path], rule: str, options: dict[str, Any], state: Path) -> Any:
    """Every client added: seconds of the adds, of the last one, and of the result after it."""
    stream = flk.Stream(rule, state=state, memory_limit=MEMORY_LIMIT, **options)
    with watched() as peak:
        marks = [time.perf_counter()]
        for folder in folders:
            stream.add(folder)
            marks.append(time.perf_counter())
        stream.result(dtype=torch.float32)
        marks.append(time.perf_counter())
    return {
        "add_seconds": marks[-2] - marks[0],
        "last_add_seconds": marks[-2] - marks[-3],
        "result_seconds": marks[-1] - marks[-2],
        "stream_peak_bytes": peak[0],
    }


def reported(folders: Sequence[Path]) -> Any:
    """FedIT, its report, and the singular values of the R x R matrices: seconds."""
    adapters = [flk.Adapter.load(folder) for folder in folders]
    marks = [time.perf_counter()]
    result = flk.aggregate(adapters, rule="fedit")
    marks.append(time.perf_counter())
    _ = result.report
    marks.append(time.perf_counter())
    sides = [pair for adapter in adapters for pair in adapter.factors.values()]
    gram_b = flk.ops.gram_list([pair.b for pair in sides], 1, rows=False)
    gram_a = flk.ops.gram_list([pair.a for pair in sides], 1, rows=True)
    scale = torch.full(gram_b.shape[:2], clients.SCALING / len(adapters), dtype=torch.float64)
    flk.ops.spectrum(gram_b, gram_a, scale)
    marks.append(time.perf_counter())
    names = ("fedit_seconds", "report_seconds", "full_spectrum_seconds")
    return dict(zip(names, (y - x for x, y in pairwise(marks)), strict=True))


def _with_threads(threads: int, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what the first product allocates once
    return call(*arguments)


def alone(threads: int, call: Callable[..., Any], *arguments: Any) -> Any:
    """The call in a fresh process."""
    with _fresh(1) as pool:
        return pool.submit(_with_threads, threads, call, arguments).result()


def _fresh(count: int) -> ProcessPoolExecutor:
    """So many fresh processes."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.suites.scale"])
    return ProcessPoolExecutor(count, mp_context=context)


def grouped(
    rank: int, processes: int, store: Path, folders: Sequence[Path], rule: str, options: Any
) -> Any:
    """One process of a group: seconds of the aggregation, from files, and its peak memory."""
    from torch import distributed

    where = f"file://{store}"
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=processes)
    distributed.barrier()
    with watched() as peak:
        begin = time.perf_counter()
        flk.aggregate(folders, rule=rule, group=distributed.group.WORLD, **options)
        seconds = time.perf_counter() - begin
    distributed.destroy_process_group()
    return {"seconds": seconds, "peak_bytes": peak[0]}


def in_processes(
    count: int, threads: int, store: Path, folders: Sequence[Path], rule: str, options: Any
) -> dict[str, Any]:
    """A group of so many processes, which share the threads out: the slowest and the largest."""
    each = max(1, threads // count)
    with _fresh(count) as pool:
        given = (count, store, folders, rule, options)
        jobs = [pool.submit(_with_threads, each, grouped, (rank, *given)) for rank in range(count)]
        found = [job.result() for job in jobs]
    return {
        "rule": rule,
        "processes": count,
        "threads_each": each,
        **{key: max(one[key] for one in found) for key in ("seconds", "peak_bytes")},
    }


# ---- correctness and floor ---------------------------------------------------------------------


def above_optimum(folders: Sequence[Path], out: Path, layer: int) -> float:
    """Relative error of a saved result above the best of its rank, by numpy in float64."""
    key = f"base_model.model.{clients.module_name(layer)}"
    names = [f"{key}.lora_{side}.weight" for side in "BA"]

    def product(folder: Path) -> Any:
        tensors = load_file(folder / "adapter_model.safetensors")
        b, a = (tensors[name].double().numpy() for name in names)
        return b, a

    ideal: Any = 0
    for folder in folders:
        b, a = product(folder)
        ideal = ideal + (clients.SCALING / len(folders)) * (b @ a)
    b, a = product(out)  # which has alpha = rank
    total = np.sum(ideal**2)
    found = np.sqrt(np.sum((ideal - b @ a) ** 2) / total)
    small = ideal @ ideal.T if len(ideal) < ideal.shape[1] else ideal.T @ ideal
    tail = np.linalg.eigvalsh(small)[: max(0, len(small) - b.shape[1])]
    return float(found - np.sqrt(max(0.0, tail.sum()) / total))


def floor(case: Case, rule: str, roofline: Roofline) -> float:
    """Seconds: every file read once, and the dense updates with their smaller sides' Gram matrices
    for a product.
    """
    m, n = case.m, case.n
    dense = case.modules * (2.0 * m * n * case.stacked_rank + min(m, n) ** 2 * max(m, n))
    flops = 0.0 if rule == "fedit" else dense
    return Work(clients.folder_bytes(case), flops_64=flops).floor(roofline)


# ---- the study ---------------------------------------------------------------------------------


def measure(setting: Setting) -> dict[str, Any]:
    """The parts that are asked for."""
    chosen = {name: part for name, part in PARTS.items() if named(name, setting.only)}
    if not chosen:
        raise SystemExit(f"scale has these parts: {', '.join(PARTS)}")
    case = TINY if setting.tiny else MANY
    content: dict[str, Any] = {"case": str(case), "memory_limit": MEMORY_LIMIT, "failed": False}
    for name, part in chosen.items():
        content[name] = part(setting)
    if "many" in content:
        gaps = (row.get("above_optimum", 0.0) for row in content["many"]["rows"])
        content["failed"] = any(abs(gap) > TOLERANCE for gap in gaps)
    return content


def many(setting: Setting) -> dict[str, Any]:
    """All clients at once, under each rule."""
    case, threads = TINY if setting.tiny else MANY, setting.device.threads
    rows = []
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        folders = clients.write(where, case)
        for rule, options in RULES:
            out = where / rule
            row = {"rule": rule, **alone(threads, one_shot, folders, rule, options, out)}
            seconds = row["load_seconds"] + row["aggregate_seconds"] + row["save_seconds"]
            row["share_of_floor"] = floor(case, rule, setting.roofline) / seconds
            if rule != "fedit":  # which is no best of its rank
                layers = range(0, case.modules, max(1, case.modules // SAMPLED))
                gaps = [above_optimum(folders, out, layer) for layer in layers]
                row["above_optimum"] = max(gaps, key=abs)
            rows.append(row)
            setting.console.print(row)
    return {
        "clients": case.clients,
        "stacked_rank": case.stacked_rank,
        "file_bytes": clients.folder_bytes(case),
        "rows": rows,
    }


def arrivals(setting: Setting) -> dict[str, Any]:
    """Clients through a Stream, beside aggregate."""
    case, threads = TINY if setting.tiny else ARRIVING, setting.device.threads
    rows = []
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        folders = clients.write(where, case)
        for rule, options in RULES[:2]:
            whole = alone(threads, one_shot, folders, rule, options, where / f"out-{rule}")
            row = {"rule": rule, **whole}
            row |= alone(threads, streamed, folders, rule, options, where / f"state-{rule}")
            row["result_over_aggregate"] = row["result_seconds"] / row["aggregate_seconds"]
            rows.append(row)
            setting.console.print(row)
    return {"case": str(case), "clients": case.clients, "rows": rows}


def report(setting: Setting) -> dict[str, Any]:
    """FedIT's report of one module."""
    case = replace(TINY, modules=1) if setting.tiny else REPORTED
    with tempfile.TemporaryDirectory() as name:
        found = alone(setting.device.threads, reported, clients.write(Path(name), case))
    setting.console.print(found)
    return dict(found)


def growth(setting: Setting) -> list[dict[str, Any]]:
    """FLoRIST along each axis."""
    base, doublings = (TINY, 1) if setting.tiny else (BASE, 6)
    threads, say = setting.device.threads, setting.console.print
    return [walked(curve, threads, say) for curve in curves(base, doublings)]


def processes(setting: Setting) -> dict[str, Any]:
    """One round in several processes."""
    threads, say = setting.device.threads, setting.console.print
    return shared_out(TINY if setting.tiny else SHARED, threads, say)


def walked(curve: Curve, threads: int, say: Callable[[Any], None]) -> dict[str, Any]:
    """One curve: FLoRIST at once and as a stream, at every point."""
    rule, options = RULES[1]
    points = []
    for x, case in curve.cases:
        with tempfile.TemporaryDirectory() as name:
            where = Path(name)
            folders = clients.write(where, case)
            point = {"x": x, "case": str(case), "stacked_rank": case.stacked_rank}
            point |= alone(threads, one_shot, folders, rule, options, where / "out")
            point |= alone(threads, streamed, folders, rule, options, where / "state")
        points.append(point)
        say({curve.axis: x, **point})
    return {"axis": curve.axis, "rule": rule, "points": points}


def shared_out(case: Case, threads: int, say: Callable[[Any], None]) -> dict[str, Any]:
    """One round in one process, in two, and so on, up to one per thread and two at least."""
    points = []
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        folders = clients.write(where, case)
        for rule, options in RULES[:2]:
            count = 1
            while count <= max(2, threads):
                store = where / f"store-{rule}-{count}"
                points.append(in_processes(count, threads, store, folders, rule, options))
                say(points[-1])
                count *= 2
    return {"case": str(case), "clients": case.clients, "points": points}


PARTS: dict[str, Callable[[Setting], Any]] = {
    "many": many,
    "arrivals": arrivals,
    "report": report,
    "growth": growth,
    "processes": processes,
}
SUITE = Study("scale", measure, published=False)
