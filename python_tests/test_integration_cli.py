"""The command line: flags reach the settings, wrong ones end with exit code 2 and one line."""

import json

import pytest

from integration import __main__ as command_line
from integration.__main__ import main
from integration.settings import SettingsError, from_preset


@pytest.fixture
def started(monkeypatch):
    """Record what would run instead of running it."""
    calls = []
    monkeypatch.setattr(command_line, "compare_rules", lambda *call: calls.append(call))
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
        ("compare --preset nothing", "unknown preset 'nothing'; known: quickstart"),
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
        ("run", "--rule"),
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


def test_a_preset_may_be_a_file(tmp_path):
    path = tmp_path / "own.toml"
    quickstart = command_line.Path(command_line.__file__).parent / "presets/quickstart.toml"
    path.write_text(quickstart.read_text().replace("rounds = ", "rounds = 1 # "))
    assert from_preset(str(path)).rounds == 1
    path.write_text("rounds = 1\nsped = 3\n")
    with pytest.raises(SettingsError, match="unknown settings sped"):
        from_preset(str(path))
    path.write_text("rounds = 1\n")
    with pytest.raises(SettingsError, match="missing settings alpha, batch_size, clients"):
        from_preset(str(path))
