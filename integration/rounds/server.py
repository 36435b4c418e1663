"""One rule on the server: clients' updates in, a record and every client's next start out.

After the aggregation a round goes on in one of two ways:

    continue  the clients start from what the rule sends them, written in their own rank
    merge     the global update is added to the base weights, the clients start afresh: new A, B = 0

A rule with a residual (FedEx) has its residual merged and continues from the average, unless
"merge" is asked for, which merges both.

A client that sits a round out loses nothing: it starts from what was sent last when it comes back,
with its own B where the rule is personal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

import fedlora_kernels as flk
from integration.model.model import Model
from integration.model.serialize import (
    Serialized,
    deserialize,
    deserialize_memory,
    reread,
    serialize,
    serialize_memory,
)
from integration.model.total import total
from integration.rounds.client import Client, Update
from integration.rounds.evaluate import Score
from integration.rounds.records import RoundRecord
from integration.rounds.rule import plain_average, trained
from integration.rounds.traffic import traffic
from integration.settings import Settings

SPECTRUM = 16
"""So many singular values of every module are recorded."""

Evaluate = Callable[..., Score]
"""(adapters..., client=None) -> score on the test split, or on the client's own test examples."""


class Server:
    """The state of one rule between rounds: what was sent, what was merged, who keeps which B, and
    what the rule itself carries to its next round.
    """

    def __init__(
        self, rule: flk.Rule, model: Model, clients: Sequence[Client], settings: Settings
    ) -> None:
        model.restore()
        self.rule = rule
        self.own: dict[int, flk.Adapter] = {}
        self.merged: list[flk.Adapter] = []
        self._sent: flk.Delivery | None = None
        self._carried: Any = None
        self._model = model
        self._clients = clients
        self._settings = settings
        self._fitted: dict[int, flk.Adapter] = {}

    def trains(self, number: int) -> str:
        """The factors that the clients train in round `number`: "both", "a" or "b"."""
        return trained(self.rule, self._settings, number)

    def start(self, client: Client, number: int) -> flk.Adapter:
        """What a client starts round `number` from."""
        if not self.rule.personal and client.rank in self._fitted:
            return self._fitted[client.rank]
        start = self._model.fresh(client.rank, self._settings.seed, number)
        if self._sent is not None:
            start = self._received(client, start)
        if not self.rule.personal:
            self._fitted[client.rank] = start
        return start

    def _received(self, client: Client, fresh: flk.Adapter) -> flk.Adapter:
        """What was sent last, in the client's own rank."""
        assert self._sent is not None
        if not self._sent.adapter.state_dict().keys() - self._sent.adapter.extras.keys():
            return flk.Adapter(fresh.factors, fresh.config, extras=self._sent.adapter.extras)
        own = self.own.get(client.number, fresh)
        received = self._sent.received(own)
        return received if received.vera else received.fit(fresh)

    def finish(self, number: int, updates: Sequence[Update], evaluate: Evaluate) -> RoundRecord:
        """Aggregate the updates of round `number`, evaluate the result, set what comes next.

        The rule, the average of the same adapters, the report and the spectra read one
        `flk.Round`, so each batch of modules has its Gram matrices computed once.
        """
        weights = [float(update.examples) for update in updates]
        adapters = [update.adapter for update in updates]
        begun = self._now()
        round_ = flk.Round(adapters, weights=weights)
        result = round_.aggregate(self.rule, carried=self._carried)
        aggregated = self._now()
        average = None
        if not self._settings.heterogeneous and not adapters[0].vera:
            plain = plain_average()
            average = result if self.rule == plain else round_.aggregate(plain)
        report = result.report
        averaging = None if average is None else average.report
        spectra = _spectra(round_)
        due = number % self._settings.evaluate_every == 0 or number == self._settings.rounds
        compared = perf_counter()
        scores = self._scores(result, average, updates, evaluate) if due else {}
        evaluated = perf_counter()
        up, down = traffic(result.delivery, adapters, self.trains(number))
        record = RoundRecord(
            rule=self.rule.name,
            seed=self._settings.seed,
            round=number,
            clients=[update.client for update in updates],
            relative_error=report.relative_error,
            svd_floor=report.svd_floor,
            averaging_error=None if averaging is None else averaging.relative_error,
            rank=report.mean_rank,
            bytes_up=up,
            bytes_down=down,
            train_loss=sum(u.loss * u.examples for u in updates) / sum(weights),
            training_ms=1e3 * sum(update.seconds for update in updates),
            aggregation_ms=1e3 * (aggregated - begun),
            evaluation_ms=1e3 * (evaluated - compared),
            modules={
                name: {
                    "rank": module.rank,
                    "relative_error": module.relative_error,
                    "svd_floor": module.svd_floor,
                    "averaging_error": averaging and averaging[name].relative_error,
                    "spectrum": spectra.get(name, []),
                }
                for name, module in report.items()
            },
            **scores,
        )
        self._go_on(result.delivery, updates)
        # As it reads from a state file, so that a run that goes on has the same bits.
        memory = serialize_memory(result.carried)
        self._carried = deserialize_memory(memory, self._model.device)
        return record

    def _now(self) -> float:
        """Seconds, after what a GPU was asked to do is done."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return perf_counter()

    def _scores(
        self,
        result: flk.Aggregation,
        average: flk.Aggregation | None,
        updates: Sequence[Update],
        evaluate: Evaluate,
    ) -> dict[str, Any]:
        """The fields of a record that need a test.

        Of a personal rule accuracy and loss are the means over the round's clients, and the global
        model is the clients' mean update. A client's own test is taken by the model that it runs.
        """
        tested = [(k, self._clients[update.client]) for k, update in enumerate(updates)]
        if self.rule.personal:
            models = [(client, [result.client_adapter(k)]) for k, client in tested]
            scores = [evaluate(*adapters) for _, adapters in models]
            accuracy = sum(score.accuracy for score in scores) / len(scores)
            loss = sum(score.loss for score in scores) / len(scores)
            texts = scores[0].texts
            whole = None if average is None else evaluate(average.adapter)
        else:
            sent = [result.adapter, *_residual(result.delivery)]
            models = [(client, sent) for _, client in tested]
            whole = evaluate(*sent)
            accuracy, loss, texts = whole.accuracy, whole.loss, whole.texts
        own = {c.number: evaluate(*adapters, client=c) for c, adapters in models if c.tests}
        return {
            "accuracy": accuracy,
            "loss": loss,
            "global_accuracy": None if whole is None else whole.accuracy,
            "texts": list(texts),
            "client_accuracy": {str(number): score.accuracy for number, score in own.items()},
        }

    def _go_on(self, delivery: flk.Delivery, updates: Sequence[Update]) -> None:
        """Set what the clients of the next round start from."""
        after = self._settings.after or self.rule.after
        residual = _residual(delivery)
        self._fitted.clear()
        if self.rule.personal:
            self.own |= {update.client: reread(update.adapter) for update in updates}
        if after == "merge" and (self._settings.after or not residual):
            self._merge(delivery.adapter, *residual)
            heads = delivery.adapter.extras
            self._sent = _reread(delivery, _empty(delivery.adapter)) if heads else None
        else:
            self._merge(*residual)
            self._sent = _reread(delivery, delivery.adapter)

    def _merge(self, *adapters: flk.Adapter) -> None:
        for adapter in map(reread, adapters):
            self._model.merge(adapter)
            self.merged.append(adapter)

    # ---- the end, and a state in between -------------------------------------------------------

    def final(self) -> flk.Adapter:
        """The global update on the base as it was loaded: all that was merged, and what was sent.

        Of a personal rule the shared A beside B = 0.
        """
        sent = [] if self._sent is None else [self._sent.adapter]
        return total([*self.merged, *sent])

    def personal(self) -> dict[int, flk.Adapter]:
        """Of a personal rule, what every client that has taken part runs."""
        return {
            client.number: self.start(client, self._settings.rounds + 1)
            for client in self._clients
            if client.number in self.own
        }

    def state(self) -> dict[str, Any]:
        """Everything that the next round needs, as plain tensors and JSON types."""
        sent = self._sent
        return {
            "sent": None if sent is None else {**serialize(sent.adapter), "heads": sent.heads},
            "own": {number: serialize(adapter) for number, adapter in self.own.items()},
            "merged": [serialize(adapter) for adapter in self.merged],
            "carried": serialize_memory(self._carried),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the model's base is merged anew, in the order of the rounds."""

        def here(serialized: Serialized) -> flk.Adapter:
            return deserialize(serialized, self._model.device)

        self._model.restore()
        self._fitted.clear()
        sent = state["sent"]
        self._sent = None
        if sent is not None:
            self._sent = flk.Delivery(self.rule, here(sent), heads=sent["heads"])
        self.own = {number: here(serialized) for number, serialized in state["own"].items()}
        self.merged = [here(serialized) for serialized in state["merged"]]
        self._model.merge(*self.merged)
        self._carried = deserialize_memory(state.get("carried"), self._model.device)


def _spectra(round_: flk.Round) -> dict[str, list[float]]:
    """The leading singular values of every module's ideal update, six digits; none of VeRA's."""
    if round_.clients[0].vera:
        return {}
    found = round_.inspect().modules
    return {
        name: [float(f"{value:.6g}") for value in module.sigma[:SPECTRUM]]
        for name, module in found.items()
    }


def _residual(delivery: flk.Delivery) -> list[flk.Adapter]:
    return [] if delivery.residual is None else [delivery.residual]


def _reread(delivery: flk.Delivery, adapter: flk.Adapter) -> flk.Delivery:
    """The delivery of this adapter as it reads from a file, so that a run that goes on has the same
    bits. A residual is in the base by now.
    """
    return replace(delivery, adapter=reread(adapter), residual=None)


def _empty(adapter: flk.Adapter) -> flk.Adapter:
    """The adapter without an update: its averaged heads go on where its factors were merged."""
    return flk.Adapter({}, adapter.config, extras=adapter.extras)
