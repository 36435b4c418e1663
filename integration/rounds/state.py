"""The state of one rule after a finished round, in one file that is replaced as a whole.

A run killed at any moment finds the last finished round's file when it is resumed. Randomness needs
no place in it: every draw is decided by (seed, round, client). What a file holds is what the next
round reads: what was sent, what was merged, the clients' own parts, AdamW's moments where clients
keep them, and the records of the rounds so far.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from integration import files
from integration.rounds.records import RoundRecord
from integration.settings import SettingsError

FORMAT = 2


def place(out: Path, rule: str, seed: int) -> Path:
    """Where a rule's state lies in a run's folder."""
    return out / "state" / f"seed-{seed}" / f"{rule}.pt"


def write_state(
    path: Path, rounds: list[RoundRecord], server: dict[str, Any], engine: dict[str, Any]
) -> None:
    """Write the state after the last of these rounds."""
    content = {
        "format": FORMAT,
        "rounds": [dataclasses.asdict(entry) for entry in rounds],
        "server": server,
        "engine": engine,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    files.write(path, buffer.getvalue())


def read_state(path: Path) -> tuple[list[RoundRecord], dict[str, Any], dict[str, Any]] | None:
    """The rounds, the server's part and the engine's part, or None where no round was finished.

    Raises SettingsError for a file that another version wrote, or that is damaged.
    """
    if not path.is_file():
        return None
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        found = content["format"]
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        raise SettingsError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); start without --resume"
        ) from None
    if found != FORMAT:
        raise SettingsError(f"{path} has format {found}, expected {FORMAT}; start without --resume")
    rounds = [RoundRecord(**entry) for entry in content["rounds"]]
    return rounds, content["server"], content["engine"]
