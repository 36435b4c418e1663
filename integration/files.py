"""Files that appear whole, and JSON that every parser reads: it has no word for NaN."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: str | bytes) -> None:
    """Replace the file at once: a reader sees the old content or the new one, never a part.

    The content is on the disk before the name is: also a machine that loses power keeps one of the
    two. What an earlier process was killed over (a temporary file) is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    data = content.encode("utf-8") if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(content: Any, *, indent: int | None = None) -> str:
    """The content as JSON, with null for what is not finite (an error beside a zero update)."""
    return json.dumps(finite(content), indent=indent, allow_nan=False)


def finite(content: Any) -> Any:
    """Tables and lists with None in place of NaN and the infinities, which JSON does not have."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content
