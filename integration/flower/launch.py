"""A run on Flower from this machine: a SuperLink, one `flwr run`, and how it ended.

Without an address the SuperLink is started here and simulates a node for every client (Ray); with
one the run goes to a SuperLink that is already up, whose nodes are the clients.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from integration.settings import Settings, SettingsError

APP = Path(__file__).parent / "app"
CHECKOUT = Path(__file__).parents[2]

UP_WITHIN = 60.0
"""Seconds that a SuperLink may take to open its port."""

CONNECTION = "fedlora"


class RunError(RuntimeError):
    """A run that Flower could not start, or that failed there; the message is one line."""


def run(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    superlink: str | None = None,
    reply_within: float = 3600.0,
) -> None:
    """Run the settings' rules on Flower; the files of the run are in `out` afterwards.

    `superlink` is the address of a SuperLink without TLS ("127.0.0.1:8000"); `out` is then a folder
    of its machine. Raises SettingsError without the package, RunError where the run failed.
    """
    if find_spec("flwr") is None:
        raise SettingsError("engine flower needs Flower: pip install 'fedlora_kernels[flower]'")
    home = out.resolve() / "flower"
    home.mkdir(parents=True, exist_ok=True)
    environment = _environment(home)
    values = {
        "settings": json.dumps(dataclasses.asdict(settings), allow_nan=False),
        "out": str(out.resolve()),
        "resume": resume,
        "reply-within": reply_within,
    }
    toml = "".join(
        f"{name} = {json.dumps(value, allow_nan=False)}\n" for name, value in values.items()
    )
    (home / "run.toml").write_text(toml, encoding="utf-8")
    with _superlink(home, environment, superlink) as address:
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n',
            encoding="utf-8",
        )
        command = ["run", str(APP), CONNECTION, "--stream", "--run-config", str(home / "run.toml")]
        if superlink is None:
            command += ["--federation-config", _simulation(settings)]
        _require_success(_run(command, environment), environment)


@contextmanager
def _superlink(home: Path, environment: dict[str, str], address: str | None) -> Iterator[str]:
    """The address of a SuperLink; one that is started here ends with the block."""
    if address is not None:
        yield address
        return
    port = _free_port()
    with (home / "superlink.log").open("w") as log:
        process = subprocess.Popen(
            [
                _program("flower-superlink"),
                "--insecure",
                "--simulation",
                "--disable-runtime-dependency-installation",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for(process, port, home / "superlink.log")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _simulation(settings: Settings) -> str:
    """A node per client; as many train at a time as there are processors."""
    return f"num-supernodes={settings.clients} client-resources-num-cpus=1" + (
        " client-resources-num-gpus=1.0" if _on_gpu(settings) else ""
    )


def _on_gpu(settings: Settings) -> bool:
    return settings.device != "cpu" and torch.cuda.is_available()


def _run(command: list[str], environment: dict[str, str]) -> str:
    """`flwr run ...`, its output passed on; the run's number."""
    number = ""
    with subprocess.Popen(
        [_program("flwr"), *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"started run (\d+)", line):
                number = found[1]
    if process.returncode or not number:
        raise RunError(f"flwr run started no run (exit code {process.returncode})")
    return number


def _require_success(number: str, environment: dict[str, str]) -> None:
    """Raise where the run failed: `flwr run --stream` ends with 0 also then."""
    listed = subprocess.run(
        [_program("flwr"), "list", CONNECTION, "--run-id", number, "--format", "json"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    runs: list[dict[str, Any]] = json.loads(listed)["runs"]
    status = runs[0]["status"] if runs else "not listed"
    if status != "finished:completed":
        raise RunError(f"the run on Flower is {status}; its output says why")


def _environment(home: Path) -> dict[str, str]:
    """Flower's programs on the PATH, this checkout importable, nothing sent anywhere."""
    here = os.environ
    programs = str(Path(sys.executable).parent)
    paths = [str(CHECKOUT), *filter(None, here.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **here,
        "PATH": os.pathsep.join([programs, here.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(paths),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + UP_WITHIN
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    last = log.read_text(encoding="utf-8").splitlines()[-3:]
    raise RunError(f"the SuperLink did not open port {port}: {' '.join(last)}")
