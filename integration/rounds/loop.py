"""One rule through its rounds, each round's state on the disk before the next one begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from integration.rounds.client import Update
from integration.rounds.engine import Engine
from integration.rounds.federation import Federation
from integration.rounds.records import RoundRecord
from integration.rounds.server import Server
from integration.rounds.state import read_state, write_state

FirstRound = dict[str, list[Update]]
"""What the clients trained -> their updates of round 1, which rules of one seed have in common."""


class Observer:
    """Receives the events of one rule's rounds; this class ignores them."""

    def restored(self, records: list[RoundRecord]) -> None:
        """An earlier run had finished these rounds."""

    def step(self) -> None:
        """A client has made an optimizer step."""

    def finished(self, record: RoundRecord) -> None:
        """A round is finished, and its state is on the disk."""

    def warn(self, warning: str) -> None:
        """A resumed run will not give the same bits as one that was never stopped."""


def run_rounds(
    federation: Federation,
    server: Server,
    engine: Engine,
    path: Path,
    *,
    first: FirstRound,
    observer: Observer,
) -> list[RoundRecord]:
    """The records of all rounds; those before the state in `path` are read from there.

    Every rule starts from the same model, data and seeds, so rules that train the same factors
    share the first round.
    """
    records: list[RoundRecord] = []
    if (state := read_state(path)) is not None:
        records, of_server, of_engine = state
        server.restore(of_server)
        for warning in engine.restore(of_engine):
            if len(records) < federation.settings.rounds:
                observer.warn(f"{server.rule.name}: {warning}")
        observer.restored(records)
    for number in range(len(records) + 1, federation.settings.rounds + 1):
        trains = server.trains(number)
        if number == 1 and trains in first:
            updates = first[trains]
            engine.take(updates)
        else:
            updates = engine.train(server, number, observer.step)
        if number == 1:
            first.setdefault(trains, updates)
        record = server.finish(number, updates, federation.evaluate)
        lost = {str(client): reason for client, reason in engine.lost.items()}
        record = replace(record, lost=lost, transfer_ms=engine.transfer_ms)
        records.append(record)
        write_state(path, records, server.state(), engine.state())
        observer.finished(record)
    return records
