"""rank: the ranks of a whole model's modules beside numpy's cumulative sums module by module."""

from collections.abc import Mapping

from benchmarks.peers import numpy_selection
from benchmarks.stand import inputs
from benchmarks.stand.device import Device
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import variants
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Make, Suite
from benchmarks.stand.tasks import ENERGY, MAX_RANK, Selection
from fedlora_kernels import ops

CASES = (
    Case("Llama-2-7B", "q_proj", equal(3, 8), modules=224),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=224),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=224),
    Case("Llama-2-7B", "q_proj", equal(32, 64), modules=224),
)


def compare(case: Case, device: Device) -> Comparison:
    """Ranks of all modules from their singular values."""
    task = Selection(inputs.spectra(case).to(device.torch_device))
    ours = Variant(
        "select_rank",
        lambda: ops.select_rank(task.sigma, task.total, ENERGY, MAX_RANK),
        lambda found: task.checks(found.tolist()),
        task.work,
    )
    return Comparison("rank", case, (ours, *variants(task, (numpy_selection.PEER,))))


def comparisons(device: Device) -> Mapping[str, Make]:
    """One per case."""

    def of(case: Case) -> Make:
        return lambda where: compare(case, where)

    return {str(case): of(case) for case in CASES}


SUITE = Suite("rank", comparisons)
