"""The first run on a GPU, rehearsed without one: limits, killed processes, rows, resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import on_gpu
from benchmarks import run as program
from benchmarks.stand import measure
from benchmarks.stand import sheet as sheets
from benchmarks.stand.correctness import Check
from benchmarks.stand.device import Device
from benchmarks.stand.measure import Comparison, Run, Variant
from benchmarks.stand.roofline import Roofline, Work
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.sheet import Sheet
from benchmarks.stand.suite import Make, Suite
from benchmarks.suites import gpu

CPU = Device.use("cpu", 1)
ROOF = Roofline(1e9, 1e9, 2e9)
CASE = Case("test", "module", equal(2, 3), modules=1, size=(9, 8))


# steps


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
print("begun", flush=True)
time.sleep(float(sys.argv[2]))
"""
"""A launcher as compute-sanitizer and ncu are: it waits for a process that works for long."""


def running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def gone(processes: list[int]) -> bool:
    """Whether they all end within a second: the kernel takes a moment to end a killed process."""
    for _ in range(100):
        if not any(running(process) for process in processes):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> on_gpu.Session:
    monkeypatch.setattr(on_gpu, "_LAST_WORDS_S", 0.2)
    return on_gpu.Session(60, os.environ, tmp_path)


@pytest.mark.parametrize(
    ("sleeps", "limit", "outcome"), [(600, 5, "out of time"), (0, 60, "passed")]
)
def test_no_process_outlives_its_step(
    session: on_gpu.Session, tmp_path: Path, sleeps: float, limit: float, outcome: str
) -> None:
    command = [sys.executable, "-c", STUBBORN, str(tmp_path / "processes"), str(sleeps)]
    step = session.run("stubborn", command, limit)
    assert (step.outcome, step.said) == (outcome, "begun\n")
    assert gone([int(word) for word in (tmp_path / "processes").read_text().split()])


def test_no_process_outlives_a_run_that_is_ended(tmp_path: Path) -> None:
    """As the outer limit of a lent machine ends it."""
    program = (
        "import os, pathlib, signal, sys\n"
        "from benchmarks import on_gpu\n"
        "signal.signal(signal.SIGTERM, on_gpu.ended)\n"
        "session = on_gpu.Session(600, os.environ, pathlib.Path(sys.argv[1]).parent)\n"
        "session.run('stubborn', [sys.executable, '-c', sys.argv[2], sys.argv[1], '600'], 600)\n"
    )
    file = tmp_path / "processes"
    started = subprocess.Popen(
        [sys.executable, "-c", program, str(file), STUBBORN],
        cwd=Path(on_gpu.__file__).parents[1],
        stdout=subprocess.DEVNULL,
    )
    while not (file.is_file() and len(file.read_text().split()) == 2):
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == 128 + signal.SIGTERM
    assert gone([int(word) for word in file.read_text().split()])


def test_a_step_that_hears_the_interrupt_has_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "_LAST_WORDS_S", 20)
    code = (
        "import time\nprint('begun', flush=True)\n"
        "try: time.sleep(600)\nexcept KeyboardInterrupt: print('goodbye')"
    )
    session = on_gpu.Session(60, os.environ, tmp_path)
    step = session.run("polite", [sys.executable, "-c", code], 3)
    assert (step.outcome, step.said) == ("out of time", "begun\ngoodbye\n")


def test_a_tool_that_is_missing_is_absent(session: on_gpu.Session) -> None:
    assert session.run("tool", ["no-such-program"], 5).outcome == "absent"
    session.until = 0.0
    assert session.run("late", [sys.executable, "-c", ""], 5).outcome == "out of time"


OUTPUT = """
python_tests/test_rank.py::test_a[cuda-x] PASSED [ 10%]
[gw1] [ 20%] PASSED python_tests/test_gram.py::test_b[cuda-two words]
[gw0] [ 30%] FAILED python_tests/test_gram.py::test_c[cuda]
python_tests/test_rank.py::test_d ERROR [ 40%]
FAILED python_tests/test_gram.py::test_c[cuda] - AssertionError: Gram matrix: PASSED nothing
"""


def test_verdicts_of_pytest() -> None:
    failed = ["python_tests/test_gram.py::test_c[cuda]", "python_tests/test_rank.py::test_d"]
    assert on_gpu.verdicts(OUTPUT) == {"passed": 2, "failed": failed}


def wish(folder: Path) -> on_gpu.Wish:
    return on_gpu.Wish(folder, "cuda", "cpu", rehearse=True, alone=True)


@pytest.mark.parametrize(
    ("outcome", "failed", "measured"),
    [("passed", [], True), ("out of time", [], True), ("out of time", ["x"], False),
     ("failed", [], False)],
)  # fmt: skip
def test_only_failures_refuse_the_measurements(
    session: on_gpu.Session,
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
    failed: list[str],
    measured: bool,
) -> None:
    session.note("tests", outcome).found = {"passed": 3, "failed": failed}
    asked: list[str] = []
    monkeypatch.setattr(
        session, "run", lambda name, *_: asked.append(name) or session.note(name, "passed")
    )
    on_gpu.measure(session, wish(session.folder))
    assert asked == ["measurements"] * measured
    assert session.steps[-1].outcome == ("passed" if measured else "refused")


def test_measuring_goes_on_in_another_process(
    session: on_gpu.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash and after an error that stays with its process, and never without end."""
    statuses, resumed = iter([-11, on_gpu.ANOTHER_PROCESS, 0]), []

    def run(name: str, command: list[str], *_: Any) -> on_gpu.Step:
        resumed.append("--resume" in command)
        (session.folder / "rows.json").write_text("{}")
        status = next(statuses)
        return session.note(name, "failed" if status else "passed", status=status)

    monkeypatch.setattr(session, "run", run)
    on_gpu.measure(session, wish(session.folder))
    assert resumed == [False, True, True]
    assert on_gpu.ANOTHER_PROCESS == program.ANOTHER_PROCESS


@pytest.mark.parametrize(
    ("program", "arguments", "backend", "says"),
    [
        (["-c", on_gpu.LOADS], ["cpu"], "composed", "composed cpu"),
        (["-c", on_gpu.PROFILED], ["cpu"], "composed", ""),
        (["-c", on_gpu.TUNED], [], "triton", "combine {"),
        (on_gpu.TUNER, [], "composed", "tiles are measured on a GPU"),
    ],
    ids=["loads", "profiled", "tuned", "tuner"],
)
def test_programs_of_the_steps_run(
    program: list[str], arguments: list[str], backend: str, says: str
) -> None:
    """What they import is where they look for it."""
    environment = os.environ | {"FEDLORA_BACKEND": backend, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=Path(on_gpu.__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == int(program is on_gpu.TUNER), done.stderr
    assert says in done.stdout + done.stderr


def test_one_architecture_for_one_device() -> None:
    assert on_gpu.architecture("9.0") == ["-DCMAKE_CUDA_ARCHITECTURES=90a-real"]
    assert on_gpu.architecture("8.0") == ["-DCMAKE_CUDA_ARCHITECTURES=80-real"]
    assert on_gpu.architecture("12.0") == ["-DCMAKE_CUDA_ARCHITECTURES=120-real"]
    assert on_gpu.architecture("") == on_gpu.architecture("[N/A]") == []


def test_phases_of_several_calls_are_collected(tmp_path: Path) -> None:
    facts = {"backend": "cuda", "rehearsal": False, "machine": {"commit": "1", "gpu": "H"}}

    def call(name: str, outcome: str, facts: dict[str, Any]) -> dict[str, Any]:
        session = on_gpu.Session(60, os.environ, tmp_path)
        session.note(name, outcome)
        on_gpu.write(session, wish(tmp_path), facts)
        found = json.loads((tmp_path / "on_gpu.json").read_text())
        return {step["name"]: step["outcome"] for step in found["steps"]}

    assert call("tests", "failed", facts) == {"tests": "failed"}
    (tmp_path / "rows.json").write_text('{"rows": [1]}')
    (tmp_path / "rows.txt").write_text("a table\n")
    assert call("measurements", "passed", facts) == {"tests": "failed", "measurements": "passed"}
    for file in ("rows.json", "rows.txt"):
        (tmp_path / file).unlink()
    assert call("tests", "passed", facts) == {"measurements": "passed", "tests": "passed"}
    assert json.loads((tmp_path / "on_gpu.json").read_text())["rows"] == [1]
    assert (tmp_path / "on_gpu.txt").read_text().endswith("a table\n")
    other = {**facts, "machine": {"commit": "2", "gpu": "H"}}
    assert call("profile", "passed", other) == {"profile": "passed"}


# rows


def variant(name: str, run: Callable[[], Any], source: str = "") -> Variant:
    return Variant(name, run, lambda _: [Check("error", 0.0, 1e-6)], Work(1e3), source)


def broken() -> None:
    raise RuntimeError("no convergence")


def slow() -> None:
    for _ in range(1000):
        time.sleep(0.01)


def test_a_peer_that_raises_or_is_slow_loses_its_own_row_only() -> None:
    calls: list[int] = []

    def later() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("only now")

    variants = (
        variant("ours", lambda: None),
        variant("broken", broken, "peer"),
        variant("slow", slow, "peer"),
        variant("breaks later", later, "peer"),
        variant("good", lambda: None, "peer"),
    )
    before = signal.getsignal(signal.SIGALRM)
    rows = Run(Comparison("gram", CASE, variants), CPU, ROOF, patience_s=0.2).measured()
    assert {row.variant: row.refused for row in rows} == {
        "ours": "",
        "broken": "RuntimeError: no convergence",
        "slow": "TimeoutError: not finished after 0.2 s",
        "breaks later": "RuntimeError: only now",
        "good": "",
    }
    assert [row.seconds is not None for row in rows] == [True, False, False, False, True]
    assert rows[4].times_first is not None
    assert signal.getsignal(signal.SIGALRM) is before


def test_our_own_failure_is_a_row_too() -> None:
    variants = (variant("ours", broken), variant("peer", lambda: None, "peer"))
    ours, peer = Run(Comparison("gram", CASE, variants), CPU, ROOF, rounds=1).measured()
    assert ours.refused == "RuntimeError: no convergence"
    assert peer.seconds is not None
    assert peer.times_first is None


def test_a_slow_peer_runs_once_and_ours_repeatedly() -> None:
    calls = {"ours": 0, "peer": 0}

    def run(name: str) -> None:
        calls[name] += 1
        time.sleep(0.02)

    variants = (
        variant("ours", lambda: run("ours")),
        variant("peer", lambda: run("peer"), "peer"),
    )
    rows = Run(Comparison("gram", CASE, variants), CPU, ROOF, peers_once_s=0.01).measured()
    assert calls["peer"] == 1
    assert calls["ours"] > measure.ROUNDS[0]
    assert rows[1].note == "measured once"


@pytest.fixture
def sheet(tmp_path: Path) -> Sheet:
    return Sheet("gpu", CPU, ROOF, tmp_path / "rows.json", tmp_path / "rows.txt")


def measured(chosen: dict[str, Make], sheet: Sheet, left: float = 60) -> bool:
    suite = Suite("gpu", lambda _: chosen, patience_s=20)
    return sheets.measure(suite, chosen, sheet, time.monotonic() + left)


def written(sheet: Sheet) -> dict[str, Any]:
    assert sheet.file is not None
    found: dict[str, Any] = json.loads(sheet.file.read_text(encoding="utf-8"))
    return found


def test_rows_are_written_as_they_are_made(
    sheet: Sheet,
) -> None:
    """What is in the file while the last peer runs is there if that one never comes back."""
    seen: list[tuple[list[tuple[str, bool]], str]] = []

    def look() -> None:
        found = written(sheet)
        rows = [(row["variant"], row["seconds"] is not None) for row in found["rows"]]
        seen.append((rows, found["begun"]))

    variants = (
        variant("ours", lambda: None),
        variant("broken", broken, "peer"),
        variant("last", look, "peer"),
    )
    assert measured({f"gram {CASE}": lambda _: Comparison("gram", CASE, variants)}, sheet)
    assert seen[0] == ([("ours", True), ("broken", False)], f"gram {CASE}")
    found = written(sheet)
    assert [row["variant"] for row in found["rows"]] == ["ours", "broken", "last"]
    assert (found["finished"], found["begun"]) == ([f"gram {CASE}"], "")
    assert sheet.file is not None
    text = sheet.file.with_suffix(".txt").read_text(encoding="utf-8")
    assert "no time: gram test module" in text
    assert "broken: RuntimeError: no convergence" in text.replace("\n", " ")
    assert list(sheet.file.parent.glob("*new*")) == []


def test_another_process_goes_on_after_the_comparison_that_ended_the_first(
    sheet: Sheet,
) -> None:
    ran: list[str] = []

    def comparison(name: str, ends: bool = False) -> tuple[str, Make]:
        def compare(_: Any) -> Comparison:
            ran.append(name)
            if ends:
                raise KeyboardInterrupt
            return Comparison(name, CASE, (variant("ours", lambda: None),))

        return f"{name} {CASE}", compare

    compared = dict([comparison("gram"), comparison("spectrum", ends=True), comparison("combine")])
    with pytest.raises(KeyboardInterrupt):
        measured(compared, sheet)
    assert sheet.file is not None
    resumed = Sheet.resumed(sheet.file, CPU)
    assert measured(compared, resumed)
    assert ran == ["gram", "spectrum", "combine"]
    found = written(resumed)
    assert [row["stage"] for row in found["rows"]] == ["gram", "combine"]
    assert found["left_out"] == {f"spectrum {CASE}": "the process ended during it"}
    assert found["roofline"] == written(sheet)["roofline"]


def test_a_device_that_stops_answering_asks_for_another_process(
    sheet: Sheet, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: dict[str, Make] = {
        f"{name} {CASE}": lambda _: Comparison("gram", CASE, (variant("ours", broken),))
        for name in ("gram", "combine")
    }
    monkeypatch.setattr(sheets, "answers", lambda _: False)
    assert not measured(compared, sheet)
    assert written(sheet)["finished"] == [f"gram {CASE}"]


def test_what_comes_too_late_is_named(sheet: Sheet) -> None:
    assert measured(dict(gpu.SUITE.comparisons(CPU)), sheet, left=-1)
    reasons = set(written(sheet)["left_out"].values())
    assert reasons == {"out of time"}


def test_the_hard_cases_come_first() -> None:
    first, second, third, *_ = gpu.CASES
    assert (first.stacked_rank, second.modules, third.modules) == (512, 224, 2)
    cuda = replace(CPU, torch_device=torch.device("cuda"))
    names = list(gpu.SUITE.comparisons(cuda))
    assert names[:3] == [f"{name} {first}" for name in ("stacked_svd", "spectrum", "eigenproblems")]
