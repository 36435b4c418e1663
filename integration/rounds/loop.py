"""One rule through its rounds, each round's state on the disk before the next one begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from integration.rounds.client import Update
from integration.rounds.engine import Engine
from integration.rounds.federation import Federation
from integration.rounds.records import Round
from integration.rounds.server import Server
from integration.rounds.state import read_state, write_state

FirstRound = dict[str, list[Update]]
"""What the clients trained -> their updates of round 1, which rules of one seed have in common."""


def run_rounds(
    federation: Federation,
    server: Server,
    engine: Engine,
    path: Path,
    *,
    first: FirstRound,
    on_step: Callable[[], None] = lambda: None,
    on_round: Callable[[list[Round]], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> list[Round]:
    """The records of all rounds; those before the state in `path` are read from there.

    `on_round` is told the records so far, after they are on the disk. Every rule starts from the
    same model, data and seeds, so rules that train the same factors share the first round. `warn`
    is told what keeps a run that goes on from the bits of one that was never stopped.
    """
    rounds: list[Round] = []
    if (state := read_state(path)) is not None:
        rounds, of_server, of_engine = state
        server.restore(of_server)
        for warning in engine.restore(of_engine):
            if len(rounds) < federation.settings.rounds:
                warn(f"{server.rule.name}: {warning}")
        on_round(rounds)
    for number in range(len(rounds) + 1, federation.settings.rounds + 1):
        trains = server.trains(number)
        if number == 1 and trains in first:
            updates = first[trains]
            engine.take(updates)
        else:
            updates = engine.train(server, number, on_step)
        if number == 1:
            first.setdefault(trains, updates)
        record = server.finish(number, updates, federation.evaluate)
        lost = {str(client): reason for client, reason in engine.lost.items()}
        rounds.append(replace(record, lost=lost, transfer_ms=engine.transfer_ms))
        write_state(path, rounds, server.state(), engine.state())
        on_round(rounds)
    return rounds
