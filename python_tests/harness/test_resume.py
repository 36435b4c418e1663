"""A run killed at any moment and resumed gives the bits of one that was never stopped."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
from multiprocessing import forkserver

import pytest
import torch
from miniature import metrics, miniature, run, timeless
from recorded import a_round

import fedlora_kernels as flk
from integration import files
from integration.rounds import loop, records, state
from integration.settings import SettingsError

RULES = ["florist", "flora", "fedsa", "fedex"]
"""One that continues, one that merges, one that keeps personal parts, one with a residual."""


def settings(**changes):
    """Two rounds, so that the second one reads what the first one left; clients keep AdamW."""
    return miniature(optimizer_state="keep", client_test_size=6, train_size=40, **changes)


@pytest.fixture(scope="module", autouse=True)
def forks():
    """A fork server of these tests; that of the process may have begun without the imports."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["miniature", "forked"])
    with pytest.MonkeyPatch.context() as patch:
        # What is preloaded is looked for there alone, and not finding it is no error.
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setattr(forkserver, "connect_to_new_process", server.connect_to_new_process)
        yield
    server._stop()


def in_a_child(function, *arguments):
    """Run in a process of its own, so that killing it leaves this one alone; returns that one."""
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=as_forked, args=(function, *arguments))
    child.start()
    return child


def as_forked(function, *arguments):
    """Other numbers of threads have other bits."""
    assert "forked" in sys.modules
    assert torch.get_num_threads() == 1
    function(*arguments)


def adapters(out):
    """Every saved tensor, by file and key."""
    found = {}
    for path in sorted(out.rglob("adapter_config.json")):
        if "state" not in path.parts:
            for key, tensor in flk.Adapter.load(path.parent).state_dict().items():
                found[f"{path.parent.relative_to(out)}/{key}"] = tensor
    return found


def assert_same(out, unbroken):
    for rule in RULES:
        assert timeless(metrics(out)[rule]) == timeless(metrics(unbroken)[rule])
    found, expected = adapters(out), adapters(unbroken)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    summaries = [json.loads((x / "summary.json").read_text()) for x in (out, unbroken)]
    for one, other in zip(*summaries, strict=True):
        assert {**one, "aggregation_ms": 0} == {**other, "aggregation_ms": 0}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    run(out, settings(), RULES)
    return out


def resumed(out):
    run(out, settings(), RULES, resume=True)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_write(out, at, cut, resume):
    """Die in the `at`-th state write: `cut` before, half-way, before or after the renaming."""
    write, replace, done = files.write, os.replace, 0

    def deadly(path, content):
        nonlocal done
        if path.suffix == ".pt":
            done += 1
        if path.suffix != ".pt" or done < at:
            write(path, content)
            return
        if cut == "before":
            die()
        if cut == "half-way":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.part").write_bytes(content[: len(content) // 2])
            die()
        if cut == "written":
            files.os.replace = lambda *_: die()
        write(path, content)
        files.os.replace = replace
        die()

    state.files.write = deadly
    run(out, settings(), RULES, resume=resume)


def killed_in_a_line(out, at, part):
    """Die when `part` of the `at`-th line of metrics.jsonl is in the file."""
    append, done = records.Metrics.append, 0

    def deadly(metrics, record):
        nonlocal done
        done += 1
        if done < at:
            append(metrics, record)
            return
        size = metrics._path.stat().st_size if done > 1 else 0
        append(metrics, record)
        with metrics._path.open("r+b") as file:
            file.truncate(size + int(part * (metrics._path.stat().st_size - size)))
        die()

    records.Metrics.append = deadly
    run(out, settings(), RULES)


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_killed_in_a_line_of_the_metrics(unbroken, tmp_path, part):
    """The state is on the disk before the line is: what is missing comes from there."""
    child = in_a_child(killed_in_a_line, tmp_path, 3, part)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = (tmp_path / "metrics.jsonl").read_text()
    assert left.count("\n") == (3 if part == 1 else 2)
    assert left.endswith("\n") == (part != 0.5)
    run(tmp_path, settings(), RULES, resume=True)
    assert_same(tmp_path, unbroken)


@pytest.mark.parametrize("cut", ["before", "half-way", "written", "renamed"])
def test_killed_in_a_state_write(unbroken, tmp_path, cut):
    """In the first rule's first round, then in the third rule's second one, then not at all."""
    for at, resume in ((1, False), (5, True)):
        child = in_a_child(killed_in_a_write, tmp_path, at, cut, resume)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [entry["rule"] for entry in summary] == RULES[:2], "those that had finished"
    run(tmp_path, settings(), RULES, resume=True)
    assert_same(tmp_path, unbroken)
    assert not list(tmp_path.rglob(".*.part")), "a temporary file is left"


def test_killed_at_random_moments(unbroken, tmp_path):
    """Killed after 0.2 to 2 s again and again, until a run comes through."""
    draw = random.Random(0)
    kills = 0
    while True:
        child = in_a_child(resumed, tmp_path)
        child.join(draw.uniform(0.2, 2.0) if kills < 12 else None)
        if child.exitcode is not None:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert child.exitcode == 0
    assert kills > 0
    assert_same(tmp_path, unbroken)


def test_finished_rounds_are_not_trained_again(unbroken, tmp_path, monkeypatch):
    chosen = settings(rules=("florist",))
    run(tmp_path, chosen, ["florist"])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(loop, "write_state", None)  # calling it would raise
    run(tmp_path, chosen, ["florist"], resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_line_of_the_metrics_is_written_once(tmp_path, monkeypatch):
    """Bytes written grow with the rounds, not with their square; the file stays the same one."""
    path, rounds = tmp_path / "metrics.jsonl", [a_round("fedit", n) for n in range(1, 41)]
    lines = [files.to_json(dataclasses.asdict(record)) + "\n" for record in rounds]
    metrics = records.Metrics(tmp_path)
    metrics.append(rounds[0])
    node, written = path.stat().st_ino, []
    monkeypatch.setattr(records.os, "fsync", lambda _: written.append(path.stat().st_size))
    for record in rounds[1:]:
        metrics.append(record)
    assert path.stat().st_ino == node
    assert path.read_text() == "".join(lines)
    ends = [sum(map(len, lines[: n + 1])) for n in range(40)]
    assert written == ends[1:]
    again = records.Metrics(tmp_path)
    for record in rounds[:20]:
        again.append(record)
    assert len(written) == 39, "what is there already is not written again"
    again.append(a_round("flora", 1))
    assert path.read_text().count("\n") == 21, "what follows a line that differs is gone"


def test_resume_without_a_finished_round_starts_anew(tmp_path):
    chosen = settings(rules=("florist",), rounds=1)
    run(tmp_path, chosen, ["florist"], resume=True)
    assert len(metrics(tmp_path)["florist"]) == 1


def test_without_resume_earlier_results_are_gone(tmp_path):
    run(tmp_path, settings(rules=("florist",)), ["florist"])
    (tmp_path / "notes.txt").write_text("mine")
    records.open_folder(tmp_path, settings(rules=("florist",), seed=1), resume=False)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]


def test_other_settings_do_not_go_on(tmp_path):
    chosen = settings(rules=("florist",), rounds=1)
    run(tmp_path, chosen, ["florist"])
    with pytest.raises(SettingsError, match="was begun with seed 0, found 3; resume with the same"):
        run(tmp_path, settings(rules=("florist",), rounds=1, seed=3), ["florist"], resume=True)


def test_another_number_of_threads_is_a_warning(tmp_path):
    run(tmp_path, settings(rules=("florist",), rounds=1), ["florist"])
    path = tmp_path / "settings.json"
    recorded = json.loads(path.read_text())
    assert recorded["threads"] == torch.get_num_threads()
    path.write_text(json.dumps(recorded | {"threads": 64}))
    warnings = records.open_folder(tmp_path, settings(rules=("florist",), rounds=1), resume=True)
    assert len(warnings) == 1
    assert warnings[0].startswith("begun with threads 64, resumed with 1")


def test_a_damaged_state_says_so(tmp_path):
    path = tmp_path / "florist.pt"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(SettingsError, match=r"florist\.pt cannot be read .*without --resume"):
        state.read_state(path)
    torch.save({"format": 0}, path)
    with pytest.raises(SettingsError, match="format 0, expected 2"):
        state.read_state(path)


def test_one_rule_leaves_a_peft_folder(tmp_path):
    """What `run` leaves is the global model: on the base as loaded, it scores what was recorded."""
    from integration.rounds.federation import Federation

    for rule in ("florist", "flora", "fedex"):
        chosen = settings(rules=(rule,))
        summary, _ = run(tmp_path / rule, chosen, [rule])
        score = Federation.build(chosen).evaluate(flk.Adapter.load(tmp_path / rule))
        assert score.loss == pytest.approx(summary[0]["loss"], rel=1e-4)


def test_a_personal_rule_leaves_its_clients(unbroken):
    folder = unbroken / "adapters" / "fedsa"
    whole = flk.Adapter.load(folder)
    for number in (0, 1):
        own = flk.Adapter.load(folder / "clients" / str(number))
        for module, factors in own.factors.items():
            assert torch.equal(factors.a, whole.factors[module].a)
            assert factors.b.any()
            assert not whole.factors[module].b.any()
