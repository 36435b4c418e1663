"""What all suites share under pytest: options, and the fixture that measures one comparison."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.stand import results
from benchmarks.stand.device import Device
from benchmarks.stand.measure import Row, Run
from benchmarks.stand.roofline import Roofline
from benchmarks.stand.suite import Suite, found

Compare = Callable[[Suite, str], list[Row]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fedlora")
    group.addoption("--results", type=Path, help="folder to write <device>/<suite>.json to")
    group.addoption("--device", default="cpu", help="torch device to measure on")
    group.addoption("--threads", type=int, default=2, help="CPU threads")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per comparison of the everyday suites."""
    if "label" in metafunc.fixturenames:
        device = _device(metafunc.config)
        chosen = [
            pytest.param(suite, label, id=f"{suite.name}: {label}")
            for suite in found().values()
            if isinstance(suite, Suite) and suite.everyday
            for label in suite.comparisons(device)
        ]
        metafunc.parametrize(("suite", "label"), chosen)


def _device(config: pytest.Config) -> Device:
    return Device.use(config.getoption("--device"), config.getoption("--threads"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    return _device(request.config)


@pytest.fixture(scope="session")
def collected(
    request: pytest.FixtureRequest, device: Device
) -> Iterator[dict[str, tuple[Roofline, list[Row]]]]:
    """Suite -> the roofline of its run and its rows, written when all is done."""
    suites: dict[str, tuple[Roofline, list[Row]]] = {}
    yield suites
    folder = request.config.getoption("--results")
    for name, (roofline, rows) in suites.items() if folder is not None else ():
        results.write(folder, device, results.of_rows(name, device, roofline, rows))


@pytest.fixture
def compare(
    benchmark: BenchmarkFixture,
    device: Device,
    collected: dict[str, tuple[Roofline, list[Row]]],
) -> Compare:
    """Measure with pytest-benchmark: it times the first variant, the others run in between.

    A test fails where an output of this library is wrong; times decide nothing.
    """

    def measured(suite: Suite, label: str) -> list[Row]:
        if suite.name not in collected:
            collected[suite.name] = (Roofline.measure(device), [])
        roofline, kept = collected[suite.name]
        run = Run(suite.comparisons(device)[label](device), device, roofline)
        benchmark.group = suite.name
        benchmark.pedantic(run.first, setup=run.others, rounds=run.rounds)
        rows = run.rows()
        kept.extend(rows)
        benchmark.extra_info["share_of_floor"] = rows[0].share_of_floor
        benchmark.extra_info["ratios"] = {row.variant: row.times_first for row in rows[1:]}
        refused = {row.variant: row.refused for row in rows if row.refused and not row.source}
        assert not refused, refused
        return rows

    return measured
