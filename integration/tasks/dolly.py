"""Dolly: instructions of eight categories, written by a company's employees."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from integration.tasks import instructions
from integration.tasks.tables import sentence
from integration.tasks.task import HUB, Content, Published, Task


def read(*, source: str = "databricks/databricks-dolly-15k", topic: str = "category") -> Content:
    """Read the data set (columns instruction, context, response, category); TaskError where it is
    not there.
    """
    return instructions.read(source=source, topic=topic)


def _row(draw: Random, place: int, _: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "instruction": sentence(draw, 8),
        "context": sentence(draw, 4) if place % 2 else "",
        "response": sentence(draw, 6),
        "category": f"category {place % 8}",
    }


TASK = Task(
    "dolly",
    "language",
    read,
    # open_qa, general_qa, classification, closed_qa, brainstorming, information_extraction,
    # summarization, creative_writing. Those of classification, summarization and creative_writing
    # are also printed by lionelchg's data sets of one category each (dolly_classification, ...).
    # The shares of the other categories add up to the printed total but were not checked one by
    # one.
    published={
        "": Published(
            (3742, 2191, 2136, 1773, 1766, 1506, 1188, 709),
            0,
            HUB + "agie-ai/databricks-databricks-dolly-15k "
            "(a copy of databricks/databricks-dolly-15k)",
        )
    },
    row=_row,
)
