"""rank: the ranks of a whole model's modules beside numpy's cumulative sums module by module."""

import pytest

from benchmarks.conftest import Compare
from fedlora_kernels.bench import inputs, stages
from fedlora_kernels.bench.device import Device
from fedlora_kernels.bench.shapes import Case, equal

CASES = (
    Case("Llama-2-7B", "q_proj", equal(3, 8), modules=224),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=224),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=224),
    Case("Llama-2-7B", "q_proj", equal(32, 64), modules=224),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rank(case: Case, device: Device, compare: Compare) -> None:
    compare(stages.rank(case, inputs.spectra(case).to(device.torch_device)))
