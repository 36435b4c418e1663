"""What all suites share: the device, its roofline, and the fixture that measures a comparison."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import flows
from fedlora_kernels.bench import inputs, results
from fedlora_kernels.bench.device import Device
from fedlora_kernels.bench.inputs import Stacks
from fedlora_kernels.bench.measure import Comparison, Row, Run
from fedlora_kernels.bench.roofline import Roofline
from fedlora_kernels.bench.shapes import Case

Compare = Callable[[Comparison], list[Row]]
Drawn = Callable[[Case], Stacks]

_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fedlora")
    group.addoption("--results", type=Path, help="folder to write <device>/<stage>.json to")
    group.addoption("--device", default="cpu", help="torch device to measure on")
    group.addoption("--threads", type=int, default=2, help="CPU threads")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Each flow's share of its peers' time, which pytest-benchmark's table does not show."""
    rows = config.stash.get(_ROWS, [])
    for line in flows.ratios([row for row in rows if row.stage == "flows"]):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    return Device.use(request.config.getoption("--device"), request.config.getoption("--threads"))


@pytest.fixture(scope="module")
def roofline(device: Device) -> Roofline:
    """Measured anew for every suite, in the run that its floors are used in."""
    return Roofline.measure(device)


@pytest.fixture(scope="module")
def collected(
    request: pytest.FixtureRequest, device: Device, roofline: Roofline
) -> Iterator[list[Row]]:
    """The suite's rows, written when its last test is done."""
    rows: list[Row] = []
    yield rows
    request.config.stash.setdefault(_ROWS, []).extend(rows)
    folder = request.config.getoption("--results")
    if folder is not None and rows:
        results.write(folder, device, results.of_rows(rows[0].stage, device, roofline, rows))


@pytest.fixture
def drawn(device: Device) -> Drawn:
    return lambda case: inputs.draw(case, device.torch_device)


@pytest.fixture
def compare(
    benchmark: BenchmarkFixture, device: Device, roofline: Roofline, collected: list[Row]
) -> Compare:
    """Measure with pytest-benchmark: it times the first variant, the others run in between.

    A test fails where an output of this library is wrong; times decide nothing.
    """

    def measured(comparison: Comparison) -> list[Row]:
        run = Run(comparison, device, roofline)
        benchmark.group = comparison.stage
        benchmark.pedantic(run.first, setup=run.others, rounds=run.rounds)
        rows = run.rows()
        collected.extend(rows)
        benchmark.extra_info["share_of_floor"] = rows[0].share_of_floor
        benchmark.extra_info["ratios"] = {row.variant: row.times_first for row in rows[1:]}
        refused = {row.variant: row.refused for row in rows if row.refused and not row.source}
        assert not refused, refused
        return rows

    return measured
