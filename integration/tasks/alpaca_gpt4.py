"""Alpaca-GPT4 (arXiv 2304.03277): instructions with answers that GPT-4 wrote."""

from __future__ import annotations

from integration.tasks import instructions
from integration.tasks.task import HUB, Content, Published, Task


def read(*, source: str = "vicgalle/alpaca-gpt4", topic: str = "") -> Content:
    """Read the data set (columns instruction, input, output); TaskError where it is not there."""
    return instructions.read(source=source, topic=topic)


TASK = Task(
    "alpaca_gpt4",
    "language",
    read,
    # The same number of examples and of bytes as vicgalle/alpaca-gpt4.
    published={"": Published((52002,), 0, HUB + "flwrlabs/alpaca-gpt4")},
    row=instructions.sample_row,
)
