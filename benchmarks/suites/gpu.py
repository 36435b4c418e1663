"""gpu: stages and pipelines on one GPU beside torch's parts and the vendor's eigensolver.

The hard cases come first: R over 472 on cuSOLVER, many modules, too few modules to fill a GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from benchmarks.peers import bmm_eigh, eigh, xsyev_batched
from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison
from benchmarks.stand.peer import variants
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Make, Suite, drawn
from benchmarks.stand.tasks import Eigenproblems
from benchmarks.suites import combine, gram, spectrum, stacked_svd, weighted_sum

CASES = (
    Case("Llama-3-8B", "down_proj", equal(32, 16), modules=8),
    Case("Llama-3-8B", "q_proj", equal(8, 16), modules=224, dtype=torch.bfloat16),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2),
    Case("Llama-3-8B", "q_proj", equal(8, 16), modules=32, dtype=torch.bfloat16),
    Case("Llama-3-8B", "q_proj", equal(8, 16), modules=32),
)
PROFILED = CASES[1]
"""Most of the GPU's time in a round of an 8 billion parameter model: 7 x 32 modules."""
TINY = (Case("TinyLlama-1.1B", "v_proj", equal(2, 3), modules=2, size=(48, 40)),)

DENSE_ELEMENTS = 1 << 20
"""Up to this many elements of an update, peers that form it take part."""


def pipeline(stacks: Stacks) -> Comparison:
    """stacked_svd beside every composition of torch's parts."""
    dense = stacked_svd.ON_UPDATES if stacks.case.m * stacks.case.n <= DENSE_ELEMENTS else ()
    return stacked_svd.compare(stacks, (*stacked_svd.ON_FACTORS, *dense, bmm_eigh.PEER))


def eigenproblems(stacks: Stacks) -> Comparison:
    """torch's eigh beside XsyevBatched: peers alone, for the question which of them to beat."""
    asked = Eigenproblems(stacks)
    others = variants(asked, (eigh.PEER, xsyev_batched.DOUBLE, xsyev_batched.SINGLE))
    return Comparison("eigenproblems", stacks.case, others)


def stages(device: Device) -> Iterator[tuple[str, Callable[[Stacks], Comparison]]]:
    """Everything measured on a case, the open questions first."""
    yield "stacked_svd", pipeline
    yield "spectrum", spectrum.compare
    if device.is_cuda:
        yield "eigenproblems", eigenproblems
    yield "gram", gram.compare
    yield "combine", combine.compare
    yield "weighted_sum", weighted_sum.compare


def on(cases: Sequence[Case]) -> Callable[[Device], Mapping[str, Make]]:
    """All stages of the first case, then of the next."""

    def of(case: Case, compare: Callable[[Stacks], Comparison]) -> Make:
        return lambda where: compare(drawn(case, where))

    return lambda device: {
        f"{name} {case}": of(case, compare) for case in cases for name, compare in stages(device)
    }


SUITE = Suite("gpu", on(CASES), everyday=False, tiny=on(TINY), peers_once_s=0.5, patience_s=20.0)
