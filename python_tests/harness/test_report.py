"""The report: what it shows, that it is one file, and what it does where data are missing."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from recorded import a_round, a_run
from rich.console import Console

from integration.__main__ import main
from integration.report import figures, module_figures
from integration.report.html import write_report
from integration.report.series import read_run, together
from integration.report.table import MISSING, table
from integration.settings import SettingsError

RESULTS = Path(__file__).parents[2] / "integration/results"


def words(svg):
    """The texts of a figure: matplotlib writes each as a comment beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", svg)


def test_the_report_has_every_figure_and_is_one_file(tmp_path):
    page = write_report(a_run(tmp_path / "run")).read_text()
    assert page.count("<svg") == 6
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "The rules beside each other",
        "Accuracy over the rounds",
        "Accuracy against traffic",
        "Error of the aggregation",
        "Ranks of the modules",
        "Spectrum of the ideal update",
        "Where the time goes",
    ]
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "refers to another file"
    assert "<script" not in page
    assert "a &lt;model&gt;" in page
    assert "50 % of them a round" in page


def test_questions_have_everybodys_answers(tmp_path):
    texts = {"fedit": ["5 < 6", "late"], "florist": ["4", "soon"]}
    rounds = [
        a_round(rule, n, texts=texts[rule] if n == 3 else []) for rule in texts for n in (2, 3)
    ]
    folder = a_run(tmp_path / "run", rounds)
    content = json.loads((folder / "settings.json").read_text())
    answers = {"reference": "#### 4", "start": "hello"}
    content["questions"] = [{"question": q, **answers} for q in ("2 + 2?", "When?")]
    (folder / "settings.json").write_text(json.dumps(content))
    page = write_report(folder).read_text()
    first, second = re.findall(r'<table class="texts">(.*?)</table>', page)
    cells = re.findall(r"<td>(.*?)</td>", first)
    assert cells == [
        *("question", "2 + 2?", "reference", "#### 4", "start", "hello"),
        *("fedit", "5 &lt; 6", "florist", "4"),
    ]
    assert "When?" in second
    assert "soon" in second


def test_the_report_depends_on_the_files_only(tmp_path):
    first = write_report(a_run(tmp_path / "a" / "run")).read_bytes()
    assert write_report(a_run(tmp_path / "b" / "run")).read_bytes() == first


def test_a_run_of_an_earlier_version_is_drawn_without_what_it_lacks(tmp_path):
    folder = a_run(tmp_path / "old")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("seed", "clients", "train_loss", "training_ms", "evaluation_ms"):
            del line[name]
        for module in line["modules"].values():
            del module["spectrum"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(folder).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert "Spectrum of the ideal update" not in titles
    assert "Ranks of the modules" in titles
    assert "florist" in page


@pytest.mark.parametrize("committed", sorted(RESULTS.glob("*/*")), ids=lambda run: run.name)
def test_committed_runs_are_drawn(tmp_path, committed):
    folder = shutil.copytree(committed, tmp_path / committed.name)
    page = write_report(folder).read_text()
    for entry in json.loads((committed / "summary.json").read_text()):
        assert entry["rule"] in page


def test_rounds_that_were_not_evaluated_have_no_point(tmp_path):
    rounds = [a_round("fedit", n, accuracy=None if n < 3 else 0.75) for n in (1, 2, 3)]
    run = read_run(a_run(tmp_path / "run", rounds))
    assert [entry["accuracy"] for entry in run.rules["fedit"]] == [None, None, 0.75]
    assert "0.750" in words(figures.accuracy(run.rules, {"fedit": 0.5}))
    assert write_report(tmp_path / "run").read_text().count("<svg") == 5, "no rule chooses ranks"


def test_seeds_are_averaged_and_their_spread_is_kept(tmp_path):
    rounds = [a_round("fedit", n, seed=seed) for seed in range(3) for n in (1, 2)]
    run = read_run(a_run(tmp_path / "run", rounds, seeds=3))
    last = run.rules["fedit"][-1]
    assert last["accuracy"] == pytest.approx(0.71)
    assert (last["lowest"], last["highest"]) == pytest.approx((0.70, 0.72))
    page = write_report(tmp_path / "run").read_text()
    assert "the mean and its 95 % interval" in page
    assert "<dt>seeds</dt><dd>3</dd>" in page


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rounds", [(1,), (2,), (3,), (1, 2, 3)])
def test_rounds_that_diverged_leave_gaps(tmp_path, value, rounds):
    names = ("relative_error", "svd_floor", "averaging_error", "train_loss", "loss")
    lost = dict.fromkeys(names, value)
    made = [a_round("fedit", n, **(lost if n in rounds else {})) for n in (1, 2, 3)]
    folder = a_run(tmp_path / "run", [*made, *(a_round("florist", n) for n in (1, 2, 3))])
    assert not re.search("NaN|Infinity", (folder / "metrics.jsonl").read_text())
    assert not re.search("NaN|Infinity", (folder / "summary.json").read_text())
    run = read_run(folder)
    gaps = [entry["round"] for entry in run.rules["fedit"] if entry["relative_error"] is None]
    assert gaps == list(rounds)
    assert figures.color(run.rules["fedit"]) == figures.ABOVE_FLOOR
    assert figures.color(run.rules["florist"]) == figures.AT_FLOOR
    assert run.summary[0]["relative_error"] is None
    assert write_report(folder).read_text().count("<svg") == 6
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(run.summary))
    assert MISSING in captured.get()


def test_the_numbers_of_earlier_versions_are_read_as_null(tmp_path):
    """They wrote NaN and Infinity as Python does."""
    folder = a_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"svd_floor": 0.2', '"svd_floor": Infinity'))
    path = folder / "summary.json"
    path.write_text(path.read_text().replace('"loss": 1.0', '"loss": NaN'))
    run = read_run(folder)
    assert run.rules["florist"][0]["svd_floor"] is None
    assert run.summary[0]["loss"] is None
    assert write_report(folder).is_file()


def test_traffic_adds_up_over_the_rounds(tmp_path):
    """Three rounds of 1.5 MB: the axis reaches 4.5 MB and names 2 MB."""
    run = read_run(a_run(tmp_path / "run"))
    said = words(figures.traffic(run.rules, dict.fromkeys(run.rules, 0.5)))
    assert "2 MB" in said
    assert "10 MB" not in said
    assert "fedit" in said
    assert "florist" in said


def test_the_heat_map_shows_the_ranks_of_rules_that_choose(tmp_path):
    run = read_run(a_run(tmp_path / "run"))
    said = words(module_figures.ranks(run.rules))
    assert "florist" in said
    assert "fedit" not in said
    cells = [word for word in said if word.isdigit()]
    assert cells.count("2") == 3 + 1, "three rounds, and the layer's own number"
    assert "q_proj  round 3" in said


def test_modules_without_layers_and_with_equal_last_names_keep_their_places():
    table = module_figures._table
    modules = ("encoder.0.self.out", "encoder.0.cross.out", "head")
    rounds = [{"round": 1, "modules": {name: {"rank": k} for k, name in enumerate(modules)}}]
    rows, layers, ranks = table(rounds)
    assert rows == ["cross.out  round 1", "head  round 1", "self.out  round 1"]
    assert layers == [0]
    assert ranks[:, 0].tolist() == [1, 2, 0]


def test_the_spectrum_is_the_median_of_the_modules():
    modules = {name: {"spectrum": [k, 0.1 * k]} for k, name in enumerate("abc", 1)}
    assert module_figures._values({"modules": modules}) == pytest.approx([2, 0.2])
    modules["d"] = {"spectrum": []}
    assert module_figures._values({"modules": modules}) == [], "a VeRA module has none"


def test_the_time_split_names_the_share_of_the_aggregation(tmp_path):
    rounds = [a_round("fedit", n, transfer_ms=80.0) for n in (1, 2)]
    run = read_run(a_run(tmp_path / "run", rounds))
    said = words(figures.times(run.rules))
    assert {"training", "transfer", "aggregation", "evaluation"} <= set(said)
    assert "aggregation 0.91 %" in said, "20 of 2200 ms"


def test_lost_clients_are_listed(tmp_path):
    lost = [a_round("fedit", 1), a_round("fedit", 2, lost={"3": "no reply within 60 s"})]
    page = write_report(a_run(tmp_path / "run", lost)).read_text()
    assert "<li>fedit: 1 in round 2</li>" in page


def test_several_runs_are_drawn_together(tmp_path, capsys):
    first = a_run(tmp_path / "one" / "run", batch_size=8)
    second = a_run(tmp_path / "other" / "run", batch_size=16)
    third = a_run(tmp_path / "third", batch_size=8)
    out = tmp_path / "all"
    flags = [str(folder) for folder in (first, second, third)]
    assert main(["report", *flags, "--out", str(out)]) == 0
    assert str(out / "report.html") in capsys.readouterr().out.replace("\n", "")
    page = (out / "report.html").read_text()
    assert "3 runs compared" in page
    assert "<li>batch_size: 8 (run); 16 (run); 8 (third)</li>" in page
    runs = [read_run(folder) for folder in (first, second, third)]
    assert list(together(runs)) == [
        *("fedit, run 1", "florist, run 1", "fedit, run 2", "florist, run 2"),
        *("fedit, third", "florist, third"),
    ]


def test_the_folder_may_be_an_argument_or_the_option(tmp_path):
    folder = a_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    written = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert main(["report", "--out", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == written


@pytest.mark.parametrize("name", ["settings.json", "metrics.jsonl", "summary.json"])
def test_a_folder_without_a_run_is_an_error(tmp_path, name):
    folder = a_run(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(SettingsError, match=f"has no {name}; expected the folder of an earlier"):
        write_report(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "report needs the folder of an earlier run, or several"),
        (["a", "b"], "the report of several runs needs --out"),
        (["nowhere"], "nowhere has no summary.json"),
    ],
)
def test_wrong_flags_end_with_two(capsys, flags, message):
    assert main(["report", *flags]) == 2
    assert message in capsys.readouterr().err
