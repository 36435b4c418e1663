"""Grade-school word problems, generated: the steps of the solution, then the answer after ####.

    Question: Mia picks 14 apples in the orchard. A storm brings down 5 more ...
    Answer: 14 + 5 = 19
    #### 19

Eight topics differ in their words and in the operations they ask for, so clients that hold
different topics differ in what they can learn. `level = 1` has problems of one operation, which a
model of a few million parameters can learn; `level = n` has up to n, one after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from integration.tasks.answers import same_number
from integration.tasks.task import Content, Example, Task, TaskError

NAMES = ("Mia", "Omar", "Lena", "Ravi", "Chloe", "Tomas", "Aiko", "Sam", "Nora", "Felix", "Ines")

SMALLEST = 6
"""Of the first numbers: from here on every operation has room."""

ATTEMPTS = 20
"""Problems drawn for each one that is needed, before too many of them are found to be equal."""

MANY = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


@dataclass(frozen=True)
class Topic:
    """The sentences of one topic.

    {n} is a name, {a} the first number, {b} an operation's, {many} the same as "three times".
    """

    name: str
    start: str
    question: str
    events: dict[str, str]
    """Operation -> what happens. Operations that a topic lacks are not asked there."""


# The committed results were trained on these very sentences, spelling included.
TOPICS = (
    Topic(
        "orchard",
        "{n} picks {a} apples in the orchard.",
        "How many apples does {n} have?",
        {
            "+": "A storm brings down {b} more for the basket.",
            "-": "{b} of them go to a neighbour.",
        },
    ),
    Topic(
        "savings",
        "{n} has {a} dollars in a savings box.",
        "How many dollars are in the box?",
        {"+": "An aunt puts in {b} dollars.", "-": "A book costs {b} of the dollars."},
    ),
    Topic(
        "bakery",
        "{n} bakes {a} rolls.",
        "How many rolls does {n} have?",
        {"*": "After the second baking there are {many} as many.", "-": "Customers buy {b} rolls."},
    ),
    Topic(
        "sharing",
        "{n} brings {a} sweets to class.",
        "How many sweets are left for {n}?",
        {
            "/": "They are shared equally among {b} children, and {n} is one of them.",
            "-": "{n} eats {b} of them.",
        },
    ),
    Topic(
        "travel",
        "{n} wants to drive {a} miles.",
        "How many miles is the trip?",
        {"+": "A visit adds {b} miles.", "*": "A closed road makes the trip {many} as long."},
    ),
    Topic(
        "library",
        "The library where {n} works holds {a} books.",
        "How many books are there?",
        {"*": "By summer there are {many} as many.", "+": "A van delivers {b} new books."},
    ),
    Topic(
        "temperature",
        "At noon {n} reads {a} degrees on the thermometer.",
        "How many degrees does it show?",
        {"-": "By night it falls by {b} degrees.", "+": "The sun makes it rise by {b} degrees."},
    ),
    Topic(
        "rope",
        "{n} buys a rope of {a} feet.",
        "How many feet long is the piece?",
        {"/": "It is cut into {b} equal pieces and one is kept.", "-": "{b} feet are cut off."},
    ),
)

COMPUTE: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x // y,
}


def read(*, level: int = 2, largest: int = 40, examples: int = 6000, data_seed: int = 0) -> Content:
    """Generate the task: `examples` different problems of up to `level` operations that begin with
    a number of up to `largest`.

    Raises TaskError where there are not so many different problems.
    """
    if level < 1 or largest < SMALLEST:
        raise TaskError(
            f"task arithmetic: level {level} and largest {largest}, expected at least 1 and "
            f"{SMALLEST}"
        )
    return Content(
        tuple(topic.name for topic in TOPICS),
        problems(level, largest, examples, data_seed),
        right=same_number,
    )


def problems(level: int, largest: int, count: int, seed: int) -> list[Example]:
    """`count` different problems, the topics in turn."""
    draw = random.Random(seed)
    found: dict[str, Example] = {}
    for _ in range(ATTEMPTS * count):
        label = len(found) % len(TOPICS)
        example = _problem(label, draw, draw.randint(1, level), largest)
        found.setdefault(example.text, example)
        if len(found) == count:
            return list(found.values())
    raise TaskError(
        f"task arithmetic: found {len(found)} different problems in {ATTEMPTS * count} attempts, "
        f"need {count}; raise largest ({largest}) or level ({level})"
    )


def sums(largest: int) -> list[str]:
    """Every first line that a solution may have, such as `14 + 5 = 19`: what to know by heart."""
    return [
        f"{value} {sign} {number} = {COMPUTE[sign](value, number)}"
        for value in range(SMALLEST, largest + 1)
        for sign in COMPUTE
        for number in _numbers(sign, value)
    ]


def _problem(label: int, draw: random.Random, steps: int, largest: int) -> Example:
    topic, name = TOPICS[label], draw.choice(NAMES)
    value = draw.randint(SMALLEST, largest)
    sentences = [topic.start.format(n=name, a=value)]
    lines: list[str] = []
    for _ in range(steps):
        possible = {sign: numbers for sign in topic.events if (numbers := _numbers(sign, value))}
        if not possible:
            break
        sign = draw.choice(sorted(possible))
        number = draw.choice(possible[sign])
        event = topic.events[sign]
        sentences.append(event.format(n=name, b=number, many=MANY.get(number)))
        after = COMPUTE[sign](value, number)
        lines.append(f"{value} {sign} {number} = {after}")
        value = after
    sentences.append(topic.question.format(n=name))
    solution = "\n".join([*lines, f"#### {value}"])
    prompt = f"Question: {' '.join(sentences)}\nAnswer:"
    return Example(prompt, label, completion=f" {solution}", answer=str(value))


def _numbers(sign: str, value: int) -> Sequence[int]:
    """The second operands with which the operation stays among the whole numbers from 1 on."""
    if sign == "-":
        return range(2, value)
    if sign == "/":
        return [number for number in MANY if value % number == 0]
    return tuple(MANY) if sign == "*" else range(2, 21)


TASK = Task("arithmetic", "language", read, tiny_options={"level": 1, "examples": 120})
