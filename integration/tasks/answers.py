"""What counts as the same answer: numbers after ####, the contents of a box."""

from __future__ import annotations

import re

from integration.tasks.task import Example

_AFTER = re.compile(r"####\s*(-?[\d.,]*\d)")


def after_hashes(text: str) -> str | None:
    """The number after the first ####, in its plainest form: "1,200.0" is "1200"; None without."""
    found = _AFTER.search(text)
    if found is None:
        return None
    number = found[1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def boxed(text: str) -> str | None:
    r"""The contents of the last \\boxed{...}, braces balanced, without blanks; None without one."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            inside = text[start + 7 : place]
            return re.sub(r"\s|\\[,!;]|\\left|\\right", "", inside).replace("dfrac", "frac")
    return None


def same_number(example: Example, text: str) -> bool:
    """Whether the text ends in the example's number after ####."""
    return after_hashes(text) == example.answer


def same_box(example: Example, text: str) -> bool:
    r"""Whether the text's \\boxed{} holds the example's answer."""
    return boxed(text) == example.answer
