"""flows: whole aggregations of adapters in memory beside plain averages, stacks and QR.

    python -m pytest benchmarks/test_flows.py --benchmark-only --benchmark-quiet

prints at its end each call's share of its peer's time.
"""

import pytest

from benchmarks.conftest import Compare
from benchmarks.flows import CASES, RULES, flow
from fedlora_kernels.bench.device import Device
from fedlora_kernels.bench.shapes import Case


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_flow(case: Case, rule: str, device: Device, compare: Compare) -> None:
    compare(flow(case, rule, device.torch_device))
