"""The ClientApp: one round of the local engine's own training on a Flower node.

A node is client number `partition-id` of its node config. Everything else comes with the message,
so a node may start, stop and come back at any time. What stays on the node, in its context and for
as long as the run lasts, is what belongs to the client or was sent once: the updates merged into
its base, AdamW's moments where it keeps them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from integration.model.model import Model
    from integration.model.trainer import LocalTrainer, Moments
    from integration.rounds.federation import Federation

app = ClientApp()

CLIENT = "partition-id"
"""The key of a node's config that says which client it is; Flower's simulation sets it."""


@app.query()
def who(message: Message, context: Context) -> Message:
    """Answer with the client's number, without loading anything."""
    if CLIENT not in context.node_config:
        raise ValueError(f"start this node with --node-config '{CLIENT}=NUMBER'")
    number = int(context.node_config[CLIENT])
    content = RecordDict({"client": ConfigRecord({"number": number})})
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the adapter in the message; answer with the update and its figures."""
    from fedlora_kernels.interop.exchange import CONFIG, MERGES
    from fedlora_kernels.interop.flower import from_arrays, to_arrays
    from integration.model.serialize import deserialize

    round_: dict[str, Any] = dict(message.content.config_records["config"])
    place = _place(round_["settings"])
    federation = place.federation.with_seed(round_["seed"]).at(round_["learning-rate"])
    number, trains = round_["number"], round_["trains"]
    client = federation.clients[int(context.node_config[CLIENT])]
    kept = _Kept(context.state, round_["label"], round_["seed"], round_["rule"])
    kept.receive(message.content, round_["merged"])
    place.merge(kept, federation.model)
    device = federation.model.device
    start = {
        "tensors": from_arrays(message.content.array_records["arrays"]),
        "config": json.loads(round_[CONFIG]),
    }
    update = client.train(
        federation.model,
        place.trainer,
        federation.train,
        deserialize(start, device),
        number,
        federation.settings,
        trains,
        kept.moments(number, trains, device),
    )
    if update.moments is not None:
        kept.keep(number, trains, update.moments)
    content = RecordDict(
        {
            "arrays": to_arrays(update.adapter.state_dict()),
            "metrics": MetricRecord(
                {
                    "client": client.number,
                    "num-examples": update.examples,
                    "loss": update.loss,
                    "seconds": update.seconds,
                }
            ),
            "config": ConfigRecord({MERGES: True}),
        }
    )
    return Message(content, reply_to=message)


@dataclass
class _Place:
    """What a process keeps between messages: the task, the model, the trainer."""

    federation: Federation
    trainer: LocalTrainer
    merged: tuple[str, int] = ("", 0)
    """What the model's base carries: whose merged updates, and how many of them."""

    def merge(self, kept: _Kept, model: Model) -> None:
        """Bring the base to the node's merged updates, in the order of the rounds."""
        wanted = (kept.prefix, kept.merged)
        if self.merged != wanted:
            model.restore()
            model.merge(*kept.updates(model))
            self.merged = wanted


@lru_cache(maxsize=1)
def _place(settings: str) -> _Place:
    """Built by the first message of a process; a run has one settings text."""
    from integration.model.trainer import LocalTrainer
    from integration.rounds.federation import Federation
    from integration.settings import from_values

    federation = Federation.build(from_values(json.loads(settings), "the round's settings"))
    return _Place(federation, LocalTrainer(federation.model, federation.settings))


class _Kept:
    """The node's records of one seed and rule; those of others are dropped.

    merged/LABEL/RULE/SEED/NUMBER     an update that the clients merge into their base
    moments/LABEL/SEED/RULE/TRAINS    AdamW's state after the last round; of round 1 RULE is empty,
                                      as rules that train the same factors share their first round

    LABEL is the trial, or the runs, at one learning rate.
    """

    def __init__(self, state: RecordDict, label: str, seed: int, rule: str) -> None:
        self._state = state
        self._label, self._seed, self._rule = label, seed, rule
        self.prefix = f"merged/{label}/{rule}/{seed}/"
        for key in [key for key in state if key.startswith("merged/")]:
            if not key.startswith(self.prefix):
                del state[key]

    @property
    def merged(self) -> int:
        """How many merged updates the node holds."""
        return sum(key.startswith(self.prefix) for key in self._state.array_records)

    def receive(self, content: RecordDict, merged: int) -> None:
        """Store the message's merged updates, the last of the `merged` that there are."""
        sent = [key for key in content.array_records if key.startswith("merged/")]
        first = merged - len(sent)
        if first > self.merged:
            raise LookupError(
                f"this node holds {self.merged} of the first {first} merged updates; send them all"
            )
        for key in [key for key in self._state if key.startswith(self.prefix)]:
            if int(key[len(self.prefix) :].split(".")[0]) >= first:
                del self._state[key]
        for key in sent:
            name = self.prefix + key.removeprefix("merged/")
            self._state[name] = content[key]
            self._state[f"{name}.config"] = content[f"{key}.config"]

    def updates(self, model: Model) -> list[Any]:
        """The merged updates, in their order."""
        from fedlora_kernels.interop.flower import read_adapter
        from integration.model.serialize import reread

        names = [f"{self.prefix}{place}" for place in range(self.merged)]
        return [reread(read_adapter(self._state, name), model.device) for name in names]

    def moments(self, number: int, trains: str, device: Any) -> Moments | None:
        """AdamW's state after the client's last round before `number`."""
        from integration.flower.moments import read_moments

        for earlier in (number - 1, 1) if number > 1 else ():
            if (record := self._state.array_records.get(self._key(earlier, trains))) is not None:
                return read_moments(record, device)
        return None

    def keep(self, number: int, trains: str, moments: Moments) -> None:
        """Store the state after round `number`, in place of earlier ones."""
        from integration.flower.moments import write_moments

        self._state[self._key(number, trains)] = write_moments(moments)

    def _key(self, number: int, trains: str) -> str:
        return f"moments/{self._label}/{self._seed}/{'' if number == 1 else self._rule}/{trains}"
