"""Flower's own processes on this machine: its simulation, and a deployment of two nodes."""

import json
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from flower_processes import deploy
from safetensors.torch import load_file

from integration.__main__ import main
from integration.flower import launch
from integration.settings import from_preset

pytest.importorskip("flwr", reason="needs Flower: the extra flower")

SMALL = {
    "clients": 2,
    "rounds": 2,
    "steps": 2,
    "batch_size": 4,
    "max_tokens": 12,
    "test_size": 20,
    "train_size": 60,
    "shared_per_class": 2,
}
FLAGS = [word for k, v in SMALL.items() for word in (f"--{k.replace('_', '-')}", str(v))]

TOLERANCE = 1e-6
"""Relative: other processes may add in another order. Measured: equal bits."""


def rounds(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal_adapters(one, other):
    one, other = (load_file(out / "adapter_model.safetensors") for out in (one, other))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[key], rtol=0, atol=TOLERANCE * float(tensor.abs().max())
        )


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    assert main(["run", "--rule", "florist", "--out", str(out), *FLAGS]) == 0
    return out


def test_a_simulation_gives_the_adapter_of_the_local_engine(local, tmp_path):
    flags = ["--engine", "flower", "--rule", "florist", "--out", str(tmp_path)]
    assert main(["run", *flags, *FLAGS]) == 0
    assert_equal_adapters(tmp_path, local)
    found = rounds(tmp_path)
    assert [entry["clients"] for entry in found] == [[0, 1], [0, 1]]
    assert all(entry["transfer_ms"] > 0 for entry in found)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_a_deployment_gives_the_adapter_of_the_local_engine(local, tmp_path):
    with ExitStack() as stack:
        address, _ = deploy(stack, tmp_path, 2)
        flags = ["--engine", "flower", "--superlink", address, "--rule", "florist"]
        assert main(["run", *flags, "--out", str(tmp_path / "out"), *FLAGS]) == 0
    assert_equal_adapters(tmp_path / "out", local)


@pytest.mark.slow
def test_a_node_that_is_killed_leaves_its_round_with_the_rest(tmp_path):
    settings = from_preset("quickstart", **(SMALL | {"rules": ("florist",), "rounds": 3}))
    out = tmp_path / "out"
    with ExitStack() as stack:
        address, nodes = deploy(stack, tmp_path, 2)

        def kill_after_the_first_round():
            while not (out / "metrics.jsonl").is_file():
                time.sleep(0.05)
            nodes[1].kill()

        threading.Thread(target=kill_after_the_first_round, daemon=True).start()
        launch.run(settings, out, superlink=address, reply_within=60)
    first, *_, last = rounds(out)
    assert first["clients"] == [0, 1]
    assert last["clients"] == [0]
    assert list(last["lost"]) == ["1"]


def test_a_superlink_that_is_not_there_is_an_error(tmp_path, capsys):
    flags = ["--engine", "flower", "--superlink", "127.0.0.1:1", "--rule", "florist"]
    assert main(["run", *flags, "--out", str(tmp_path), *FLAGS]) == 1
    assert "error: flwr run started no run (exit code" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_on_flower_is_an_error(tmp_path, capsys):
    """Flower's own exit code is 0 then."""
    flags = ["--engine", "flower", "--rule", "florist", "--model", "nothing"]
    assert main(["run", *flags, "--out", str(tmp_path), *FLAGS]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: the run on Flower is finished:failed; its output says why\n"
    assert "model 'nothing' cannot be loaded" in captured.out
