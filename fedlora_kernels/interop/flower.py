"""Flower: a strategy in the place of FedAvg, which aggregates LoRA adapters by a rule.

    from fedlora_kernels.interop.flower import LoraStrategy

    strategy = LoraStrategy(rule="florist", fraction_train=0.5)
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=10)

A client's reply is that of FedAvg: one ArrayRecord under PEFT's keys and one MetricRecord with the
number of examples. It may say more in a ConfigRecord:

    adapter_config    JSON of the adapter's config, or only {"r": 8, "lora_alpha": 16}
    merges            True where the client merges what it is sent into its base model

What it is sent is FedAvg's too: the arrays, in its own rank, and the config, in which ``trains``
says which factors to train ("both", "a" or "b"). A rule that merges sends, beside these, the
updates that the client may lack, ``merged/N`` with the tensors and ``merged/N.config``: the client
merges each N once.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from torch import Tensor

from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.interop.exchange import CONFIG, MERGES, Reply, RuleServer, read_config
from fedlora_kernels.robust import Robust
from fedlora_kernels.rules import Rule

RAW = "raw.le"
"""The encoding of a tensor that NumPy cannot hold: its own bytes, little-endian, contiguous."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""Of raw tensors."""

LOG = getLogger("flwr")


class LoraStrategy(FedAvg, RuleServer[int]):
    """FedAvg with a rule in the place of the average.

    A client whose reply is missing, late, an error or not usable leaves the round with the rest: it
    is named in the metrics (``lost-nodes``) and in the log, and :attr:`lost` says why. Not usable
    are tensors of other names, shapes or dtypes than the client was sent, a truncated tensor, NaN,
    and a weight that is not a number. Ranks may differ between clients that send their config,
    where the rule can aggregate them.

    What a client is sent fits the ranks, scalings and dtype of what it sent last. Without any
    config the ranks must be equal, and one common scaling is assumed, which cancels.

    The metrics of a round are the clients' own averages and, of the aggregation, relative-error,
    svd-floor, rank, bytes-up, bytes-down, clients and lost-nodes; with ``robust`` also
    robust-weights, of the nodes that are not lost, in their order.

    Args:
        rule: a rule of ``flk.rules``, or the name of one; the command line's when None.
        rule_options: of a rule given by name.
        adapter_config: of clients that send none; a PEFT config or the mapping of its JSON.
        same_base: whether the clients have one base model whatever their configs call it.
        device: where the server aggregates.
        magnitudes: "average" admits DoRA, see :class:`fedlora_kernels.Round`; None refuses it.
        state: a file, written after every round, from which a server that is started again goes on;
            Flower keeps nothing.
        robust: a robust rule of ``flk.robust``, or the name of one, that weighs the nodes: see
            :meth:`Round.weighed`.
        robust_options: of a robust rule given by name.
        **fedavg: the arguments of Flower's FedAvg.

    Raises:
        ValueError: the rule or the robust rule is unknown, an option is out of range, or the robust
            rule's weights do not reach the rule.
        TypeError: the rule has no such option, or FedAvg has no such argument. The arguments of
            FedAdam, FedAvgM and other server optimizers are among these.
    """

    def __init__(
        self,
        rule: str | Rule | None = None,
        rule_options: Mapping[str, Any] | None = None,
        adapter_config: object = None,
        *,
        same_base: bool = False,
        device: torch.device | str | None = None,
        magnitudes: str | None = None,
        state: str | Path | None = None,
        robust: str | Robust | None = None,
        robust_options: Mapping[str, Any] | None = None,
        **fedavg: Any,
    ) -> None:
        known = inspect.signature(FedAvg.__init__).parameters
        for name in fedavg:
            if name not in known:
                raise TypeError(
                    f"LoraStrategy has no argument {name!r}: it takes FedAvg's arguments by name; "
                    "server optimizers (FedAdam, FedAvgM, ...) step on entries, not on updates B A"
                )
        FedAvg.__init__(self, **fedavg)
        RuleServer.__init__(
            self,
            rule,
            rule_options,
            lost_key="lost-nodes",
            log=LOG,
            adapter_config=adapter_config,
            same_base=same_base,
            device=device,
            magnitudes=magnitudes,
            state=state,
            robust=robust,
            robust_options=robust_options,
        )
        self._keeps = state is not None
        self._unsent: dict[int, str] = {}
        self._before = 0
        """the rounds of the runs before, where this one goes on from a file"""
        self._asked: list[Metadata] = []
        """of the messages of this round's training"""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises TypeError: another strategy of Flower's is mixed in."""
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            of_flower = issubclass(base, Strategy) and not issubclass(base, LoraStrategy)
            if of_flower and base not in LoraStrategy.__mro__:
                raise TypeError(
                    f"{cls.__name__} mixes LoraStrategy with {base.__name__}, which averages or "
                    "steps on entries of the factors; a rule aggregates updates B A"
                )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        **others: Any,
    ) -> Result:
        """FedAvg's ``start``; with ``state`` it goes on after the last round that was finished.

        ``num_rounds`` counts the rounds before, and rounds keep their numbers.

        Raises:
            AggregationError: a round has no client left; the message says why.
        """
        if not self._keeps:
            self.exchange = self._anew()
        self._before = before = self.exchange.round
        if before:
            initial_arrays = to_arrays(self.exchange.arrays)
        numbered = None
        if evaluate_fn is not None:

            def numbered(number: int, arrays: ArrayRecord) -> MetricRecord | None:
                return evaluate_fn(number + before, arrays)

        result = super().start(
            grid=grid,
            initial_arrays=initial_arrays,
            num_rounds=max(0, num_rounds - before),
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=numbered,
            **others,
        )
        if before:
            if num_rounds <= before:
                result.arrays = initial_arrays
            for name, rounds in vars(result).items():
                if isinstance(rounds, dict):
                    setattr(result, name, {n + before: found for n, found in rounds.items()})
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's sampling; every node is sent the arrays in its own rank."""
        self.exchange.give(from_arrays(arrays))
        return super().configure_train(server_round + self._before, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's sampling; every node is sent the arrays in its own rank."""
        return super().configure_evaluate(server_round + self._before, arrays, config, grid)

    def _construct_messages(
        self, record: RecordDict, node_ids: list[int], message_type: str
    ) -> Iterable[Message]:
        messages, unsent = [], {}
        for node in node_ids:
            try:
                content = self.content(record, node)
            except AdapterError as error:
                unsent[node] = f"it cannot be sent the result: {error}"
            else:
                messages.append(Message(content, message_type=message_type, dst_node_id=node))
        if message_type == MessageType.TRAIN:
            self._asked = [message.metadata for message in messages]
            self._unsent = unsent
        return messages

    def content(self, record: RecordDict, node: int) -> RecordDict:
        """What one node is sent, where FedAvg sends ``record`` to all."""
        start = self.exchange.start(node)
        known = start.tensors is self.exchange.arrays
        config = dict(record.config_records[self.configrecord_key])
        content = RecordDict(
            {
                self.arrayrecord_key: record.array_records[self.arrayrecord_key]
                if known
                else to_arrays(start.tensors),
                self.configrecord_key: ConfigRecord({**config, "trains": start.trains}),
            }
        )
        for place, update in start.updates.items():
            write_adapter(content, f"merged/{place}", update)
        return content

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The rule on all usable replies.

        Raises:
            AggregationError: no client is left, or the rest cannot be aggregated.
        """
        contents = self.collect(replies)
        try:
            figures = self.finish()
        except AdapterError as error:
            raise AggregationError(str(error)) from error
        metrics = self._metrics([contents[node] for node in sorted(contents.keys() - self.lost)])
        metrics.update(figures)
        return to_arrays(self.exchange.arrays), metrics

    def collect(self, replies: Iterable[Message]) -> dict[int, RecordDict]:
        """Give the exchange a round's replies; node -> content of those that can be read.

        The nodes of all others are lost, and so are those that were asked and sent none.
        """
        exchange = self.exchange
        exchange.begin()
        for node, why in self._unsent.items():
            exchange.lose(node, why)
        asked = {sent.message_id: sent.dst_node_id for sent in self._asked}

        def node_of(reply: Message) -> int:
            """Where Flower answers for a node that is gone, the sender is Flower's own server."""
            told = reply.metadata
            return asked.get(told.reply_to_message_id, told.src_node_id)

        valid, errors = self._check_and_log_replies(list(replies), is_train=True, validate=False)
        contents: dict[int, RecordDict] = {}
        for message in errors:
            reason = " ".join(str(message.error.reason).split())
            exchange.lose(node_of(message), f"its node reports: {reason}")
        for message in valid:
            node = node_of(message)
            try:
                reply = self.read(node, message.content)
            except AdapterError as error:
                exchange.lose(node, str(error))
            else:
                contents[node] = message.content
                exchange.receive(node, reply)
        for node in asked.values():
            if node not in contents and node not in exchange.lost:
                exchange.lose(node, "no reply within the time limit")
        self._asked = []
        return contents

    def read(self, node: int, content: RecordDict) -> Reply:
        """What the reply of a node says.

        Raises:
            AdapterError: as :func:`read_reply`; the node is lost.
        """
        return read_reply(content, self.weighted_by_key)

    def _metrics(self, contents: list[RecordDict]) -> MetricRecord:
        """The clients' own metrics, averaged; those that all of them have in one form."""
        weight = self.weighted_by_key
        found: list[dict[str, Any]] = [dict(_metrics_with(x, weight)) for x in contents]
        if not sum(metrics[weight] for metrics in found) > 0:
            return MetricRecord()
        forms = [
            {(key, len(x) if isinstance(x, list) else -1) for key, x in metrics.items()}
            for metrics in found
        ]
        if any(form != forms[0] for form in forms) or any(
            len(content.metric_records) != 1 for content in contents
        ):
            common = {key for key, _ in set.intersection(*forms)}
            contents = [
                RecordDict({"metrics": MetricRecord({k: x for k, x in m.items() if k in common})})
                for m in found
            ]
        return MetricRecord(dict(self.train_metrics_aggr_fn(contents, weight)))

    def summary(self) -> None:
        """Log the rule beside FedAvg's own settings."""
        LOG.info(f"\t├──> Rule: {self.exchange.rule!r}")
        if self.exchange.robust is not None:
            LOG.info(f"\t├──> Robust rule: {self.exchange.robust!r}")
        super().summary()


# ---- records -----------------------------------------------------------------------------------


def read_reply(content: RecordDict, weighted_by_key: str = "num-examples") -> Reply:
    """What a client's reply says.

    Raises:
        AdapterError: it has no or several ArrayRecords, a tensor cannot be read, there is no
            weight, or its config is not JSON.
    """
    records = list(content.array_records.values())
    if len(records) != 1:
        raise AdapterError(f"its reply has {len(records)} ArrayRecords, expected one")
    metrics = _metrics_with(content, weighted_by_key)
    weight = dict(metrics).get(weighted_by_key)
    if isinstance(weight, list) or weight is None:
        raise AdapterError(f"its reply's MetricRecord has no number {weighted_by_key!r}")
    said: dict[str, Any] = {}
    for record in content.config_records.values():
        said |= {name: record[name] for name in (CONFIG, MERGES) if name in record}
    config = read_config(said.get(CONFIG))
    return Reply(from_arrays(records[0]), float(weight), config, said.get(MERGES) is True)


def _metrics_with(content: RecordDict, name: str) -> MetricRecord:
    """The first MetricRecord that has the weight; an empty one where there is none."""
    found = (record for record in content.metric_records.values() if name in record)
    return next(found, MetricRecord())


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """The tensors as Flower's own arrays; bfloat16, which NumPy lacks, as raw bytes."""
    return ArrayRecord({name: _array(tensor) for name, tensor in tensors.items()})


def _array(tensor: Tensor) -> Array:
    whole = tensor.detach().cpu().contiguous()
    return raw(whole) if whole.dtype == torch.bfloat16 else Array(whole.numpy())


def raw(tensor: Tensor) -> Array:
    """A tensor bit for bit, whatever its dtype; FedAvg cannot average it by mistake."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Array(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        stype=RAW,
        data=flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"",
    )


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors again, from Flower's own arrays and from raw ones.

    Raises:
        AdapterError: another encoding, or bytes that do not fit; names the tensor.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def _tensor(name: str, array: Array) -> Tensor:
    if array.stype != RAW:
        try:
            return torch.from_numpy(array.numpy().copy())
        except Exception as error:  # whatever a client's bytes make NumPy raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise AdapterError(f"{name} cannot be read from {array.stype}: {first}") from None
    if array.dtype not in DTYPES:
        raise AdapterError(
            f"{name} is {array.dtype} in {array.stype}; expected {RAW} and one of "
            f"{', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[array.dtype], tuple(array.shape)
    expected = torch.Size(shape).numel() * dtype.itemsize
    if len(array.data) != expected:
        raise AdapterError(
            f"{name} has {len(array.data)} bytes; {array.dtype} of shape {list(shape)} has "
            f"{expected}"
        )
    flat = torch.frombuffer(bytearray(array.data), dtype=dtype) if expected else torch.empty(0)
    return flat.to(dtype).reshape(shape)


def write_adapter(records: RecordDict, name: str, adapter: Adapter) -> None:
    """Put an adapter into the records, under ``name`` (tensors) and ``name.config``."""
    records[name] = ArrayRecord({key: raw(x) for key, x in adapter.state_dict().items()})
    records[f"{name}.config"] = ConfigRecord({"json": json.dumps(adapter.config, allow_nan=False)})


def read_adapter(records: RecordDict, name: str) -> Adapter:
    """The adapter under ``name``.

    Raises:
        AdapterError: a tensor cannot be read, or they are no adapter.
    """
    config = json.loads(str(records.config_records[f"{name}.config"]["json"]))
    return Adapter.from_state_dict(from_arrays(records.array_records[name]), config)
