"""The command line: flags reach the settings, wrong ones end with exit code 2 and one line."""

import dataclasses
import json
import sys
import types

import pytest

from integration import __main__ as command_line
from integration.__main__ import main
from integration.settings import Settings, SettingsError, from_preset
from integration.settings.flags import Start


@pytest.fixture
def started(monkeypatch):
    """Record what would run instead of running it."""
    calls = []
    monkeypatch.setattr(command_line, "compare_rules", lambda *call, **_: calls.append(call))
    return calls


def test_flags_reach_the_settings(started, tmp_path):
    flags = "--rules flora,florist --rounds 3 --clients 5 --steps 2 --alpha 0.1 --seed 7"
    more = "--ranks 4 --after merge --energy 0.8 --train-size 100 --test-size 50"
    assert main(["compare", "--out", str(tmp_path), *flags.split(), *more.split()]) == 0
    settings, rules, out, _ = started[0]
    assert [rule.name for rule in rules] == ["flora", "florist"]
    assert out == tmp_path
    assert (settings.rounds, settings.clients, settings.steps) == (3, 5, 2)
    assert (settings.alpha, settings.seed, settings.after) == (0.1, 7, "merge")
    assert settings.ranks == (4,) * 5
    assert settings.options["florist"] == {"energy": 0.8}
    assert (settings.train_size, settings.test_size) == (100, 50)


def test_run_takes_one_rule(started):
    assert main(["run", "--rule", "hetlora", "--ranks", "8,8,4,4"]) == 0
    settings, rules, _, _ = started[0]
    assert [rule.name for rule in rules] == ["hetlora"]
    assert settings.ranks == (8, 8, 4, 4)
    assert settings.clients == 4


def test_unequal_ranks_say_what_is_left_out(started, capsys):
    assert main(["compare", "--ranks", "8,4"]) == 0
    assert [rule.name for rule in started[0][1]] == ["flora", "flexlora", "florist"]
    said = " ".join(capsys.readouterr().out.split())
    for name in ("fedit", "ffa", "fedsa", "flora_na"):
        assert f"left out: {name} needs clients of one rank, found 8,4" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("compare --rules fedit --ranks 8,4", "hetlora"),
        ("compare --rules nothing", "unknown rule 'nothing'; known: fedit"),
        ("compare --rules fedsa --after merge", "fedsa cannot merge"),
        ("compare --after later", "after must be continue or merge, found 'later'"),
        ("compare --preset nothing", "unknown preset 'nothing'; known: "),
        ("compare --ranks 8,8,4 --clients 8", "ranks names 3 ranks for 8 clients"),
        ("compare --ranks 8,x", "ranks must be numbers such as 8,8,4,4, found '8,x'"),
        ("compare --ranks 0", "ranks must be at least 1, found 0"),
        ("compare --rounds 0", "rounds must be at least 1, found 0"),
        ("compare --rounds many", "'many' is not a valid integer"),
        ("compare --alpha 0", "alpha must be above 0, found 0.0"),
        ("compare --alpha nan", "alpha must be above 0, found nan"),
        ("compare --seed -1", "seed must be 0 or more, found -1"),
        ("compare --energy 1.5", "energy must be above 0 and at most 1, found 1.5"),
        ("compare --nothing", "--nothing"),
        ("compare --engine ray", "engine must be local or flower, found 'ray'"),
        ("compare --superlink 127.0.0.1:1", "superlink needs --engine flower"),
        ("run --rule fedit,ffa", "unknown rule 'fedit,ffa'; known: fedit"),
        ("run --rules fedit", "run takes one rule (--rule); compare takes several (--rules)"),
        ("report --out nowhere", "nowhere has no summary.json"),
        ("train", "train"),
    ],
)
def test_wrong_flags_end_with_two_and_one_line(started, capsys, flags, message):
    assert main(flags.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not started


@pytest.mark.parametrize("command", ["compare", "run"])
def test_the_help_has_every_flag(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    settings = {f.name: f.metadata["help"] for f in dataclasses.fields(Settings)}
    started = {f.name: f.metadata["help"] for f in dataclasses.fields(Start)}
    tables = {"options", "task_options", "rank_pattern"}
    hidden = {"rules"} if command == "run" else set()
    for name in (settings.keys() | started) - tables - hidden:
        assert f"--{name.replace('_', '-')} " in said, name
    words = " ".join(said.split())
    assert settings["learning_rate"] in words
    assert started["superlink"] in words
    assert f"[default: runs/{command}]" in words
    assert "--no-resume" not in said


def test_out_must_be_a_folder(started, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["compare", "--out", str(tmp_path / "file")]) == 2
    assert "out must be a folder" in capsys.readouterr().err


def test_a_run_from_the_command_line_prints_its_table(capsys, tmp_path):
    flags = "--rules florist --rounds 1 --clients 2 --steps 1 --train-size 40 --test-size 30"
    assert main(["compare", "--out", str(tmp_path), *flags.split()]) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert said.index("start: accuracy") < said.index("SVD floor") < said.rindex("florist")
    assert f"{summary[0]['accuracy']:.3f}" in said
    before = (tmp_path / "report.html").read_bytes()
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_bytes() == before, "the report depends on its files"


def test_a_client_that_diverges_is_named(capsys, tmp_path):
    flags = "--rounds 1 --clients 2 --steps 3 --train-size 40 --test-size 30 --learning-rate 1e30"
    assert main(["run", "--rule", "florist", "--out", str(tmp_path), *flags.split()]) == 1
    said = capsys.readouterr().err
    assert "client 0, module encoder.layer.0" in said
    assert "are NaN or Inf" in said
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_preset_may_be_a_file(tmp_path):
    path = tmp_path / "own.toml"
    quickstart = command_line.Path(command_line.__file__).parent / "presets/quickstart.toml"
    path.write_text(quickstart.read_text().replace("rounds = ", "rounds = 1 # "))
    assert from_preset(str(path)).rounds == 1
    path.write_text("rounds = 1\nsped = 3\n")
    with pytest.raises(SettingsError, match="unknown settings sped"):
        from_preset(str(path))
    path.write_text("rounds = 1\n")
    with pytest.raises(SettingsError, match="missing settings batch_size, clients, learning_rate"):
        from_preset(str(path))


def test_lm_eval_gets_the_base_and_the_adapter(monkeypatch, tmp_path, capsys):
    """The harness itself is not installed here: what it would be called with is what counts."""
    calls = []

    def simple_evaluate(**options):
        calls.append(options)
        return {"results": {"arc_easy": {"acc,none": 0.5}}}

    fake = types.SimpleNamespace(simple_evaluate=simple_evaluate)
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    adapter = tmp_path / "adapters" / "florist"
    adapter.mkdir(parents=True)
    flags = ["lm-eval", "--out", str(adapter), "--tasks", "arc_easy,mmlu", "--limit", "3"]
    assert main(flags) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err
    (adapter / "adapter_config.json").write_text("{}")
    assert main(flags) == 2
    assert "no settings.json there or above" in capsys.readouterr().err
    settings = {"init": "pretrained", "model": "some/model"}
    (tmp_path / "settings.json").write_text(json.dumps({"settings": settings}))
    assert main(flags) == 0
    assert calls == [
        {
            "model": "hf",
            "model_args": f"pretrained=some/model,peft={adapter}",
            "tasks": ["arc_easy", "mmlu"],
            "limit": 3,
        }
    ]
    assert json.loads((adapter / "lm_eval.json").read_text()) == {"arc_easy": {"acc,none": 0.5}}
    assert "arc_easy" in capsys.readouterr().out


def test_lm_eval_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--out", str(tmp_path), "--tasks", "mmlu"]) == 2
    assert "pip install lm-eval[hf]" in capsys.readouterr().err
