"""Language tasks made here: generated problems, library sources, what counts as an answer."""

import itertools
import re

import pytest
from miniature import language

from integration.tasks import TASKS, Example, TaskError, arithmetic, load_task
from integration.tasks.answers import after_hashes, boxed, same_box, same_number

SIZES = {"test_size": 100, "shared_per_class": 0}
PROBLEM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


# ---- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 4])
def test_every_solution_is_right(level):
    for problem in arithmetic.problems(level, 40, 800, 0):
        lines = PROBLEM.findall(problem.completion)
        assert 1 <= len(lines) <= level
        for left, sign, right, result in lines:
            assert eval(f"{left} {sign} {right}") == int(result) > 0
        assert lines[-1][3] == problem.answer == after_hashes(problem.completion)
        assert lines[0][0] in problem.text
        for (*_, before), (after, *_) in itertools.pairwise(lines):
            assert before == after


def test_topics_come_in_turn_and_differ_in_their_operations():
    problems = arithmetic.problems(1, 40, 800, 0)
    assert len({problem.text for problem in problems}) == 800
    for label, topic in enumerate(arithmetic.TOPICS):
        mine = [problem for problem in problems if problem.label == label]
        assert len(mine) == 100
        assert {PROBLEM.search(problem.completion)[2] for problem in mine} == set(topic.events)


def test_the_seed_decides_the_problems():
    assert arithmetic.problems(2, 40, 50, 3) == arithmetic.problems(2, 40, 50, 3)
    assert arithmetic.problems(2, 40, 50, 3) != arithmetic.problems(2, 40, 50, 4)


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(TaskError, match=r"different problems in .* need 5000; raise largest \(6\)"):
        TASKS["arithmetic"].load(**SIZES, level=1, largest=6, examples=5_000)


def test_unknown_options_and_tasks_are_errors():
    with pytest.raises(TaskError, match="task arithmetic has no option 'levels'; its options: lev"):
        load_task(language(task_options={"levels": 3}))
    with pytest.raises(TaskError, match=r"unknown task 'sums'; known: .*stdlib_chapters"):
        load_task(language(task="sums"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,200", "1200"),
        ("####-3.50 dollars", "-3.5"),
        ("#### 10.", "10"),
        ("#### 100", "100"),
        ("it is 7", None),
        ("#### none", None),
    ],
)
def test_the_number_after_hashes(text, answer):
    assert after_hashes(text) == answer
    assert same_number(Example("", 0, answer="7"), text) == (answer == "7")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{ x + 2 }", "x+2"),
        (r"\boxed{\left( 3, \dfrac{1}{2} \right)}", r"(3,\frac{1}{2})"),
        (r"\boxed{never closed", None),
        ("7", None),
    ],
)
def test_the_contents_of_a_box(text, answer):
    assert boxed(text) == answer
    assert same_box(Example("", 0, answer="x+2"), text) == (answer == "x+2")


# ---- the library's sources ----------------------------------------------------------------------


def test_library_sources_are_whole_definitions():
    task = TASKS["stdlib_code"].load(**SIZES, most_characters=100_000)
    assert len(task.train) > 1000
    assert len({example.label for example in task.train}) == 8
    for example in task.test:
        assert example.text == ""
        compile(example.completion, "definition", "exec")
