"""Pages from committed results: the cells of their tables, what they show, the page filler."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import integration
from integration.report import figures, page_filler
from integration.report.pages import PAGES, filled
from integration.report.series import read_run
from integration.report.summary import write_summary
from integration.rounds.evaluate import Score
from integration.rounds.records import RoundRecord

RESULTS = Path(integration.__file__).parent / "results"


@pytest.fixture
def run(tmp_path):
    """Two rules and two seeds; fedsa is worse with both, by different amounts."""
    folder = tmp_path / "run"
    folder.mkdir()
    entry = {"start_accuracy": 0.25, "loss": 1.0, "relative_error": 0.3, "rank": 8.0}
    summary = [
        entry
        | {"rule": "fedit", "bytes_down": 1_500_000, "accuracy": 0.75}
        | {"accuracy_interval": 0.635, "within_noise": True},
        entry
        | {"rule": "fedsa", "bytes_down": 750_000, "accuracy": 0.645}
        | {"accuracy_interval": 0.572, "within_noise": False},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "settings.json").write_text(json.dumps({"start_accuracy": 0.25}))
    return folder


def test_a_table_between_its_marks(run):
    page = "before\n<!-- table accuracy: run = Our run -->\nold\n<!-- end -->\nafter\n"
    text = filled(page, run.parent)
    assert text == (
        "before\n<!-- table accuracy: run = Our run -->\n\n| | Our run |\n|---|---:|\n"
        "| FedIT | 0.750 \u00b1 0.635 ~ |\n| FedSA-LoRA | 0.645 \u00b1 0.572 |\n"
        "| *start* | 0.250 |\n\n<!-- end -->\nafter\n"
    )
    assert filled(text, run.parent) == text


def test_the_learning_rate_and_the_seeds_of_a_rule(run):
    entry = {"rule": "fedit", "learning_rate": 0.004, "losses": [0.5, 0.6]}
    (run / "summary.json").write_text(json.dumps([entry, {"rule": "ffa", "learning_rate": 0.016}]))
    page = "".join(f"<!-- table {x}: run = Run -->\n<!-- end -->\n" for x in ("rate", "seeds"))
    text = filled(page, run.parent)
    assert re.findall(r"^\| (\S+) \| (\S+) \|$", text, re.MULTILINE) == [
        *[("FedIT", "0.004"), ("FFA-LoRA", "0.016")],
        *[("FedIT", "2"), ("FFA-LoRA", "1")],
    ]


def test_a_run_with_a_column_for_each_cell(run):
    page = "<!-- run run: accuracy = right; seeds = of seeds -->\n<!-- end -->\n"
    text = filled(page, run.parent)
    assert text.splitlines()[2:6] == [
        "| | right | of seeds |",
        "|---|---:|---:|",
        "| FedIT | 0.750 \u00b1 0.635 ~ | 1 |",
        "| FedSA-LoRA | 0.645 \u00b1 0.572 | 1 |",
    ]
    assert filled(text, run.parent) == text
    with pytest.raises(ValueError, match="unknown table 'speed'; known: accuracy, "):
        filled("<!-- run run: speed = fast -->\n<!-- end -->", run.parent)


def test_rules_by_name(run):
    page = "<!-- table rank fedsa: run = Run -->\n<!-- end -->"
    assert "FedSA-LoRA" in filled(page, run.parent)
    assert "FedIT" not in filled(page, run.parent)


def test_a_rule_that_a_run_lacks_has_an_empty_cell(run):
    other = run.parent / "other"
    other.mkdir()
    (other / "summary.json").write_text(json.dumps([{"rule": "flora", "bytes_down": 9e6}]))
    text = filled("<!-- table down: run = A; other = B -->\n<!-- end -->", run.parent)
    assert "| FedIT | 1.50 |  |" in text
    assert "| FLoRA |  | 9.00 |" in text


def test_what_is_not_there_is_an_error(run):
    with pytest.raises(ValueError, match="unknown table 'speed'; known: accuracy, "):
        filled("<!-- table speed: run = Run -->\n<!-- end -->", run.parent)
    with pytest.raises(FileNotFoundError):
        filled("<!-- table accuracy: other = Run -->\n<!-- end -->", run.parent)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_page_shows_the_committed_results(path):
    page = path.read_text()
    assert filled(page) == page, "run python -m integration.report.pages"


def test_the_figure_of_the_readme_is_that_of_its_run():
    """By its texts: the outlines of its letters depend on the version of matplotlib."""
    (run,) = page_filler.arguments(PAGES[0].read_text(), "quickstart")
    drawn = (RESULTS / run / "errors.svg").read_text()
    expected = figures.errors(read_run(RESULTS / run).rules)
    assert words(drawn) == words(expected), "run python -m integration.report.pages"


def words(svg):
    return re.findall(r"<!-- (.*?) -->", svg)


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("*/*/")), ids=lambda folder: folder.name)
def test_committed_summaries_are_those_of_their_rounds(folder, tmp_path):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    known = {field.name for field in fields(RoundRecord)}
    rounds = [RoundRecord(**{k: v for k, v in json.loads(x).items() if k in known}) for x in lines]
    settings = json.loads((folder / "settings.json").read_text())
    start = Score(settings["start_accuracy"], settings["start_loss"])
    again = write_summary(tmp_path, rounds, start, settings.get("learning_rates"))
    assert json.loads((folder / "summary.json").read_text()) == again


# ---- the page filler ----------------------------------------------------------------------------


def test_only_the_named_marks_are_filled():
    page = (
        "a <!-- remark -->\n<!-- one x y -->\nold\n<!-- end -->\n<!-- two z -->\nold\n<!-- end -->b"
    )
    one = page_filler.fill(page, {"one": lambda arguments: f"new {arguments}\n"})
    assert one == page.replace("\nold\n", "\n\nnew x y\n\n", 1)
    both = {"one": str.upper, "two": str.upper}
    expected = page.replace("\nold\n", "\n\nX Y\n\n", 1).replace("\nold\n", "\n\nZ\n\n", 1)
    assert page_filler.fill(page, both) == page_filler.fill(expected, both) == expected
    assert page_filler.arguments(page, "two") == ["z"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("text", r"the page has no mark <!-- one \.\.\. --> or <!-- two \.\.\. -->"),
        ("<!-- one x -->\nold", "<!-- one x --> lacks its <!-- end -->"),
        ("<!-- one x -->\n<!-- two y -->\n<!-- end -->", "<!-- one x --> lacks its <!-- end -->"),
    ],
)
def test_a_page_without_its_marks_is_an_error(page, message):
    with pytest.raises(ValueError, match=message):
        page_filler.fill(page, {"one": str.upper, "two": str.upper})
