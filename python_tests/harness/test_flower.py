"""Flower: the local engine's own bits, whatever the rule; what is sent once; runs resumed."""

import dataclasses
import io
import json
import re
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from integration.__main__ import main
from integration.compare import compare
from integration.rounds.engine import LocalEngine
from integration.rounds.rule import choose
from integration.settings import PRESETS, from_values

pytest.importorskip("flwr", reason="needs Flower: the extra flower")

from flwr.app import RecordDict
from nodes import Nodes, lines, on, take, tiny

from integration.flower.engine import FlowerEngine


@pytest.fixture(autouse=True)
def drawn_elsewhere(monkeypatch):
    """No report of these runs."""
    monkeypatch.setattr("integration.compare.write_report", lambda _: None)


def adapters(out):
    """Every adapter below a folder, by its path."""
    found = sorted(out.rglob("adapter_model.safetensors"))
    return {str(path.relative_to(out)): load_file(path) for path in found}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for path, tensors in one.items():
        assert tensors.keys() == other[path].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other[path][key]), f"{path} {key}"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rules": ("florist", "ffa")}, id="florist, ffa"),
        pytest.param({"rules": ("fedsa",)}, id="fedsa: every client its own B"),
        pytest.param({"rules": ("flora",), "rounds": 3}, id="flora: merged into the nodes' bases"),
        pytest.param({"rules": ("flexlora", "flora"), "ranks": (4, 2, 8)}, id="unequal ranks"),
        pytest.param(
            {"rules": ("fedit", "flora_na"), "optimizer_state": "keep", "rounds": 3},
            id="moments stay on the nodes",
        ),
        pytest.param(
            {"rules": ("flora",), "clients": 6, "participation": 0.5, "rounds": 3, "seeds": 2},
            id="half of the clients a round, two seeds",
        ),
        pytest.param(
            {
                "rules": ("fedit", "ffa"),
                "clients": 2,
                "participation": 0.5,
                "rounds": 3,
                "optimizer_state": "keep",
                "learning_rates": (1e-3, 1e-2),
                "validation_size": 8,
            },
            id="learning rates that are chosen",
        ),
    ],
)
def test_flower_gives_the_bits_of_the_local_engine(tmp_path, changes):
    settings = tiny(**changes)
    expected = take(tmp_path / "local", settings)
    found = take(tmp_path / "flower", settings, on(Nodes(settings.clients), settings))
    assert found == expected
    assert_same_bits(adapters(tmp_path / "flower"), adapters(tmp_path / "local"))


def test_a_merged_update_is_sent_once(tmp_path):
    settings = tiny(rules=("flora",), rounds=3)
    nodes = Nodes(3)
    take(tmp_path, settings, on(nodes, settings))
    sent = [sum("merged/" in key for key in m.content.array_records) for m in nodes.sent]
    assert sent == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_a_node_that_was_started_again_gets_all_merged_updates(tmp_path):
    """Its new node has another id and holds nothing; the round's bits stay the local engine's."""
    settings = tiny(rules=("flora",), rounds=3)

    class Restarted(Nodes):
        def push_messages(self, messages):
            if len(self.sent) == 6 and messages and messages[0].metadata.message_type == "train":
                self.contexts[messages[1].metadata.dst_node_id].state = RecordDict()
            return super().push_messages(messages)

        def get_node_ids(self):
            if len(self.sent) == 3 and len(self.contexts) == 3:
                del self.contexts[self.node(0)]
                self.start(0)
            return super().get_node_ids()

    nodes = Restarted(3)
    found = take(tmp_path / "flower", settings, on(nodes, settings))
    assert [entry["clients"] for entry in found] == [[0, 1, 2], [0, 1, 2], [0, 2]]
    assert found[2]["lost"] == {
        "1": "its node reports: this node holds 0 of the first 1 merged updates; send them all"
    }
    local = take(tmp_path / "local", tiny(rules=("flora",), rounds=3))
    assert found[:2] == local[:2]


def killed_before(last, rule, nodes, settings, out):
    """A run whose server ends between two rounds, before the rule's last one."""

    class Killed(FlowerEngine):
        def train(self, server, number, on_step):
            if number == last and server.rule.name == rule:
                raise KeyboardInterrupt
            return super().train(server, number, on_step)

    with pytest.raises(KeyboardInterrupt):
        take(out, settings, partial(Killed, nodes, settings))


def test_a_run_on_flower_is_resumed(tmp_path):
    """Flower gives the run that goes on new contexts, on nodes that stayed up too."""
    settings = tiny(rules=("flora", "fedsa"), rounds=3)
    take(tmp_path / "unbroken", settings)
    out = tmp_path / "killed"
    killed_before(3, "flora", Nodes(3), settings, out)
    take(out, settings, on(Nodes(3), settings), resume=True)
    assert lines(out) == lines(tmp_path / "unbroken")
    assert_same_bits(adapters(out), adapters(tmp_path / "unbroken"))


@pytest.mark.parametrize("goes_on", ["flower", "local"])
def test_moments_that_ended_with_the_nodes_are_warned_of(tmp_path, goes_on):
    """The rule that was stopped begins with new ones; one that had not begun loses nothing."""
    settings = tiny(rules=("fedit", "ffa"), optimizer_state="keep")
    whole = {line["rule"]: line for line in take(tmp_path / "unbroken", settings)}
    out = tmp_path / "killed"
    killed_before(2, "fedit", Nodes(3), settings, out)
    engine = on(Nodes(3), settings) if goes_on == "flower" else LocalEngine
    console = Console(file=io.StringIO(), width=300)
    resumed = take(out, settings, engine, console, resume=True)
    said = console.file.getvalue()
    assert said.count("warning: ") == 1
    assert "warning: fedit: AdamW's moments ended with Flower's nodes" in said
    last = {line["rule"]: line for line in resumed}
    assert last["ffa"] == whole["ffa"]
    assert last["fedit"]["loss"] != whole["fedit"]["loss"]
    assert last["fedit"]["loss"] == pytest.approx(whole["fedit"]["loss"], rel=0.1)


@pytest.mark.parametrize("first", ["local", "flower"])
def test_a_run_with_a_rule_left_out_goes_on_on_the_other_engine(
    tmp_path, monkeypatch, capsys, first
):
    """Both engines record the preset's settings, with the rule that is left out."""
    rules = "flora,fedit,florist"  # fedit needs clients of one rank
    preset = tmp_path / "preset.toml"
    text = (PRESETS / "quickstart.toml").read_text()
    text = re.sub(r"(?m)^rules = .*", f"rules = {rules.split(',')}", text)
    preset.write_text(text)
    small = {"rounds": 2, "ranks": "4,2,8", "steps": 2, "batch-size": 4, "max-tokens": 12}
    small |= {"test-size": 20, "train-size": 60, "shared-per-class": 2}
    flags = ["--preset", str(preset), *(f"--{name}={value}" for name, value in small.items())]

    def on_nodes(settings, out, *, resume, superlink):
        """What the ServerApp does with the settings that reach it."""
        settings = from_values(json.loads(json.dumps(dataclasses.asdict(settings))), "sent")
        chosen, _ = choose(settings, explicit=False)
        engine = on(Nodes(settings.clients), settings)
        compare(settings, chosen, out, Console(quiet=True), resume=resume, engine=engine)

    monkeypatch.setattr("integration.flower.launch.run", on_nodes)

    def go(engine, out, *more):
        return main(["compare", *flags, "--engine", engine, "--out", str(out), *more])

    assert go("local", tmp_path / "unbroken") == 0
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        train = {"local": LocalEngine, "flower": FlowerEngine}[first].train

        def killed(engine, server, number, on_step):
            if number == 2 and server.rule.name == "florist":
                raise SystemExit
            return train(engine, server, number, on_step)

        patch.setattr({"local": LocalEngine, "flower": FlowerEngine}[first], "train", killed)
        with pytest.raises(SystemExit):
            go(first, out)
    assert go({"local": "flower", "flower": "local"}[first], out, "--resume") == 0
    assert lines(out) == lines(tmp_path / "unbroken")
    assert {line["rule"] for line in lines(out)} == {"flora", "florist"}
    assert_same_bits(adapters(out), adapters(tmp_path / "unbroken"))
