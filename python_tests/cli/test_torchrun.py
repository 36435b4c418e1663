"""`torchrun -m fedlora_kernels aggregate`: one result, told once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from federation import draw, write_client
from safetensors.torch import load_file

SIZES = {f"layers.{i}.q": (24, 17) for i in range(5)}
COMMAND = ("-m", "fedlora_kernels", "aggregate")


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=120,
    )


def torchrun(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return run(folder, *start, *COMMAND, *arguments)


def test_two_processes_write_what_one_does_and_one_of_them_speaks(tmp_path: Path) -> None:
    for k, client in enumerate(draw(sizes=SIZES).drawn):
        write_client(tmp_path / str(k), client)
    arguments = ("0", "1", "2", "--rule", "florist", "--energy", "0.9")
    expected = run(tmp_path, *COMMAND, *arguments, "--out", "alone")
    result = torchrun(tmp_path, *arguments, "--out", "together", "--memory-limit", "1kB")
    assert (expected.returncode, result.returncode) == (0, 0), result.stderr
    shown, wanted = (
        re.sub(r"\d+\.\d+ s; written to \w+", "", x.stdout) for x in (result, expected)
    )
    assert shown == wanted
    told = [line for line in result.stderr.splitlines() if "modules" in line]
    assert told == [f"{done} of 2 modules" for done in (1, 2)]  # those of the first process
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("together", "alone")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("report.json", "adapter_config.json"):
        assert (tmp_path / "together" / name).read_text() == (tmp_path / "alone" / name).read_text()


def test_bad_input_is_told_once(tmp_path: Path) -> None:
    for k, client in enumerate(draw(sizes=SIZES).drawn):
        if k == 1:
            client["layers.3.q"].a[0, 0] = torch.nan
        write_client(tmp_path / str(k), client)
    result = torchrun(tmp_path, "0", "1", "2", "--rule", "florist", "--out", "out")
    assert result.returncode != 0
    told = [line for line in result.stderr.splitlines() if line.startswith("fedlora aggregate:")]
    assert len(told) == 1, result.stderr
    assert "client 1 (1), module layers.3.q: A holds NaN" in told[0]
    assert not (tmp_path / "out").exists()
