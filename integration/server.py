"""One rule on the server: clients' adapters in, a record and every client's next start out.

After the aggregation a round goes on in one of two ways:

    continue  the clients start from what the rule sends them, written in their own rank
    merge     the global update is added to the base weights, the clients start afresh: new A, B = 0

A rule with a residual (FedEx) has its residual merged and continues from the average, unless
"merge" is asked for, which merges both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import fedlora_kernels as flk
from integration.client import Client
from integration.model import Model
from integration.settings import Settings
from integration.tokens import Tokens


@dataclass(frozen=True)
class Round:
    """One rule, one round. Bytes are summed over the clients, errors are means over the modules."""

    rule: str
    round: int
    accuracy: float
    loss: float
    relative_error: float
    svd_floor: float
    averaging_error: float | None
    """What averaging the factors (FedIT) of the same adapters would lose; None at unequal ranks."""
    rank: float
    bytes_up: int
    bytes_down: int
    aggregation_ms: float
    modules: dict[str, dict[str, Any]]
    """Module -> rank, relative_error, svd_floor, averaging_error."""


class Server:
    """The state of one rule between rounds: the starts of the clients, and the model's base."""

    def __init__(
        self, rule: flk.Rule, model: Model, clients: Sequence[Client], settings: Settings
    ) -> None:
        model.restore()
        self.rule = rule
        self.starts = fresh_starts(model, clients, settings, 1)
        self._model = model
        self._clients = clients
        self._settings = settings

    def finish(self, number: int, adapters: Sequence[flk.Adapter], test: Tokens) -> Round:
        """Aggregate the clients' adapters of round `number`, judge the result, set the starts."""
        weights = [float(len(client.positions)) for client in self._clients]
        options = self._settings.options.get(self.rule.name, {})
        begun = perf_counter()
        result = flk.aggregate(adapters, rule=self.rule.name, weights=weights, **options)
        milliseconds = 1e3 * (perf_counter() - begun)
        accuracy, loss = self._judge(result, test)
        averaging = (
            None
            if self._settings.heterogeneous
            else flk.aggregate(adapters, rule="fedit", weights=weights).report
        )
        report = result.report
        self._go_on(result, number + 1)
        return Round(
            rule=self.rule.name,
            round=number,
            accuracy=accuracy,
            loss=loss,
            relative_error=report.relative_error,
            svd_floor=report.svd_floor,
            averaging_error=None if averaging is None else averaging.relative_error,
            rank=report.mean_rank,
            bytes_up=sum(result.bytes_up),
            bytes_down=sum(result.bytes_down),
            aggregation_ms=milliseconds,
            modules={
                name: {
                    "rank": module.rank,
                    "relative_error": module.relative_error,
                    "svd_floor": module.svd_floor,
                    "averaging_error": averaging and averaging[name].relative_error,
                }
                for name, module in report.items()
            },
        )

    def _judge(self, result: flk.Aggregation, test: Tokens) -> tuple[float, float]:
        """Accuracy and loss of the global model; of a personal rule, the mean over its clients."""
        if not self.rule.personal:
            return self._model.judge(test, result.adapter, *_residual(result))
        judged = [
            self._model.judge(test, result.client_adapter(client.number))
            for client in self._clients
        ]
        accuracies, losses = zip(*judged, strict=True)
        return sum(accuracies) / len(judged), sum(losses) / len(judged)

    def _go_on(self, result: flk.Aggregation, number: int) -> None:
        """Set what the clients of round `number` start from."""
        fresh = fresh_starts(self._model, self._clients, self._settings, number)
        after = self._settings.after or self.rule.after
        residual = _residual(result)
        if after == "merge" and (self._settings.after or not residual):
            self._model.merge(result.adapter, *residual)
            self.starts = fresh
            return
        self._model.merge(*residual)
        self.starts = [
            result.client_adapter(client.number).fit(template)
            for client, template in zip(self._clients, fresh, strict=True)
        ]


def fresh_starts(
    model: Model, clients: Sequence[Client], settings: Settings, number: int
) -> list[flk.Adapter]:
    """B = 0 beside one common A, drawn from (seed, round); every client has its rank's rows."""
    return [model.fresh(client.rank, settings.seed, number) for client in clients]


def _residual(result: flk.Aggregation) -> list[flk.Adapter]:
    return [] if result.residual is None else [result.residual]
