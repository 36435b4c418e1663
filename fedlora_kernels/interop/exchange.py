"""Exchange: the clients' tensors in, each client's next start out, round after round.

What the servers of Flower and NVFlare have in common: which tensors a client was sent and may send
back, why a client is not in a round, what everyone receives in its own rank, what the server keeps
for the next round, and the file from which a restarted server goes on.

    exchange.give(arrays)                     what a client starts from of which nothing is known
    exchange.start(client)                    what a client is sent
    exchange.receive(client, reply)           what it sends back; exchange.lose(client, why)
    result = exchange.finish()                the round's Aggregation
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from fedlora_kernels import robust as robust_rules
from fedlora_kernels import rules
from fedlora_kernels._aggregation import Aggregation
from fedlora_kernels._delivery import Delivery
from fedlora_kernels._round import Round
from fedlora_kernels._saved import restored, restored_memory, saved, saved_memory
from fedlora_kernels.adapters import keys, peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.kinds import experts
from fedlora_kernels.adapters.peft_format import Config, label
from fedlora_kernels.adapters.scratch import mapped_tensors
from fedlora_kernels.robust import Robust
from fedlora_kernels.rules import Rule

Client = int | str
"""A client as its framework knows it."""

Name = TypeVar("Name", int, str)
"""A client as one framework knows it."""

FORMAT = 2

CONFIG, MERGES = "adapter_config", "merges"
"""What a client may say beside its tensors: its config, and whether it merges what it is sent."""


@dataclass(frozen=True)
class Reply:
    """What a client sends back."""

    tensors: Mapping[str, Tensor]
    """under PEFT's keys"""
    weight: float
    """number of examples, or of steps"""
    config: Config | None = None
    """the adapter's config, or what of it says its ranks and alphas"""
    merges: bool = False
    """whether the client merges what it is sent into its base model"""


@dataclass(frozen=True)
class Start:
    """What a client is sent."""

    tensors: Mapping[str, Tensor]
    trains: str
    """the factors to train: both, a or b"""
    updates: Mapping[int, Adapter]
    """place -> an update to be merged into the base, each once, in the order of the places"""


class Exchange:
    """The state of a server between rounds.

    Args:
        rule: a rule of ``flk.rules``, or the name of one; the command line's when None.
        options: of a rule given by name.
        adapter_config: of clients that send none; a PEFT config or the mapping of its JSON.
        same_base: whether the clients have one base model whatever their configs call it.
        device: where the work is done.
        magnitudes: "average" admits DoRA, see :class:`Round`; None refuses it.
        state: the file to go on from, written after every round; None keeps nothing.
        memory_limit: as for :class:`fedlora_kernels.Round`. What clients send is then put into
            unnamed files when it is received, and mapped.
        scratch: folder for those files; the system's temporary folder when None.
        robust: a robust rule of ``flk.robust``, or the name of one, that weighs the clients.
        robust_options: of a robust rule given by name.

    Raises:
        ValueError: the rule or the robust rule is unknown, an option is out of range, the robust
            rule's weights do not reach the rule, or memory_limit is under 1.
        TypeError: there is no such option; or rule is neither a name nor a rule.
        AdapterError: the file cannot be read, or is that of another rule.
    """

    any_rank = True
    """Whether a client whose config is known may send another rank than it was sent."""

    def __init__(
        self,
        rule: str | Rule | None,
        options: Mapping[str, Any] | None = None,
        *,
        adapter_config: object = None,
        same_base: bool = False,
        device: torch.device | str | None = None,
        magnitudes: str | None = None,
        state: str | Path | None = None,
        memory_limit: int | None = None,
        scratch: str | Path | None = None,
        robust: str | Robust | None = None,
        robust_options: Mapping[str, Any] | None = None,
    ) -> None:
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit must be at least 1 byte, found {memory_limit}")
        if rule is None:
            rule = rules.preferred()
        if not isinstance(rule, (str, Rule)):
            raise TypeError(f"rule must be a rule or the name of one, found {rule!r}")
        self.rule = rules.make(rule, **(options or {}))
        self.robust = None
        """the robust rule that weighs the clients, if any"""
        if robust is not None:
            self.robust = robust_rules.make(robust, **(robust_options or {}))
            self.robust.refuse(self.rule)
        elif robust_options:
            raise TypeError(f"robust_options are given, and no robust rule: {robust_options}")
        self.round = 0
        """how many rounds are finished"""
        self.lost: dict[Client, str] = {}
        """client -> why it is not in the last round"""
        self.result: Aggregation | None = None
        """of the last round"""
        self.arrays: dict[str, Tensor] = {}
        """what a client starts from of which nothing is known"""
        self._config = None if adapter_config is None else _lora(peft_format.plain(adapter_config))
        self._memory_limit, self._scratch = memory_limit, scratch
        self._round_settings: dict[str, Any] = {
            "same_base": same_base,
            "device": device,
            "magnitudes": magnitudes,
            "memory_limit": memory_limit,
            "scratch": scratch,
        }
        self._replies: dict[Client, Reply] = {}
        self._started: dict[Client, dict[str, Tensor]] = {}
        self._ready: dict[int, dict[str, Tensor]] = {}
        self._delivery: Delivery | None = None
        self._carried: Any = None
        self._own: dict[Client, Adapter] = {}
        self._keys: dict[Client, list[str]] = {}
        self.merged: list[Adapter] = []
        """the updates that clients merge into their base, of all rounds"""
        self._afresh = False
        """whether the last update lies in the base as a whole, so that clients start from B = 0"""
        self._has: dict[Client, int] = {}
        self._path = None if state is None else Path(state)
        if self._path is not None and self._path.is_file():
            self._restore(self._path)

    # ---- what clients are sent -----------------------------------------------------------------

    @property
    def trains(self) -> str:
        """The factors that clients train in the coming round: "both", "a" or "b"."""
        if self.rule.trains == "alternate":
            return "a" if self.round % 2 else "b"
        return self.rule.trains

    def give(self, arrays: Mapping[str, Tensor]) -> None:
        """What a client is sent of which nothing is known: the server's initial tensors."""
        self.arrays = _plain(arrays)

    def start(self, client: Client) -> Start:
        """What a client is sent, in the ranks, scalings and dtype in which it last sent its own."""
        tensors = self.tensors(client)
        self._started[client] = tensors
        first = self._has.get(client, 0)
        updates = {place: self.merged[place] for place in range(first, len(self.merged))}
        return Start(tensors, self.trains, updates)

    def tensors(self, client: Client) -> dict[str, Tensor]:
        """What a client trains from: the result of the round before, as it fits the client."""
        own = self._own.get(client)
        if own is None or self._delivery is None:
            return self.arrays
        if id(own) not in self._ready:
            self._ready[id(own)] = self._received(own, label_of(client)).state_dict()
        ready = self._ready[id(own)]
        return {key: ready[key] for key in self._keys[client] if key in ready}

    def _received(self, own: Adapter, who: str) -> Adapter:
        assert self._delivery is not None
        if self._afresh:
            zero = {key: torch.zeros_like(x) for key, x in own.factor_tensors("b").items()}
            extras = self._delivery.received(own, who).extras
            tensors = {**own.state_dict(), **extras, **zero}
            return Adapter.from_state_dict(tensors, own.config)
        received = self._delivery.received(own, who)
        if received.vera:
            return received
        try:
            return received.fit(own)
        except AdapterError as error:
            raise AdapterError(f"{who}, {error}") from None

    # ---- what clients send back ----------------------------------------------------------------

    def receive(self, client: Client, reply: Reply) -> None:
        """A client's reply; it is looked at in :meth:`finish`. One that is lost stays lost."""
        if client in self.lost:
            return
        if client in self._replies:
            self.lose(client, "it replied twice")
            return
        try:
            self._replies[client] = replace(reply, tensors=_plain(reply.tensors))
        except AdapterError as error:
            self.lose(client, str(error))

    def put_aside(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a client sends: in a file and mapped where memory is limited, else as it is."""
        if self._memory_limit is None or not tensors:
            return tensors
        return mapped_tensors(tensors, self._scratch)

    def lose(self, client: Client, why: str) -> None:
        """Leave a client out of the round."""
        self._replies.pop(client, None)
        self._has.pop(client, None)  # whatever it holds: it is sent everything next time
        self.lost[client] = why

    def begin(self) -> None:
        """Forget the replies and the losses of the round before."""
        self._replies, self.lost = {}, {}

    def finish(self) -> Aggregation:
        """Aggregate the usable replies; the others are in :attr:`lost`.

        Raises:
            AdapterError: no client is left, or the rest cannot be aggregated; the message says why
                for each. The state is that before the round.
        """
        number = self.round + 1
        adapters = self.usable()
        weights = {client: self._replies[client].weight for client in adapters}
        result = None
        while result is None:
            if not adapters:
                why = "; ".join(f"{label_of(client)}: {said}" for client, said in self.lost.items())
                raise AdapterError(f"round {number} has no client left: {why or 'none replied'}")
            try:
                round_ = Round(
                    list(adapters.values()),
                    weights=[weights[client] for client in adapters],
                    **self._round_settings,
                )
                result = round_.aggregate(self.rule, carried=self._carried, robust=self.robust)
            except AdapterError as error:
                client = _blamed(str(error), adapters)
                if client is None:
                    raise
                self.lose(client, str(error))
                del adapters[client]
        self._go_on(result, adapters)
        return result

    def usable(self) -> dict[Client, Adapter]:
        """The adapters of the replies that can be used, in the order of the clients; the clients
        of the other replies are lost.
        """
        order = sorted(self._replies, key=lambda client: (isinstance(client, str), client))
        told = [client for client in order if self._replies[client].config is not None]
        few = 2 * len(told) < len(order) and self._config is None
        common = _commonest([self._replies[client].tensors for client in order])
        adapters = {}
        for client in order:
            reply = self._replies[client]
            try:
                if few and reply.config is not None:
                    raise AdapterError(
                        "it sends adapter_config, and most clients send none: their scalings are "
                        "unknown beside its own; give the server adapter_config="
                    )
                if not few and told and reply.config is None and self._config is None:
                    raise AdapterError(
                        f"it sends no adapter_config, and {label_of(told[0])} sends one: its "
                        "scalings are unknown"
                    )
                adapters[client] = self._adapter(client, reply, common)
                self._has[client] = len(self.merged)
            except AdapterError as error:
                self.lose(client, str(error))
        return adapters

    def _adapter(self, client: Client, reply: Reply, common: Mapping[str, Tensor]) -> Adapter:
        """A client's adapter. Raises AdapterError with the reason why its reply cannot be used."""
        if self.rule.after == "merge" and not reply.merges:
            raise AdapterError(
                f"rule {self.rule.name} merges its result into the base model: the client must "
                "declare that it does so (merges); or choose another rule"
            )
        if not (math.isfinite(reply.weight) and reply.weight >= 0):
            raise AdapterError(f"its weight is {reply.weight}, expected a finite number >= 0")
        own = {} if client not in self._own else self._own[client].state_dict()
        base = self._started.get(client) or own or self.arrays
        whole = {**own, **base} or dict(common)
        config = self._config if reply.config is None else _lora(reply.config)
        free = self.any_rank and config is not None and self.rule.heterogeneous
        tensors = dict(reply.tensors)
        if not tensors:
            raise AdapterError("it sends no tensors")
        for key, tensor in whole.items():  # what need not travel is what it was sent
            factor = keys.factor(key)
            if factor is not None and not self._travels(factor.side):
                tensors.setdefault(key, tensor)
        if reason := difference(tensors, whole, free_rank=free):
            raise AdapterError(reason)
        fixed = {"a": "B", "b": "A"}.get(self.trains)
        for key, tensor in self._started.get(client, {}).items():
            factor = keys.factor(key)
            if factor is None or factor.side != fixed:
                continue
            if tensors[key].shape != tensor.shape or not torch.equal(tensors[key], tensor):
                only = self.trains.upper()
                raise AdapterError(f"{key} differs from what it was sent; only {only} is trained")
        who = label_of(client)
        try:
            adapter = Adapter.from_state_dict(tensors, config or _assumed(tensors), name=who)
        except AdapterError as error:
            raise AdapterError(
                str(error).removeprefix(f"{who}: ").removeprefix(f"{who}, ")
            ) from None
        for module, item in adapter.factors.items():
            if item.scaling == 0:
                raise AdapterError(f"module {module}: scaling 0, with which no update reaches it")
        return adapter

    def _travels(self, side: str) -> bool:
        """Whether a factor, or what stands beside it, is in every reply."""
        sends = self.rule.sends
        return sends == "both" or (side.upper() in ("A", "D") if sends == "a" else side != "A")

    # ---- from round to round -------------------------------------------------------------------

    def _go_on(self, result: Aggregation, adapters: Mapping[Client, Adapter]) -> None:
        """The state after the round, all of it or nothing."""
        before = {
            name: value.copy() if isinstance(value, (dict, list)) else value
            for name, value in vars(self).items()
        }
        try:
            self._advance(result, adapters)
        except BaseException:
            vars(self).update(before)
            raise

    def _advance(self, result: Aggregation, adapters: Mapping[Client, Adapter]) -> None:
        sent_keys = {client: list(self._replies[client].tensors) for client in adapters}
        self.result, self.round = result, self.round + 1
        # As it reads from the file, so that a restarted server has the same bits.
        self._carried = restored_memory(saved_memory(result.carried))
        self._delivery = _reread(result.delivery)
        if self.rule.after == "merge":
            rest = result.residual
            self._afresh = rest is None
            self.merged.append(restored(saved(result.adapter if rest is None else rest)))
        back = list(self._delivery.returned(self._delivery.adapter))
        templates = {_signature(own): own for own in self._own.values()}
        if not self._differs:
            for client, adapter in reversed(list(adapters.items())):
                templates[_signature(adapter)] = self._template(client, adapter)
            self._own = {client: templates[_signature(own)] for client, own in self._own.items()}
        for client, adapter in adapters.items():
            self._own[client] = adapter if self._differs else templates[_signature(adapter)]
            mine = sent_keys[client]
            self._keys[client] = list(dict.fromkeys([*mine, *(k for k in back if "lora_" in k)]))
        self._ready = {}
        self._started = {}
        if not self._afresh:
            self.arrays = self._common()
        else:
            beside = self._delivery.adapter.extras
            self.arrays |= {key: beside[key] for key in self.arrays if key in beside}
        if self._path is not None:
            _write(self._path, self._saved())

    def _template(self, client: Client, adapter: Adapter) -> Adapter:
        """What the next start is fitted to: ranks above the result's keep the rows of A that the
        client was sent, so that they do not depend on which client is the first.
        """
        tensors = {**adapter.state_dict(), **self._started.get(client, {})}
        if difference(tensors, adapter.state_dict()) is not None:  # it was sent another rank
            return adapter
        return Adapter.from_state_dict(tensors, adapter.config)

    @property
    def _differs(self) -> bool:
        """Whether a client's own tensors belong to what it receives, beside its ranks."""
        return self.rule.personal or (
            self._delivery is not None and self._delivery.heads == "local"
        )

    def _common(self) -> dict[str, Tensor]:
        """The global adapter in the shapes in which the server's tensors were given, or in those of
        the client with the largest adapter where none has them.
        """
        assert self._delivery is not None

        def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
            return {key: tensor.shape for key, tensor in tensors.items()}

        owners = sorted(self._own.values(), key=lambda own: -own.bytes)
        wanted = shapes(self.arrays)
        of_each = [shapes(own.state_dict()) for own in owners]
        if wanted not in of_each:
            wanted = of_each[0]
        same = {id(own): own for own, its in zip(owners, of_each, strict=True) if its == wanted}
        own, made = self._first_fitted(list(same.values()))
        tensors = {**self.arrays, **made.state_dict()}  # DoRA's magnitudes: as in the beginning
        return {key: tensors.get(key, value) for key, value in own.state_dict().items()}

    def _first_fitted(self, owners: Sequence[Adapter]) -> tuple[Adapter, Adapter]:
        """The first client's adapter whose scalings and dtype can hold the global adapter, and that
        adapter in them.

        Raises:
            AdapterError: no client's can.
        """
        assert self._delivery is not None
        shared = self._delivery.adapter
        refused = None
        for own in owners:
            try:
                if not self.rule.personal:
                    return own, self._received(own, "the server")
                return own, shared if shared.vera else shared.fit(own.direction)
            except AdapterError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    # ---- the file ------------------------------------------------------------------------------

    def _saved(self) -> dict[str, Any]:
        assert self._delivery is not None
        owners = list({id(own): own for own in self._own.values()}.values())
        places = {id(own): place for place, own in enumerate(owners)}
        delivery = self._delivery
        return {
            "format": FORMAT,
            "rule": self.rule.name,
            "round": self.round,
            "arrays": {key: x.cpu().contiguous() for key, x in self.arrays.items()},
            "adapter": saved(delivery.adapter),
            "heads": delivery.heads,
            "carried": saved_memory(self._carried),
            "owners": [saved(own) for own in owners],
            "clients": {
                client: [places[id(own)], self._keys[client], self._has.get(client, 0)]
                for client, own in self._own.items()
            },
            "merged": [saved(adapter) for adapter in self.merged],
            "afresh": self._afresh,
        }

    def _restore(self, path: Path) -> None:
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
            if not isinstance(content, dict):
                raise TypeError(f"it holds a {type(content).__name__}")
            found = content["format"], content["rule"]
        except Exception as error:  # whatever a foreign file makes torch raise
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise AdapterError(
                f"{path} is not a state file ({why}); move it away to begin anew"
            ) from None
        if found != (FORMAT, self.rule.name):
            raise AdapterError(
                f"{path} is of rule {found[1]!r} in format {found[0]}, expected {self.rule.name!r} "
                f"in format {FORMAT}; move it away to begin anew"
            )
        self.round, self.arrays = content["round"], content["arrays"]
        self._delivery = Delivery(self.rule, restored(content["adapter"]), None, content["heads"])
        self._carried = restored_memory(content["carried"])
        owners = [restored(own) for own in content["owners"]]
        for client, (place, sent, has) in content["clients"].items():
            self._own[client], self._keys[client] = owners[place], sent
            self._has[client] = has
        self.merged = [restored(adapter) for adapter in content["merged"]]
        self._afresh = content["afresh"]

    # ---- figures -------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """Of the last round: error, floor, rank, bytes; the report may take a pass of its own.
        Where a robust rule weighed the clients, their weights, in the order of the clients.
        """
        result = self.result
        assert result is not None
        report = result.report
        return {
            "relative-error": report.relative_error,
            "svd-floor": report.svd_floor,
            "rank": report.mean_rank,
            "bytes-up": sum(result.bytes_up),
            "bytes-down": sum(result.bytes_down),
            "clients": len(result.clients),
            **({} if result.weighing is None else {"robust-weights": result.weighing.weights}),
        }


class RuleServer(Generic[Name]):
    """What the server classes of the frameworks have in common: a rule, and who is lost.

    Args:
        rule: as for :class:`Exchange`.
        rule_options: of a rule given by name.
        lost_key: what the metrics call the clients that a round has lost.
        log: where they are named.
        **exchange: the other arguments of :class:`Exchange`.
    """

    def __init__(
        self,
        rule: str | Rule | None,
        rule_options: Mapping[str, Any] | None,
        *,
        lost_key: str,
        log: Logger,
        **exchange: Any,
    ) -> None:
        self._anew = partial(Exchange, rule, rule_options, **exchange)
        self.exchange = self._anew()
        self._lost_key, self._log = lost_key, log

    @property
    def result(self) -> Aggregation | None:
        """The last round's aggregation, with its report."""
        return self.exchange.result

    @property
    def lost(self) -> dict[Name, str]:
        """Client -> why it is not in the last round, of the clients that were asked and are not."""
        return cast(dict[Name, str], dict(self.exchange.lost))

    def finish(self) -> dict[str, Any]:
        """Aggregate what the exchange received, log who is lost; the figures of the round.

        Raises:
            AdapterError: as :meth:`Exchange.finish`.
        """
        try:
            self.exchange.finish()
        finally:
            for client, why in self.exchange.lost.items():
                self._log.warning(f"{label_of(client)} is not in the round: {why}")
        return {**self.exchange.figures(), self._lost_key: sorted(self.lost)}


def read_config(said: object) -> Config | None:
    """The config that a client sends: JSON, or what the JSON holds; None where it sends none.

    Raises:
        AdapterError: it is not JSON, or no JSON object.
    """
    if isinstance(said, str | bytes):
        try:
            said = json.loads(said)
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"its {CONFIG} is not valid JSON: {error}") from None
    elif said is None:
        return None
    if not isinstance(said, dict):
        raise AdapterError(f"its {CONFIG} holds no JSON object")
    try:
        json.dumps(said, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"its {CONFIG} is not valid JSON: {error}") from None
    return said


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under keys without what wrappers added.

    Raises:
        AdapterError: two keys are one then, or other text stands before PEFT's prefix.
    """
    try:
        found = {keys.plain(key): tensor for key, tensor in tensors.items()}
    except ValueError as error:
        raise AdapterError(str(error)) from None
    if len(found) < len(tensors):
        raise AdapterError("two of its tensors have one name without their wrappers")
    return found


def label_of(client: Client) -> str:
    """A client as messages name it."""
    return f"node {client}" if isinstance(client, int) else f"site {client}"


def difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, free_rank: bool = False
) -> str | None:
    """What is wrong with a reply's tensors beside those that the client started from, or None.

    Args:
        found: what it sends.
        expected: what it was sent.
        free_rank: whether the factors may have another rank.
    """

    def some(names: Iterable[str]) -> str:
        first, *others = sorted(names)
        return first + (f" and {len(others)} more" if others else "")

    if missing := set(expected) - set(found):
        return f"its update lacks {some(missing)}"
    if unknown := set(found) - set(expected):
        return f"its update has the unknown {some(unknown)}"
    for name, tensor in expected.items():
        got = found[name]
        if got.dtype != tensor.dtype or _shape(name, got, free_rank) != _shape(
            name, tensor, free_rank
        ):
            return (
                f"{name} is {got.dtype} {list(got.shape)}, expected {tensor.dtype} "
                f"{list(tensor.shape)}{' with any rank' if free_rank else ''}"
            )
        if got.is_floating_point() and not bool(got.isfinite().all()):
            return f"{name} holds NaN or infinite values"
    return None


def _shape(name: str, tensor: Tensor, free_rank: bool) -> tuple[int, ...]:
    """The shape, of a factor without its rank where that is free."""
    factor = keys.factor(name)
    ranked = factor is not None and factor.side in ("A", "B") and tensor.dim() >= 2
    if not free_rank or factor is None or not ranked:
        return tuple(tensor.shape)
    rank = 0 if factor.side == "A" else 1
    return (*tensor.shape[:rank], -1, *tensor.shape[rank + 1 :])


def _commonest(replies: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Where nothing was sent: the first reply of the layout that most have, or the largest."""
    layouts = [
        tuple(sorted((key, str(x.dtype), tuple(x.shape)) for key, x in reply.items()))
        for reply in replies
    ]
    counted = Counter(layout for layout in layouts if layout)
    if not counted:
        return {}

    def size(layout: tuple[tuple[str, str, tuple[int, ...]], ...]) -> int:
        return sum(math.prod(shape) for _, _, shape in layout)

    best = max(counted, key=lambda layout: (counted[layout], size(layout)))
    return replies[layouts.index(best)]


def _assumed(tensors: Mapping[str, Tensor]) -> Config:
    """The config of a client that sends none: its tensors' ranks, and the scaling 1."""
    factors = {key: keys.factor(key) for key in tensors}
    if any(factor and factor.kind == "vera" for factor in factors.values()):
        rank = next(len(tensors[k]) for k, f in factors.items() if f and f.side == "d")
        return {"peft_type": "VERA", "r": rank}
    ranks = {f.module: len(tensors[k]) for k, f in factors.items() if f and f.side == "A"}
    if not ranks:
        return {"peft_type": "LORA"}
    for module in filter(experts.told_by, ranks):
        raise AdapterError(
            f"module {module}: found the factors of experts, {ranks[module]} rows of A, which do "
            "not tell how many experts of which rank; send adapter_config with the reply, or give "
            "the server adapter_config="
        )
    scalings = dict.fromkeys(ranks, 1.0)
    with_magnitudes = any(factor and factor.kind == "magnitude" for factor in factors.values())
    start = {"peft_type": "LORA", "use_dora": with_magnitudes}
    return peft_format.result_config(start, ranks, scalings, rslora=False, targets=list(ranks))


def _lora(config: Config) -> Config:
    """A config may say no more than r and lora_alpha."""
    return {"peft_type": "LORA", **config}


def _blamed(message: str, adapters: Mapping[Client, Adapter]) -> Client | None:
    """The client that an error names first."""
    for index, (client, adapter) in enumerate(adapters.items()):
        if message.startswith(label(index, adapter.name)):
            return client
    return None


def _signature(adapter: Adapter) -> tuple[Any, ...]:
    """What clients of one start have in common: ranks, scalings, dtypes."""
    rows = [(name, item.layout, item.scaling) for name, item in adapter.factors.items()]
    extras = [(key, x.shape, x.dtype) for key, x in adapter.extras.items()]
    return (tuple(sorted(rows, key=lambda row: row[0])), tuple(sorted(extras, key=lambda x: x[0])))


def _reread(delivery: Delivery) -> Delivery:
    adapter = restored(saved(delivery.adapter))
    return Delivery(delivery.rule, adapter, None, delivery.heads)


def _write(path: Path, content: dict[str, Any]) -> None:
    """In one step: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with made.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
