"""Tasks that read data sets: their columns, splits and topics, from files on the disk."""

import pytest
from miniature import MESSAGES, written

from integration.plan import plan
from integration.settings import from_preset
from integration.tasks import TASKS, Example, TaskError, load_task
from integration.tasks.programs import passes

SIZES = {"test_size": 5, "shared_per_class": 0}

FILES = {
    "gsm8k": [
        {"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
        for n in range(40)
    ],
    "math": [
        {
            "problem": f"Square {n}.",
            "level": "Level 1",
            "type": ("Algebra", "Geometry")[n % 2],
            "solution": rf"It is $\boxed{{{n * n}}}$.",
        }
        for n in range(40)
    ],
    "programs": [
        {
            "text": f"Write a function that adds {n}.",
            "code": f"def add(x):\n    return x + {n}\n",
            "test_list": [f"assert add(1) == {1 + n}", "assert add(0) != 99"],
        }
        for n in range(40)
    ],
    "dolly": [
        {
            "instruction": f"Say {n}.",
            "context": "" if n % 2 else "Be brief.",
            "response": str(n),
            "category": ("open_qa", "brainstorming")[n % 2],
        }
        for n in range(40)
    ],
    "alpaca_gpt4": [
        {"instruction": f"Say {n}.", "input": "", "output": str(n), "text": ""} for n in range(40)
    ],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` makes of the files goes with the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", list(FILES))
def test_data_sets_from_files(tmp_path, name):
    source = written(tmp_path / "set", FILES[name])
    task = TASKS[name].load(test_size=10, shared_per_class=0, source=source)
    assert (len(task.train), len(task.test)) == (30, 10)
    assert task.kind == "language"
    if task.right is not None:
        assert all(task.right(example, example.completion) for example in task.test)
        assert not any(task.right(example, "#### none") for example in task.test)
    written(tmp_path / "set", FILES[name][:5], "test")
    own = TASKS[name].load(test_size=10, shared_per_class=0, source=source)
    assert (len(own.train), len(own.test)) == (40, 5), "a test split of its own is used"


def test_problems_as_a_chat_and_without_the_long_ones(tmp_path):
    rows = [*FILES["gsm8k"], {"question": "Why?" * 50, "answer": "#### 1"}]
    source = written(tmp_path / "set", rows)
    short = {"source": source, "most_characters": 60}
    plain = TASKS["gsm8k"].load(**SIZES, **short)
    chat = TASKS["gsm8k"].load(**SIZES, **short, chat=True)
    assert (len(plain.train), len(plain.test)) == (35, 5)
    assert {x.turns for x in [*chat.train, *chat.test]} == {
        (("user", row["question"]),) for row in FILES["gsm8k"]
    }
    for example in chat.test:
        assert example.text == ""
        assert chat.right(example, example.completion)
        assert example.question == example.turns[0][1]
    with pytest.raises(TaskError, match="no training row is left"):
        TASKS["gsm8k"].load(**SIZES, source=source, most_characters=5)


def test_a_folder_of_data_sets(tmp_path):
    """Under the variant's name or the last part of the hub's; without them one line says so."""
    written(tmp_path / "gsm8k", FILES["gsm8k"])
    written(tmp_path / "sst2", [])
    data = str(tmp_path)
    gsm8k, glue = TASKS["gsm8k"], TASKS["glue"]
    assert gsm8k.local(data, {"chat": True}) == {"chat": True, "source": str(tmp_path / "gsm8k")}
    assert glue.local(data, {})["source"] == str(tmp_path / "sst2")
    assert gsm8k.local(data, {"source": data}) == {"source": data}, "a folder of its own"
    assert gsm8k.local(None, {}) == {}
    assert TASKS["arithmetic"].local(data, {"level": 1}) == {"level": 1}
    with pytest.raises(TaskError, match="has no folder rte or glue"):
        glue.local(data, {"subset": "rte"})
    settings = from_preset("gsm8k-smollm2", data=data, test_size=6, validation_size=4)
    assert len(load_task(settings).validation) == 4
    assert sum(plan(settings).examples) == 40 - 6 - 4


def test_topics_come_from_the_columns(tmp_path):
    dolly = TASKS["dolly"].load(**SIZES, source=written(tmp_path / "d", FILES["dolly"]))
    assert dolly.classes == ("brainstorming", "open_qa")
    assert {len(example.turns) for example in dolly.train} == {1}
    asked = {example.turns[0][1] for example in [*dolly.train, *dolly.test]}
    assert "Say 2.\n\nBe brief." in asked
    assert "Say 3." in asked
    math = TASKS["math"].load(**SIZES, source=written(tmp_path / "m", FILES["math"]))
    assert math.classes == ("Algebra", "Geometry")


def test_glue_pairs_and_its_validation_split(tmp_path):
    rows = [
        {"sentence1": f"It rains {n}.", "sentence2": "It is wet.", "label": n % 2, "idx": n}
        for n in range(40)
    ]
    source = written(tmp_path / "rte", rows)
    written(tmp_path / "rte", rows[:7], "validation")
    task = TASKS["glue"].load(test_size=100, shared_per_class=2, subset="rte", source=source)
    assert (len(task.train), len(task.shared), len(task.test)) == (36, 4, 7)
    assert task.classes == ("entailment", "not_entailment")
    assert all(example.second == "It is wet." for example in task.train)
    with pytest.raises(TaskError, match="unknown subset 'stsb'; known: cola, sst2"):
        TASKS["glue"].load(test_size=1, shared_per_class=0, subset="stsb")


def conversations(*columns):
    """Twenty of one kind: MESSAGES in the columns, each with a question of its own."""
    made = []
    for n in range(20):
        asked = {"role": "user", "content": f"Name color {n}."}
        turns = {"messages": [{"role": "system", "content": "Short."}, asked, MESSAGES[1]]}
        turns |= {"prompt": [asked], "completion": MESSAGES[1:]}
        made.append({column: turns[column] for column in columns})
    return made


def test_conventions_of_columns(tmp_path):
    load = TASKS["instructions"].load
    asked = load(**SIZES, source=written(tmp_path / "a", conversations("messages")))
    (system, user), answer = asked.train[0].turns, asked.train[0].completion
    assert (system, user[0], answer) == (("system", "Short."), "user", "Blue.")
    assert len({example.turns for example in [*asked.train, *asked.test]}) == 20
    pairs = conversations("prompt", "completion")
    same = load(**SIZES, source=written(tmp_path / "b", pairs))
    assert {x.turns for x in same.train} <= {x.turns[1:] for x in [*asked.train, *asked.test]}
    plain = [{"prompt": f"Sky {n} is", "completion": " blue."} for n in range(20)]
    texts = load(**SIZES, source=written(tmp_path / "c", plain))
    assert texts.train[0].text.startswith("Sky ")
    assert texts.train[0].completion == " blue."


@pytest.mark.parametrize("column", ["response", "output"])
def test_a_response_may_be_empty(column, tmp_path):
    rows = [{"instruction": f"Say {n}.", column: "" if n % 2 else str(n)} for n in range(20)]
    task = TASKS["instructions"].load(**SIZES, source=written(tmp_path / "a", rows))
    for example in [*task.train, *task.test]:
        number = example.turns[0][1].removeprefix("Say ").removesuffix(".")
        assert example.completion == ("" if int(number) % 2 else number)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": MESSAGES[:1]}], "ends with the user's; expected an assistant's turn"),
        ([{"text": "alone"}], "has the columns text; expected messages, or prompt and"),
    ],
)
def test_other_columns_are_errors(tmp_path, rows, message):
    with pytest.raises(TaskError, match=message):
        TASKS["instructions"].load(
            test_size=1, shared_per_class=0, source=written(tmp_path / "x", rows)
        )


def test_a_missing_column_and_a_missing_data_set_are_errors(tmp_path):
    source = written(tmp_path / "x", FILES["math"])
    with pytest.raises(TaskError, match="has no column 'question'; its columns: level, problem"):
        TASKS["gsm8k"].load(test_size=1, shared_per_class=0, source=source)
    with pytest.raises(TaskError, match="data set 'no/such-set' cannot be read"):
        TASKS["gsm8k"].load(test_size=1, shared_per_class=0, source="no/such-set")
    written(tmp_path / "y", FILES["gsm8k"])
    source = written(tmp_path / "y", FILES["math"], "test")
    with pytest.raises(TaskError, match="has no column 'question'"):
        TASKS["gsm8k"].load(test_size=1, shared_per_class=0, source=source)
    with pytest.raises(
        TaskError, match="a row has the columns answer, question; expected text, co"
    ):
        TASKS["programs"].load(**SIZES, source=written(tmp_path / "z", FILES["gsm8k"]))
    with pytest.raises(TaskError, match="needs the option source"):
        TASKS["instructions"].load(test_size=1, shared_per_class=0)


def test_programs_run_against_their_tests():
    example = Example("def double(x):\n", 0, answer="assert double(2) == 4")
    assert passes(example, "    return 2 * x\n")
    assert not passes(example, "    return x\n")
    assert not passes(example, "    return (\n")
    assert not passes(example, "    bytearray(1 << 32)\n    return 2 * x\n"), "memory is limited"


ENDINGS = (
    "exit()",
    "quit()",
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "import os; os._exit(0)",
)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_that_ends_before_its_tests_does_not_pass(ending):
    example = Example("def double(x):\n", 0, answer="assert double(2) == 4")
    assert not passes(example, f"    return x\n{ending}\n")
    assert not passes(example, f"    {ending}\n")
    assert passes(example, f"    return 2 * x\ndef main():\n    {ending}\n")


@pytest.mark.parametrize("text", ["x = 1\0\n", "x = '\udc80'\n", "x = (\n"], ids=ascii)
def test_text_that_is_no_program_does_not_pass(text):
    assert not passes(Example("", 0, answer="assert False"), text)


@pytest.mark.parametrize("where", ["prompt", "text", "answer"])
def test_programs_may_be_longer_than_an_argument(where):
    long = dict.fromkeys(("prompt", "text", "answer"), "") | {where: "#" * 200_000 + "\n"}
    for value, right in ((4, True), (5, False)):
        example = Example(long["prompt"], 0, answer=f"{long['answer']}assert x == {value}")
        assert passes(example, f"{long['text']}x = 4\n") == right


def test_programs_are_run_only_on_request(tmp_path):
    source = written(tmp_path / "p", FILES["programs"])
    sizes = {"test_size": 5, "shared_per_class": 0}
    assert TASKS["programs"].load(**sizes, source=source).right is None
    assert TASKS["programs"].load(**sizes, source=source, run_code=True).right is passes
    human = {
        "prompt": 'def one():\n    """One."""\n',
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    }
    tests = written(tmp_path / "h", [human] * 9, "test")
    task = TASKS["programs"].load(**sizes, source=source, test_source=tests, run_code=True)
    assert (len(task.train), len(task.test)) == (40, 5)
    assert passes(task.test[0], task.test[0].completion)
