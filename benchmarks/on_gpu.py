"""The steps of ``on_gpu.sh``: each a process with a limit, its outcome kept in one JSON file.

    phase       steps
    build       configure, build (before every other phase)
    tests       loads, tests
    measure     measurements
    profile     profile
    sanitize    memcheck, synccheck, racecheck
    tune        tune (only when asked for)
    finetune    finetune (only when asked for)

RESULTS_DIR/on_gpu.json has every step's outcome, the machine, and all rows; on_gpu.txt the tables;
STEP.log what a step printed. All are written as soon as there is something to write. A step is a
session of processes of its own, which is killed as a whole when the step ends.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OPERATORS = (
    # Those whose kernels depend most on the stacked rank first.
    "spectrum",
    "stacked_svd",
    "gram",
    "combine",
    "weighted_sum",
    "surrogate",
    "flora_na",
    "rank",
)
SMALL = "single_element or identity_selects or rounds_once or rank_one_clients"
"""Few and small: the sanitizers slow a kernel down by up to a hundred times."""
LARGE = "test_large_ranks and independent and (R169 or R237 or R337)"
"""The kernels of a cluster of blocks, with their shared memory, and L in global memory."""
REHEARSED = "single_element or identity_selects or rounds_once or (independent and R65 and thin)"
SANITIZERS = {
    "memcheck": f"({SMALL}) or ({LARGE})",
    "synccheck": LARGE,
    "racecheck": SMALL,
}
PROCESSES = 16
"""Most of the tests' processes: each has a CUDA context and its inputs in the GPU's memory."""
ANOTHER_PROCESS = 75
"""benchmarks.run's exit status after which a new process can go on."""
_TAIL = 2000
"""Characters of a step's output that are kept in the JSON file."""
_LINES = 2
"""How many kernels of the profile are named."""
_LAST_WORDS_S = 5.0
"""What a step has to say goodbye after an interrupt, before it is killed."""


@dataclass
class Step:
    """What came of a step."""

    name: str
    outcome: str
    """passed, failed, out of time, absent (its tool is missing) or refused (an earlier step)"""
    seconds: float = 0.0
    said: str = ""
    status: int | None = None
    found: Mapping[str, Any] = field(default_factory=dict)


class Session:
    """Steps one after the other until the time is up."""

    def __init__(self, seconds: float, environment: Mapping[str, str], folder: Path) -> None:
        self.until = time.monotonic() + seconds
        self.environment = dict(environment)
        self.folder = folder
        self.steps: list[Step] = []
        self.kept: Callable[[], None] = lambda: None
        """called whenever a step has ended"""

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return self.until - time.monotonic()

    def run(self, name: str, command: Sequence[str], limit: float, **variables: str) -> Step:
        """Run a command and keep its outcome; a missing program is not a failure.

        Its processes are a session of their own. At the limit they are interrupted, and killed
        when they have had time for last words; none outlives the step.
        """
        if shutil.which(command[0]) is None:
            return self.note(name, "absent", f"{command[0]} is not installed")
        limit = min(limit, self.left)
        if limit <= 0:
            return self.note(name, "out of time")
        start = time.monotonic()
        log = self.folder / f"{name}.log"
        again = any(step.name == name for step in self.steps)
        with log.open("ab" if again else "wb") as output:
            started = subprocess.Popen(
                command,
                env=self.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                started.wait(limit)
                outcome = "passed" if started.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                outcome = "out of time"
                signalled(started.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(_LAST_WORDS_S)
            finally:
                signalled(started.pid, signal.SIGKILL)
                started.wait()
        said = log.read_text(encoding="utf-8", errors="replace")
        return self.note(name, outcome, said, time.monotonic() - start, started.returncode)

    def note(
        self,
        name: str,
        outcome: str,
        said: str = "",
        seconds: float = 0.0,
        status: int | None = None,
    ) -> Step:
        """Keep an outcome and say it."""
        step = Step(name, outcome, round(seconds, 1), said, status)
        self.steps.append(step)
        print(f"{name}: {outcome} ({step.seconds} s)", flush=True)
        self.kept()
        return step


def signalled(group: int, number: int) -> None:
    """Send a signal to all processes of a group that are still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


@dataclass(frozen=True)
class Wish:
    """What was asked for."""

    folder: Path
    backend: str
    device: str
    rehearse: bool
    alone: bool
    """one phase, which then has all the time"""


def build(session: Session, wish: Wish) -> None:
    """The library of the backend, unless FEDLORA_LIBRARIES already has it."""
    presets = {"cuda": "cuda", "cuda-emulated": "emulated"}
    if wish.backend not in presets:
        session.note("build", "passed", f"{wish.backend} needs no library")
        return
    library = f"libfedlora_{wish.backend.replace('-', '_')}.so"
    given = session.environment.get("FEDLORA_LIBRARIES")
    if given and (Path(given) / library).is_file():
        session.note("build", "passed", f"{library} was given")
        return
    if wish.backend == "cuda" and shutil.which("nvcc") is None:
        session.note("build", "absent", "nvcc is not installed")
        return
    preset = presets[wish.backend]
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFEDLORA_WERROR=OFF"]
    if wish.backend == "cuda":
        options += architecture(capability())
    else:
        options += ["-DFEDLORA_TESTS=OFF"]
    configured = session.run("configure", ["cmake", "--preset", preset, *options], 60)
    if configured.outcome == "passed":
        target = library.removeprefix("lib").removesuffix(".so")
        command = ["cmake", "--build", "--preset", preset, "--target", target]
        session.run("build", command, 300)
    for found in Path("build", preset).rglob(library):
        session.environment["FEDLORA_LIBRARIES"] = str(found.parent.resolve())


def capability() -> str:
    """The present GPU's compute capability, such as 9.0, from nvidia-smi; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def architecture(found: str) -> list[str]:
    """CMake's option for one GPU: real code for it alone, a third of the default's compile time."""
    if not re.fullmatch(r"\d+\.\d", found):
        return []
    number = found.replace(".", "")
    return [f"-DCMAKE_CUDA_ARCHITECTURES={'90a' if number == '90' else number}-real"]


LOADS = """
import sys
import torch
import fedlora_kernels as flk
from fedlora_kernels import ops, reference
device = sys.argv[1]
torch.manual_seed(0)
b, a = torch.randn(2, 37, 20), torch.randn(2, 20, 53)
scale = torch.rand(2, 20, dtype=torch.float64) + 0.5
gram = ops.gram(b.to(device), False), ops.gram(a.to(device), True)
sigma, _, left, right, _ = ops.spectrum(*gram, scale.to(device))
expected = reference.spectrum(reference.gram(b, False), reference.gram(a, True), scale)[0]
pair = ops.combine(b.to(device), a.to(device), left, right)
update = (b.double() * scale[:, None]) @ a.double()
errors = {
    "singular values": (sigma.cpu() - expected).abs().max() / expected.max(),
    "update": (pair[0].cpu().double() @ pair[1].cpu().double() - update).norm() / update.norm(),
}
print(flk.backend(), device, {name: f"{error:.1e}" for name, error in errors.items()})
assert errors["singular values"] < 1e-12, errors
assert errors["update"] < 1e-6, errors
"""
"""Whether it loads and computes at all: known within seconds, before the tests."""


def pytest(chosen: str, names: Sequence[str], *, parallel: bool) -> list[str]:
    """The command for operators' tests, in parallel processes where pytest-xdist is there."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "--tb=short"]
    if parallel and find_spec("xdist") is not None:
        processes = min(PROCESSES, len(os.sched_getaffinity(0)))
        command += ["-n", str(processes), "--dist", "worksteal"]
    if chosen:
        command += ["-k", chosen]
    return command + [f"python_tests/ops/test_{name}.py" for name in names]


def tests(session: Session, wish: Wish) -> None:
    """Whether it computes at all, then the operators' tests; alone, the slow ones too."""
    loads = session.run("loads", [sys.executable, "-c", LOADS, wish.device], 60)
    if loads.outcome == "failed":
        session.note("tests", "refused", "the operators do not load or compute")
        return
    command = pytest(REHEARSED if wish.rehearse else "", OPERATORS, parallel=True)
    if not wish.alone:
        command += ["-m", "not slow"]
    limit = session.left if wish.alone else 240
    step = session.run("tests", command, limit, OMP_NUM_THREADS="1")
    log = session.folder / "tests.log"
    if log.is_file():
        step.found = verdicts(log.read_text(encoding="utf-8", errors="replace"))
        print(f"tests: {step.found['passed']} passed, {len(step.found['failed'])} failed")
        session.kept()


def verdicts(output: str) -> dict[str, Any]:
    """How many tests passed and which failed, from what pytest -vv prints test by test."""
    found: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set()}
    for line in output.splitlines():
        names = re.findall(r"python_tests/\S+::\S.*?(?= (?:PASSED|FAILED|ERROR)|$)", line)
        word = re.search(r"\b(PASSED|FAILED|ERROR)\b", line)
        if names and word:
            found[word[1]].add(names[0].partition(" - ")[0].strip())
    return {"passed": len(found["PASSED"]), "failed": sorted(found["FAILED"] | found["ERROR"])}


def measure(session: Session, wish: Wish) -> None:
    """Rows beside the peers, by as many processes as it takes.

    Tests that fail in the same call refuse them; tests that only ran out of time do not.
    """
    broken = [
        step.name
        for step in session.steps
        if step.name in ("loads", "tests")
        and (step.outcome == "failed" or step.found.get("failed"))
    ]
    if broken:
        session.note("measurements", "refused", f"failed: {', '.join(broken)}")
        return
    file = wish.folder / "rows.json"
    for old in (file, file.with_suffix(".txt")):
        old.unlink(missing_ok=True)
    until = time.monotonic() + (session.left if wish.alone else min(240.0, session.left - 60))
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "gpu", "--file", str(file)]
    command += ["--device", wish.device, *["--tiny"] * wish.rehearse]
    while (left := until - time.monotonic()) > 0 or not file.is_file():
        # Half a minute of it for the comparison that runs when its time is up.
        seconds = str(max(20.0, left - 30))
        step = session.run("measurements", [*command, "--seconds", seconds], max(left, 30.0))
        died = step.status is not None and (step.status < 0 or step.status == ANOTHER_PROCESS)
        if step.outcome != "failed" or not died or not file.is_file():
            return
        command += ["--resume"] * ("--resume" not in command)


PROFILED = """
import sys
import torch
from fedlora_kernels import ops
from benchmarks.stand import inputs
from benchmarks.suites.gpu import PROFILED, TINY
device = sys.argv[1]
drawn = inputs.draw(PROFILED if device == "cuda" else TINY[0], device)
ops.stacked_svd(drawn.b, drawn.a, drawn.scale, 0.9, 64)
if device == "cuda":
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
ops.stacked_svd(drawn.b, drawn.a, drawn.scale, 0.9, 64)
if device == "cuda":
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
"""
"""Only the second call is profiled: drawing the inputs launches more kernels than it."""
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


def profile(session: Session, wish: Wish) -> None:
    """Where stacked_svd spends its time: the two heaviest kernels by Nsight Compute."""
    program = [sys.executable, "-c", PROFILED, wish.device]
    if wish.device != "cuda":
        if not wish.rehearse:
            session.note("profile", "absent", "there is no GPU to profile")
            return
        session.run("profile", program, 60)
        return
    command = ["ncu", "--csv", "--metrics", ",".join(METRICS), "--profile-from-start", "off"]
    command += ["--clock-control", "none"]  # the device's clocks are not ours to lock
    step = session.run("profile", [*command, *program], session.left if wish.alone else 60)
    step.found = {"heaviest": heaviest(step.said)}
    session.kept()


def heaviest(output: str) -> list[dict[str, Any]]:
    """The kernels with the largest sums of time in ncu's CSV, metrics averaged over launches."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    totals: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        name, metric = row.get("Kernel Name"), row.get("Metric Name")
        value = re.sub(r"[^\d.eE+-]", "", row.get("Metric Value") or "")
        if name and metric and value:
            totals.setdefault(name, {}).setdefault(metric, []).append(float(value))
    time_of = METRICS[0]
    names = sorted(totals, key=lambda name: -sum(totals[name].get(time_of, [])))[:_LINES]
    return [
        {"kernel": name, "launches": len(totals[name].get(time_of, []))}
        | {metric: sum(values) / len(values) for metric, values in totals[name].items()}
        for name in names
    ]


def sanitize(session: Session, wish: Wish) -> None:
    """compute-sanitizer over small cases of every operator and over the kernels of large ranks.

    Of the CUDA library's kernels alone, whose mangled names hold its namespace: torch's own would
    take minutes. What the driver answers to calls is left out, since torch probes for functions
    that a driver may lack. Without torch's cache every tensor is an allocation of its own, so that
    what lies beyond it is out of bounds. A rehearsal without the tool runs the same tests plainly.
    """
    for index, (tool, chosen) in enumerate(SANITIZERS.items()):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command += ["--report-api-errors", "no"]
        if wish.backend == "cuda":
            command += ["--kernel-name", "kernel_substring=fedlora"]
        if wish.rehearse:
            chosen = f"({chosen}) and not full and not R237 and not R337"  # seconds each, emulated
            command = command if shutil.which(command[0]) else []
        names = OPERATORS if SMALL in chosen else ("spectrum",)
        command += pytest(chosen, names, parallel=False)
        limit = session.left / (len(SANITIZERS) - index) if wish.alone else 75
        session.run(tool, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


TUNED = """
import torch
from fedlora_kernels.backends.triton import tune
shapes = (tune.Shape(1, 12, 70, 5, 3),)
for kernel in ("weighted_sum", "combine"):
    few = tune.CANDIDATES[kernel][:2]
    print(kernel, tune.fastest(kernel, lambda run: 1.0, torch.device("cpu"), few, shapes))
"""
"""A rehearsal of the tuner: two candidates of two kernels, interpreted, on a clock that stands."""
TUNER = ["-m", "fedlora_kernels.backends.triton.tune"]


def tune(session: Session, wish: Wish) -> None:
    """Tiles of the Triton kernels for this GPU, in RESULTS_DIR/tiles.json.

    The tuner writes after every kernel and goes on with what the file lacks.
    """
    if wish.rehearse:
        command = [sys.executable, "-c", TUNED]
        session.run("tune", command, 120, FEDLORA_BACKEND="triton", TRITON_INTERPRET="1")
        return
    command = [sys.executable, *TUNER, str(wish.folder / "tiles.json"), "--continue"]
    session.run("tune", command, session.left, FEDLORA_BACKEND="triton")


FINETUNING = ("click", "peft", "rich", "transformers")
"""Packages that the harness imports."""


def finetune(session: Session, wish: Wish) -> None:
    """Rounds of fine-tuning under every rule, in RESULTS_DIR/finetune; goes on where it stopped."""
    missing = [name for name in FINETUNING if find_spec(name) is None]
    if missing:
        session.note("finetune", "absent", f"not installed: {', '.join(missing)}")
        return
    out = wish.folder / "finetune"
    command = [sys.executable, "-m", "integration", "compare", "--preset", "gpu-quickstart"]
    command += ["--out", str(out), *["--tiny"] * wish.rehearse, *["--resume"] * out.is_dir()]
    session.run("finetune", command, session.left)


PHASES: dict[str, Callable[[Session, Wish], None]] = {
    "tests": tests,
    "measure": measure,
    "profile": profile,
    "sanitize": sanitize,
    "tune": tune,
    "finetune": finetune,
}
TOGETHER = ("tests", "measure", "profile", "sanitize")
"""Without --only; the sanitizers have what is left."""


def machine() -> dict[str, Any]:
    """The commit, and what nvidia-smi and nvcc say, where they are there."""
    facts = {}
    if commit := os.environ.get("FEDLORA_COMMIT"):
        facts["commit"] = commit
    for name, command in {
        "commit": ["git", "rev-parse", "HEAD"],
        "gpu": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"],
        "nvcc": ["nvcc", "--version"],
    }.items():
        if name not in facts and shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                facts[name] = done.stdout.strip()
    return facts


def write(session: Session, wish: Wish, facts: Mapping[str, Any]) -> None:
    """Both files, with the steps of earlier calls that this one did not repeat."""
    file = wish.folder / "on_gpu.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(earlier.get(key) != value for key, value in facts.items()):
        earlier = {}
    again = {step.name for step in session.steps}
    steps = [step for step in earlier.get("steps", ()) if step["name"] not in again]
    steps += [asdict(step) | {"said": step.said[-_TAIL:]} for step in session.steps]
    rows, tables = wish.folder / "rows.json", wish.folder / "rows.txt"
    found = json.loads(rows.read_text(encoding="utf-8")) if rows.is_file() else {}
    lines = tables.read_text(encoding="utf-8").splitlines() if tables.is_file() else None
    whole: dict[str, Any] = {**earlier, **found, **facts, "steps": steps}
    if lines is not None:
        whole["tables"] = lines
    replace(file, json.dumps(whole, indent=1) + "\n")
    text = [f"{step['name']}: {step['outcome']} ({step['seconds']} s)" for step in steps]
    replace(wish.folder / "on_gpu.txt", "\n".join([*text, "", *whole.get("tables", ())]) + "\n")


def replace(file: Path, text: str) -> None:
    """Write a file that is whole at any moment: under another name first."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def ended(number: int, frame: object) -> None:
    """Whoever ends this process ends the step that runs."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases and write the two files; 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", choices=PHASES, help="one phase, which has all the time")
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, few tests")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGHUP, ended)
    backend = os.environ.get("FEDLORA_BACKEND", "cuda")
    interpreted = bool(os.environ.get("TRITON_INTERPRET"))
    device = "cuda" if backend in ("cuda", "triton") and not interpreted else "cpu"
    folder = options.results.resolve()
    session = Session(options.seconds, os.environ, folder)
    wish = Wish(folder, backend, device, options.rehearse, options.only is not None)
    facts = {"backend": backend, "rehearsal": options.rehearse, "machine": machine()}
    session.kept = lambda: write(session, wish, facts)

    build(session, wish)
    for phase in (options.only,) if options.only else TOGETHER:
        PHASES[phase](session, wish)
    session.kept()
    for merged in ("rows.json", "rows.txt"):
        (folder / merged).unlink(missing_ok=True)
    print(folder / "on_gpu.txt")
    return int(any(step.outcome in ("failed", "refused") for step in session.steps))


if __name__ == "__main__":
    raise SystemExit(main())
