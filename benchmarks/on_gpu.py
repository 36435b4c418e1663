"""The steps of ``on_gpu.sh``: each a process with a limit, its outcome kept in one JSON file.

    build, tests, memcheck, racecheck, measurements, profile

RESULTS_DIR/on_gpu.json has every step's outcome, the machine, and all rows; on_gpu.txt the tables.
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OPERATORS = (
    "gram",
    "combine",
    "weighted_sum",
    "rank",
    "spectrum",
    "surrogate",
    "stacked_svd",
    "flora_na",
)
# Few and small: the sanitizers slow a kernel down by up to a hundred times.
SMALL = "single_element or identity_selects or rounds_once or rank_one_clients"
REHEARSED = "single_element or identity_selects or rounds_once"
_TAIL = 2000
"""Characters of a step's output that are kept."""
_LINES = 2
"""How many kernels of the profile are named."""


@dataclass
class Step:
    """What came of a step."""

    name: str
    outcome: str
    """passed, failed, out of time, absent (its tool is missing) or refused (an earlier step)"""
    seconds: float = 0.0
    said: str = ""
    found: Mapping[str, Any] = field(default_factory=dict)


class Session:
    """Steps one after the other until the time is up."""

    def __init__(self, seconds: float, environment: Mapping[str, str]) -> None:
        self.until = time.monotonic() + seconds
        self.environment = dict(environment)
        self.steps: list[Step] = []

    def run(self, name: str, command: Sequence[str], limit: float, **variables: str) -> Step:
        """Run a command and keep its outcome; a missing program is not a failure."""
        left = min(limit, self.until - time.monotonic())
        if shutil.which(command[0]) is None:
            return self.note(name, "absent", f"{command[0]} is not installed")
        if left <= 0:
            return self.note(name, "out of time")
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                env=self.environment | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=left,
                check=False,
            )
            outcome, said = "passed" if done.returncode == 0 else "failed", done.stdout
        except subprocess.TimeoutExpired as stopped:
            output = stopped.stdout or b""
            said = output if isinstance(output, str) else output.decode(errors="replace")
            outcome = "out of time"
        return self.note(name, outcome, said, time.monotonic() - start)

    def note(self, name: str, outcome: str, said: str = "", seconds: float = 0.0) -> Step:
        """Keep an outcome and say it."""
        step = Step(name, outcome, round(seconds, 1), said)
        self.steps.append(step)
        print(f"{name}: {outcome} ({step.seconds} s)", flush=True)
        return step


def build(session: Session, backend: str) -> None:
    """The library of the backend, unless FEDLORA_LIBRARIES already has it."""
    presets = {"cuda": "cuda", "cuda-emulated": "emulated"}
    if backend not in presets:
        session.note("build", "passed", f"{backend} needs no library")
        return
    library = f"libfedlora_{backend.replace('-', '_')}.so"
    given = session.environment.get("FEDLORA_LIBRARIES")
    if given and (Path(given) / library).is_file():
        session.note("build", "passed", f"{library} was given")
        return
    if backend == "cuda" and shutil.which("nvcc") is None:
        session.note("build", "absent", "nvcc is not installed")
        return
    preset = presets[backend]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    configured = session.run("configure", ["cmake", "--preset", preset, python], 60)
    if configured.outcome == "passed":
        session.run("build", ["cmake", "--build", "--preset", preset], 300)
    for found in Path("build", preset).rglob(library):
        session.environment["FEDLORA_LIBRARIES"] = str(found.parent.resolve())


def tests(session: Session, rehearse: bool) -> Step:
    """The operators' tests on the device."""
    files = [f"python_tests/test_{name}.py" for name in OPERATORS]
    chosen = ["-k", REHEARSED] if rehearse else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen, *files]
    return session.run("tests", command, 180)


def sanitizers(session: Session, backend: str, rehearse: bool) -> None:
    """memcheck and racecheck over small cases of every operator.

    Of the CUDA library's kernels alone, whose mangled names hold its namespace: torch's own would
    take minutes. What the driver answers to calls is left out, since torch probes for functions
    that a driver may lack. Without torch's cache every tensor is an allocation of its own, so that
    what lies beyond it is out of bounds.
    """
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command += ["--report-api-errors", "no"]
        if backend == "cuda":
            command += ["--kernel-name", "kernel_substring=fedlora"]
        command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k"]
        command += [REHEARSED if rehearse else SMALL]
        command += [f"python_tests/test_{name}.py" for name in OPERATORS]
        session.run(tool, command, 75, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def measurements(session: Session, folder: Path, device: str, rehearse: bool) -> dict[str, Any]:
    """Rows beside the peers; their file becomes part of the result."""
    if any(step.name == "tests" and step.outcome != "passed" for step in session.steps):
        session.note("measurements", "refused", "the tests did not pass")
        return {}
    left = max(20.0, min(240.0, session.until - time.monotonic() - 60))
    file = folder / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu_comparisons", str(file)]
    command += ["--device", device, "--seconds", str(left)]
    session.run("measurements", command + ["--tiny"] * rehearse, left + 60)
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return found


PROFILED = """
import torch
from fedlora_kernels import ops
from fedlora_kernels.bench import inputs
from benchmarks.gpu_comparisons import CASES
drawn = inputs.draw(CASES[1], "cuda")
ops.stacked_svd(drawn.b, drawn.a, drawn.scale, 0.9, 64)
torch.cuda.synchronize()
torch.cuda.profiler.start()
ops.stacked_svd(drawn.b, drawn.a, drawn.scale, 0.9, 64)
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


def profile(session: Session, device: str) -> None:
    """Where stacked_svd spends its time: the two heaviest kernels by Nsight Compute."""
    if device != "cuda":
        session.note("profile", "absent", "there is no GPU to profile")
        return
    command = ["ncu", "--csv", "--metrics", ",".join(METRICS), "--profile-from-start", "off"]
    command += ["--clock-control", "none"]  # the device's clocks are not ours to lock
    step = session.run("profile", [*command, sys.executable, "-c", PROFILED], 60)
    step.found = {"heaviest": heaviest(step.said)}


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


def machine() -> dict[str, Any]:
    """What nvidia-smi and nvcc say, where they are there."""
    facts = {}
    for name, command in {
        "gpu": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"],
        "nvcc": ["nvcc", "--version"],
    }.items():
        if shutil.which(command[0]):
            facts[name] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return facts


def main() -> int:
    """Run all steps and write the two files; 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, few tests")
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    backend = os.environ.get("FEDLORA_BACKEND", "cuda")
    interpreted = bool(os.environ.get("TRITON_INTERPRET"))
    device = "cuda" if backend in ("cuda", "triton") and not interpreted else "cpu"
    session = Session(options.seconds, os.environ)

    build(session, backend)
    tests(session, options.rehearse)
    sanitizers(session, backend, options.rehearse)
    found = measurements(session, options.results, device, options.rehearse)
    profile(session, device)

    for step in session.steps:
        step.said = step.said[-_TAIL:]
    whole = {
        "backend": backend,
        "rehearsal": options.rehearse,
        "machine": machine(),
        "steps": [asdict(step) for step in session.steps],
    }
    text = "\n".join(f"{step.name}: {step.outcome} ({step.seconds} s)" for step in session.steps)
    tables = options.results / "rows.txt"
    if tables.is_file():
        text += "\n\n" + tables.read_text(encoding="utf-8")
        tables.unlink()
    (options.results / "on_gpu.txt").write_text(text + "\n", encoding="utf-8")
    (options.results / "on_gpu.json").write_text(json.dumps(whole | found, indent=1) + "\n")
    print(options.results / "on_gpu.txt")
    return int(any(step.outcome in ("failed", "refused") for step in session.steps))


if __name__ == "__main__":
    raise SystemExit(main())
