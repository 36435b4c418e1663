"""Instructions and answers: any data set in TRL's conventions.

Columns are recognized in this order: `messages` (the last turn must be the assistant's; it is the
completion), `prompt` and `completion` (texts or lists of messages), or `instruction` with
`context`/`input` and `response`/`output`. Conversations go through the tokenizer's chat template,
and only the completion counts in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from integration.tasks.tables import Row, Table, sentence
from integration.tasks.task import HUB, Content, Example, Published, Task, TaskError

Turns = tuple[tuple[str, str], ...]


def read(*, source: str = "", topic: str = "") -> Content:
    """Read the data set `source`; `topic` is the column by which clients may differ.

    Raises TaskError where it is not there or has other columns.
    """
    if not source:
        raise TaskError("task instructions needs the option source: a hub id, a folder or a file")
    table = Table.read(source, needs=(topic,) if topic else ())
    topics = table.values(topic) if topic else ("instructions",)

    def example(row: Row) -> Example:
        prompt, completion = _parts(row, source)
        label = topics.index(str(row[topic])) if topic else 0
        if isinstance(prompt, str):
            return Example(prompt, label, completion=completion)
        return Example("", label, completion=completion, turns=prompt)

    return table.content(topics, example)


def _parts(row: Row, source: str) -> tuple[str | Turns, str]:
    """Prompt and completion of a row."""
    if row.get("messages"):
        return _conversation(row["messages"], source)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return prompt, str(completion)
        return _conversation([*prompt, *completion], source)
    answer = row.get("output") if row.get("response") is None else row["response"]
    if "instruction" in row and answer is not None:
        more = row.get("context") or row.get("input")
        asked = f"{row['instruction']}\n\n{more}" if more else str(row["instruction"])
        return (("user", asked),), str(answer)
    raise TaskError(
        f"data set {source!r} has the columns {', '.join(sorted(row))}; expected messages, or "
        "prompt and completion, or instruction and response (output)"
    )


def _conversation(messages: list[dict[str, Any]], source: str) -> tuple[Turns, str]:
    *before, last = ((str(turn["role"]), str(turn["content"])) for turn in messages)
    if last[0] != "assistant" or not before:
        raise TaskError(
            f"data set {source!r}: a conversation of {len(messages)} turns ends with the "
            f"{last[0]}'s; expected an assistant's turn after others"
        )
    return tuple(before), last[1]


def sample_row(draw: Random, place: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """A row in the columns instruction and output, with the column of the topic if there is one."""
    row: dict[str, Any] = {"instruction": sentence(draw, 8), "output": sentence(draw, 6)}
    return row | ({options["topic"]: f"topic {place % 8}"} if options.get("topic") else {})


TASK = Task(
    "instructions",
    "language",
    read,
    variant="source",
    published={
        # Printed in thousands: 70k rows.
        "WizardLM/WizardLM_evol_instruct_70k": Published(
            (70000,), 0, HUB + "WizardLMTeam/WizardLM_evol_instruct_70k"
        ),
    },
    row=sample_row,
)
