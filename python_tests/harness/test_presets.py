"""Presets: each is planned without weights or data, and each runs in miniature."""

import json
import re

import pytest

from integration import __main__ as command_line
from integration import compare as compare_module
from integration.__main__ import main
from integration.plan import plan
from integration.rounds.evaluate import Score
from integration.rounds.records import write_settings
from integration.settings import PRESETS, SettingsError, from_preset
from integration.tasks import TASKS
from integration.tasks.glue import SUBSETS
from integration.tiny import miniature

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))

PARAMETERS = {  # as the models' cards and `num_parameters` of the loaded models say
    "arithmetic": 3_049_920,
    "fedsa-glue-roberta-large": 355_362_819,
    "fedsa-gsm8k-llama3-8b": 8_030_261_248,
    "flexlora-hetero": 1_100_048_384,
    "flora-tinyllama": 1_100_048_384,
    "florana-glue-roberta-large": 355_362_819,
    "florana-gsm8k-llama2-7b": 6_738_415_616,
    "florist-artifact-100": 1_100_048_384,
    "florist-llama7b-wizard": 6_738_415_616,
    "florist-tinyllama-dolly": 1_100_048_384,
    "florist-v1-tinyllama": 1_100_048_384,
    "flowertune-general": 7_248_023_552,
    "gpu-quickstart": 29_893_120,
    "gsm8k-smollm2": 134_515_008,
    "hetero-quickstart": 22_565_376,
    "mbpp-smollm2": 134_515_008,
    "quickstart": 22_565_376,
    "sst2-minilm": 22_565_376,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_every_presets_ranks(name):
    page = (PRESETS.parents[1] / "docs" / "presets.md").read_text()
    (cell,) = re.findall(rf"^\| `{re.escape(name)}` \|.*\| ([^|]*) \|$", page, re.MULTILINE)
    groups = [(int(count), int(rank)) for count, rank in re.findall(r"(\d+) x (\d+)", cell)]
    ranks = sorted(rank for count, rank in groups for _ in range(count))
    assert ranks == sorted(from_preset(name).ranks)


def test_every_preset_of_the_issue_is_there():
    assert sorted(PARAMETERS) == NAMES


# ---- --dry-run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_planned(name, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["compare", "--preset", name, "--dry-run", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    planned, settings = plan(from_preset(name)), from_preset(name)
    assert planned.parameters == PARAMETERS[name]
    assert f"{planned.parameters:,} parameters" in said
    assert len(planned.examples) == settings.clients
    assert min(planned.examples) > 0
    assert [item.rule for item in planned.traffic] == list(settings.rules)
    assert all(f" {rule} " in said for rule in settings.rules)
    assert "together" in said
    assert not out.exists(), "nothing is written"


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        # 22 layers: q_proj 2048 x 2048, v_proj 256 x 2048
        ("florist-tinyllama-dolly", 16, 22 * 16 * ((2048 + 2048) + (256 + 2048))),
        # 32 layers: q_proj and v_proj 4096 x 4096
        ("florist-llama7b-wizard", 64, 32 * 64 * 4 * 4096),
        ("florist-llama7b-wizard", 4, 32 * 4 * 4 * 4096),
        # 24 layers of 1024 x 1024, and the head: a layer of 1024 and one of 3 classes
        ("fedsa-glue-roberta-large", 8, 24 * 8 * 4 * 1024 + 1024 * 1025 + 3 * 1025),
        # 32 layers: q_proj 4096 x 4096, v_proj 1024 x 4096
        ("flowertune-general", 32, 32 * 32 * ((4096 + 4096) + (1024 + 4096))),
    ],
)
def test_adapters_have_the_parameters_that_one_counts_by_hand(name, rank, expected):
    assert plan(from_preset(name)).adapter(rank) == expected


def test_a_plan_partitions_the_published_sizes():
    planned = plan(from_preset("florist-tinyllama-dolly"))
    assert sum(planned.examples) == 15_011 - 500
    assert sum(plan(from_preset("fedsa-gsm8k-llama3-8b")).examples) == 7473
    by_topic = plan(from_preset("flexlora-hetero")).examples
    shares = [count / 15_011 for count in TASKS["dolly"].published[""].train]
    for found, share in zip(by_topic, shares, strict=True):
        assert found == pytest.approx(share * (15_011 - 500), abs=1)


def test_sizes_are_published_for_the_tasks_that_read_data_sets():
    assert {task.name for task in TASKS.values() if task.published} == {
        task.name for task in TASKS.values() if task.row
    }
    for subset, sizes in TASKS["glue"].published.items():
        assert len(sizes.train) == len(SUBSETS[subset][1])


def test_a_data_set_of_unknown_size_is_an_error():
    settings = from_preset("flora-tinyllama")
    settings.task_options["source"] = "somebody/something"
    with pytest.raises(SettingsError, match="no size of 'instructions somebody/something' is know"):
        plan(settings)


def test_vera_is_planned():
    """Vectors travel: lambda_d of r numbers; every client keeps its lambda_b of m."""
    planned = plan(from_preset("quickstart", method="vera", rules=("fedsa",)))
    assert planned.adapter(8) == 12 * (8 + 384)
    assert planned.traffic[0].up == 8 * 12 * 8 * 4


# ---- --tiny ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_runs_in_miniature(name, tmp_path, monkeypatch):
    """And moves the bytes that its plan says."""
    monkeypatch.setattr(compare_module, "write_report", lambda _: None)  # drawn elsewhere
    assert main(["compare", "--preset", name, "--tiny", "--out", str(tmp_path)]) == 0
    settings = from_preset(name)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["rule"] for line in lines} == set(settings.rules)
    assert all(line["accuracy"] is not None for line in lines if line["round"] == 2)
    planned = plan(miniature(settings, tmp_path).settings)
    for expected in planned.traffic:
        found = [line for line in lines if line["rule"] == expected.rule]
        assert len(found) == planned.settings.rounds
        assert all(line["bytes_up"] == expected.up for line in found)
        for line in found:
            if expected.bound:
                assert line["bytes_down"] <= expected.down
            else:
                assert line["bytes_down"] == expected.down


@pytest.mark.parametrize("name", NAMES)
def test_the_miniature_keeps_what_the_preset_is_about(name, tmp_path):
    settings = from_preset(name)
    made = miniature(settings, tmp_path)
    small = made.settings
    assert small.rules == settings.rules
    assert small.partition == settings.partition
    assert small.target_modules == settings.target_modules
    assert small.heterogeneous == settings.heterogeneous
    ordered = sorted(settings.ranks) == list(settings.ranks)
    assert list(small.ranks) == sorted(small.ranks, reverse=not ordered)
    assert (small.micro_batch_size is None) == (settings.micro_batch_size is None)
    if small.micro_batch_size is not None:
        assert 1 <= small.micro_batch_size < small.batch_size, "a step has several micro-batches"
    assert small.init == "random"
    assert settings.init == "pretrained"
    shape = json.loads(made.files[tmp_path / "config.json"])
    assert shape["num_hidden_layers"] == 2


def test_miniatures_are_the_same_every_time(tmp_path):
    made = [miniature(from_preset("florist-tinyllama-dolly"), tmp_path / name) for name in "ab"]
    assert made[0].settings.ranks == made[1].settings.ranks
    assert not list(tmp_path.iterdir()), "nothing is written before it is asked for"
    for small in made:
        small.write()
    for name in ("config.json", "data/train.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["quickstart", "hetero-quickstart", "fedsa-glue-roberta-large"])
def test_a_miniature_is_planned_and_leaves_nothing(name, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["compare", "--preset", name, "--tiny", "--dry-run", "--out", str(out)]) == 0
    assert "together" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    "flags",
    ["--rules nothing", "--rules fedsa --after merge", "--task nothing", "--config nothing"],
)
def test_a_miniature_that_cannot_run_leaves_nothing(flags, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["compare", "--tiny", "--out", str(out), *flags.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_a_miniature_does_not_change_the_files_of_another_run(capsys, tmp_path, monkeypatch):
    """--resume with another preset: the model and the data in the folder stay those of its run."""
    monkeypatch.setattr(command_line, "compare_rules", lambda *_, **__: None)
    flags = ["--tiny", "--out", str(tmp_path), "--resume"]
    assert main(["compare", "--preset", "florist-tinyllama-dolly", *flags]) == 0
    settings = miniature(from_preset("florist-tinyllama-dolly"), tmp_path).settings
    write_settings(tmp_path, settings, Score(0.5, 1.0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 3
    assert main(["compare", "--preset", "fedsa-glue-roberta-large", *flags]) == 2
    assert "was begun with task 'dolly', found 'glue'" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_its_source(name):
    """Beside it, in the comment above it, or in the head of a preset whose numbers are all ours."""
    text = (PRESETS / f"{name}.toml").read_text()
    head = text.split("\n\n")[0]
    if "rXiv" not in head:
        assert "ours" in head or name == "quickstart"
        return
    assert re.search(r"arXiv \d{4}\.\d{5}", head)
    above = ""
    for line in text.splitlines():
        if re.match(r"\w+ = .*\d", line) and not line.startswith(("model", "config")):
            assert "#" in line or above.startswith("#"), f"{name}: {line}"
        above = line


# ---- models of our own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"), [("gpu-quickstart", "llama-30m"), ("arithmetic", "llama-tiny")]
)
def test_a_model_of_our_own_is_pretrained_where_it_is_missing(name, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = []

    def pretrain(settings, folder, _):
        done.append(("pretrain", settings.shape))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(command_line, "pretrain", pretrain)
    monkeypatch.setattr(command_line, "compare_rules", lambda *call, **_: done.append(call[1]))
    assert main(["run", "--preset", name, "--dry-run"]) == 0
    assert done == []
    assert main(["run", "--preset", name]) == 0
    assert done[0] == ("pretrain", shape)
    assert [rule.name for rule in done[1]] == list(from_preset(name).rules)
    assert main(["run", "--preset", name]) == 0
    assert len(done) == 3, "it is there now"
