"""The task from the standard library's documentation strings: size, classes, no leakage."""

import re
import sys

import pytest

from integration.tasks import TASKS, Example, TaskError, stdlib_chapters
from integration.tasks.task import split


@pytest.fixture(scope="module")
def task():
    return TASKS["stdlib_chapters"].load(test_size=640, shared_per_class=50)


def key(text):
    return " ".join(re.findall(r"\w+", text.lower())[: stdlib_chapters.KEY_WORDS])


def test_it_is_large_enough_and_has_eight_chapters(task):
    everything = [*task.train, *task.shared, *task.test]
    assert len(everything) >= 2000
    assert len(task.test) == 640
    assert len(task.shared) == 8 * 50
    assert len(task.classes) == 8
    for part in (task.train, task.shared, task.test):
        assert {example.label for example in part} == set(range(8))
    assert task.majority < 0.4


def test_no_text_is_in_two_splits(task):
    train, shared, test = (
        {key(example.text) for example in part} for part in (task.train, task.shared, task.test)
    )
    assert not train & test
    assert not shared & test
    assert not train & shared
    assert len(train) + len(shared) + len(test) == len(task.train) + len(task.shared) + 640


def test_it_is_the_same_every_time(task):
    stdlib_chapters.parse.cache_clear()
    assert TASKS["stdlib_chapters"].load(test_size=640, shared_per_class=50) == task


def test_making_it_imports_no_module_of_the_library(task):
    """Parsed, not imported: no Zen of Python, no browser, no window."""
    stdlib_chapters.parse.cache_clear()
    before = set(sys.modules)
    stdlib_chapters.strings()
    imported = set(sys.modules) - before
    assert imported <= stdlib_chapters.COMPILED
    assert not {"this", "antigravity", "turtle", "nntplib"} & set(sys.modules)


def test_texts_are_one_clean_paragraph(task):
    for example in task.train:
        assert len(example.text.split()) >= stdlib_chapters.MINIMUM_WORDS
        assert example.text == " ".join(example.text.split())


def test_a_text_of_two_chapters_is_in_neither(tmp_path, monkeypatch):
    """Same words in two chapters: dropped. In two modules of one chapter: kept once."""
    monkeypatch.setattr(stdlib_chapters.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(stdlib_chapters, "CHAPTERS", {"x": ("one", "two"), "y": ("three",)})
    monkeypatch.setattr(stdlib_chapters, "MINIMUM_STRINGS", 1)
    (tmp_path / "one.py").write_text('"""Words that both chapters share."""\ndef f():\n    "Ok."')
    (tmp_path / "two.py").write_text('"""Only chapter x says\n    this.\n\n    More."""\n')
    (tmp_path / "three.py").write_text('"""words that BOTH chapters share!"""\n')
    assert stdlib_chapters.strings() == {"Only chapter x says this.": "x"}


def test_a_python_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_chapters.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(TaskError, match="install the sources"):
        stdlib_chapters.TASK.load(test_size=10, shared_per_class=1)


def test_the_split_does_not_move_when_a_text_comes():
    examples = [Example(f"text number {n}", n % 2) for n in range(100)]
    sizes = {"test_size": 20, "shared_per_class": 5}
    small = split("t", ("a", "b"), examples, **sizes)
    large = split("t", ("a", "b"), [*examples, Example("one more", 0)], **sizes)
    assert len(set(small.test) & set(large.test)) >= 19


def test_a_question_of_the_test_split_is_not_trained_on():
    """Asked twice with two answers, and word for word twice; a published test split stays whole."""
    once = [Example(f"question {n}", 0, completion="yes") for n in range(50)]
    again = [Example(f"question {n}", 0, completion="no") for n in range(50)]
    made = split("t", ("a",), [*once, *again, *once], test_size=30, kind="language")
    asked = {example.text for example in made.test}
    assert len(made.test) == 30
    assert not asked & {example.text for example in made.train}
    assert {example.text for example in made.train} == {x.text for x in once} - asked
    written = [Example("", 0, completion=f"text {n % 40}") for n in range(80)]
    made = split("t", ("a",), written, test_size=9, kind="language")
    assert not {x.completion for x in made.test} & {x.completion for x in made.train}
    own = split("t", ("a",), once, test=again, test_size=50, kind="language")
    assert (len(own.train), len(own.test)) == (50, 50)


def test_the_validation_split_is_of_the_training_split():
    """Test and shared split are the same without it; no text of it is trained on."""
    examples = [Example(f"question {n % 90}", 0, completion=str(n)) for n in range(100)]
    sizes = {"test_size": 20, "shared_per_class": 5}
    whole = split("t", ("a",), examples, **sizes)
    made = split("t", ("a",), examples, **sizes, validation_size=30)
    assert (made.test, made.shared) == (whole.test, whole.shared)
    assert len(made.validation) == 30
    assert set(made.validation) | set(made.train) <= set(whole.train)
    assert not {x.text for x in made.validation} & {x.text for x in made.train}
    few = split("t", ("a",), examples, **sizes, validation_size=30, train_size=7)
    assert (few.validation, few.train) == (made.validation, made.train[:7])
    with pytest.raises(TaskError, match="lower test_size or validation_size"):
        split("t", ("a",), examples, **sizes, validation_size=80)


def test_a_split_that_does_not_suffice_names_the_class():
    examples = [Example(f"text number {n}", 0) for n in range(10)]
    with pytest.raises(TaskError, match=r"fewer than 2 examples .* of b;"):
        split("t", ("a", "b"), examples, test_size=2, shared_per_class=2)
