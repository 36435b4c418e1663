"""Revision: another commit of this library, built aside and measured in the same run.

    with Revision("HEAD~3", device) as base:
        comparison = base.added("gram", label, comparison)

The commit is checked out into a temporary worktree, installed into a temporary folder and run in a
process of its own, with this checkout's benchmarks. There each of our variants is checked like
here, and timed by that process's own clock when its turn comes; both processes draw equal inputs.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.stand.correctness import Check
from benchmarks.stand.device import Device
from benchmarks.stand.measure import Comparison, Variant

ROOT = Path(__file__).parents[2]

SETTLE_S = 0.05
"""Before and after a call of the other process: OpenBLAS's waiting threads spin for 2^26 cycles,
27 ms at 2.5 GHz, before they leave the cores."""

_TAIL = 2000


class RevisionError(RuntimeError):
    """The other revision cannot be checked out, built or run."""


class Revision:
    """One commit, ready to be measured inside a ``with`` block."""

    def __init__(self, reference: str, device: Device, tiny: bool = False) -> None:
        self.reference, self.device, self.tiny = reference, device, tiny
        self._folder: Path | None = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Revision":
        """Check out, build, start.

        Raises:
            RevisionError: one of the three failed; with what it said.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="fedlora-base-"))
        try:
            installed = self._built(self._folder)
            self._start(installed)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process and remove the worktree."""
        self._close()

    def added(self, suite: str, label: str, comparison: Comparison) -> Comparison:
        """The comparison with this revision's variants behind ours.

        Raises:
            RevisionError: the other process ended.
        """
        asked = {"suite": suite, "label": label, "tiny": self.tiny}
        answer = self._ask({"make": asked})
        ours = [variant for variant in comparison.variants if not variant.source]
        theirs = tuple(self._beside(variant, answer) for variant in ours)
        return replace(comparison, variants=(*comparison.variants, *theirs))

    def _beside(self, ours: Variant, answer: dict[str, Any]) -> Variant:
        def timed() -> tuple[float, Any]:
            if "raised" in answer:
                raise RevisionError(answer["raised"])
            time.sleep(SETTLE_S)
            told = self._ask({"time": ours.name})
            time.sleep(SETTLE_S)
            if "raised" in told:
                raise RevisionError(told["raised"])
            return float(told["seconds"]), told["checks"]

        return Variant(
            f"{ours.name} at {self.reference}",
            lambda: None,
            lambda checks: [Check(**check) for check in checks],
            ours.work,
            f"git {self.reference}",
            timed=timed,
        )

    def _built(self, folder: Path) -> Path:
        tree, installed = folder / "tree", folder / "installed"
        _done(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), self.reference])
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        tools = str(Path(sys.executable).parent)
        path = os.pathsep.join((tools, os.environ.get("PATH", "")))
        _done([*pip, "--target", str(installed), str(tree)], {"PATH": path})
        return installed

    def _start(self, installed: Path) -> None:
        # Without site: an editable installation of this checkout would be found before the other.
        paths = [str(installed), str(ROOT), *(path for path in sys.path if path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("FEDLORA_LIBRARIES", None)
        command = [sys.executable, "-S", "-m", "benchmarks.stand.revision", str(installed)]
        command += [str(self.device.torch_device), str(self.device.threads)]
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=installed.parent,  # the working directory is searched first
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask({})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RevisionError("it is not running")
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RevisionError(f"its process ended with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _close(self) -> None:
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._folder is not None:
            tree = str(self._folder / "tree")
            remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", tree]
            subprocess.run(remove, capture_output=True, check=False)
            shutil.rmtree(self._folder, ignore_errors=True)


def _done(command: Sequence[str], variables: dict[str, str] | None = None) -> None:
    environment = {**os.environ, **(variables or {})}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        raise RevisionError(f"{command[0]} {command[1]}: {(ran.stdout + ran.stderr)[-_TAIL:]}")


class Answering:
    """The other process: makes comparisons with its own library and times one variant at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._variants: dict[str, Variant] = {}
        self._checks: dict[str, list[dict[str, Any]]] = {}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """A line for a line; what raises is told, not raised."""
        try:
            if "make" in question:
                self._make(**question["make"])
                return {}
            return self._time(question["time"]) if "time" in question else {}
        except Exception as problem:  # an older library may lack what the benchmarks call
            return {"raised": f"{type(problem).__name__}: {problem}"}

    def _make(self, suite: str, label: str, tiny: bool) -> None:
        from benchmarks.stand.suite import Suite, found

        self._variants, self._checks = {}, {}
        known = found()[suite]
        assert isinstance(known, Suite)
        made = known.tiny if tiny and known.tiny else known.comparisons
        comparison = made(self.device)[label](self.device)
        self._variants = {item.name: item for item in comparison.variants if not item.source}

    def _time(self, name: str) -> dict[str, Any]:
        variant = self._variants[name]
        if variant.before is not None:
            variant.before()
        seconds, output = self.device.timed(variant.run)
        if name not in self._checks:
            checks = variant.checks(output)
            self._checks[name] = [
                {"quantity": x.quantity, "error": x.error, "tolerance": x.tolerance} for x in checks
            ]
        return {"seconds": seconds, "checks": self._checks[name]}


def main(installed: str, device: str, threads: int, answers: IO[str]) -> None:
    """Answer questions from standard input until it ends."""
    import fedlora_kernels

    if not Path(str(fedlora_kernels.__file__)).is_relative_to(installed):
        raise SystemExit(f"found {fedlora_kernels.__file__}, expected it in {installed}")
    answering = Answering(Device.use(device, threads))
    for line in sys.stdin:
        answers.write(json.dumps(answering.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as channel:  # what libraries print goes elsewhere
        os.dup2(2, 1)
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), channel)
