"""Host: what calls cost beside their kernels, at 224 modules from 8 clients.

    python -m benchmarks.run --suite host --threads 1

The operators on lists are given factors without numbers, of 0 x r or d x 0, so that no kernel has
work. What is left is Python, torch's dispatcher and the binding: reading the list, its checks, the
kernels' table and the results. A round of modules of 16 x 16 is split in the same way, into its
operators and the rest.

Times are the CPU's for this thread (``time.thread_time``), so a busy machine changes them little;
``FEDLORA_BACKEND`` chooses the binding.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

import fedlora_kernels as flk
from benchmarks.stand import overhead
from benchmarks.stand.inputs import Round
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Setting, Study
from benchmarks.suites import aggregate
from fedlora_kernels import ops

MODULES, CLIENTS, RANK, SIZE = 224, 8, 16, 4096
CALLS = 60
ROUNDS = 8
RULES = ("fedit", "florist")
ROUND = Case("host", "module", equal(CLIENTS, 1), modules=MODULES, size=(16, 16))


def calls(modules: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Per operator: how many tensors it is given, and the call."""
    count = modules * CLIENTS

    def tensors(rows: int, columns: int) -> list[torch.Tensor]:
        return [torch.empty(rows, columns, dtype=torch.bfloat16) for _ in range(count)]

    tall, wide = tensors(SIZE, 0), tensors(0, SIZE)
    b, a = tensors(0, RANK), tensors(RANK, 0)
    x = torch.zeros(modules, CLIENTS * RANK, 1, dtype=torch.float64)
    weights = torch.ones(modules, CLIENTS, dtype=torch.float64)
    return {
        "gram_list, B": (count, lambda: ops.gram_list(tall, modules, rows=False)),
        "gram_list, A": (count, lambda: ops.gram_list(wide, modules, rows=True)),
        "combine_list": (2 * count, lambda: ops.combine_list(b, a, x, x.mT)),
        "weighted_sum_list": (count, lambda: ops.weighted_sum_list(a, weights)),
    }


def cpu_seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """CPU time of every call, after one that is not counted."""
    call()
    samples = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        samples.append(time.thread_time() - start)
    return samples


def measure(setting: Setting) -> dict[str, Any]:
    """Operators, then rounds."""
    modules = 4 if setting.tiny else MODULES
    operators = []
    for name, (count, call) in calls(modules).items():
        samples = cpu_seconds(call, 3 if setting.tiny else CALLS)
        row = {"operator": name, "tensors": count, "cpu_seconds": median(samples)}
        setting.console.print(f"{name}: {count} tensors, {1e3 * median(samples):.2f} ms")
        operators.append(row | {"samples": samples})
    clients = aggregate.adapters(Round.draw(replace(ROUND, modules=modules)))
    rounds = []
    for rule in RULES:
        with overhead.operators_timed(time.thread_time) as watch:
            round_ = partial(flk.aggregate, clients, rule=rule)
            samples = cpu_seconds(round_, 2 if setting.tiny else ROUNDS)
        inside = watch.seconds / (len(samples) + 1)
        row = {"rule": rule, "cpu_seconds": median(samples), "operators": inside}
        setting.console.print(
            f"{rule}, a round: {1e3 * median(samples):.2f} ms, {1e3 * inside:.2f} of them operators"
        )
        rounds.append(row | {"samples": samples})
    return {
        "backend": flk.backend(),
        "modules": modules,
        "clients": CLIENTS,
        "operators": operators,
        "rounds": rounds,
        "failed": False,
    }


SUITE = Study("host", measure, published=False)
