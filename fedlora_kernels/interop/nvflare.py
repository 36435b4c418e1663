"""NVFlare: an aggregator for FedAvgRecipe, which aggregates LoRA adapters by a rule.

    from fedlora_kernels.interop.nvflare import LoraAggregator

    recipe = FedAvgRecipe(
        aggregator=LoraAggregator(rule="florist"),
        server_expected_format=ExchangeFormat.PYTORCH,
        ...
    )

A site's result is FedAvg's: an FLModel of the whole adapter under PEFT's keys, with the number of
steps in its meta. The meta may say more:

    adapter_config    JSON of the adapter's config, or only {"r": 8, "lora_alpha": 16}
    merges            True where the site merges what it is sent into its base model

What a site is sent is FedAvg's model too, in the site's own rank, with ``trains`` in its meta, the
factors to train ("both", "a" or "b"). A rule that merges puts the updates that the site may lack
beside it, which :func:`updates` reads: the site merges each place once.
"""

import json
import math
import numbers
from collections.abc import Mapping
from copy import copy
from logging import getLogger
from threading import Lock
from typing import Any

import torch
from nvflare.apis.dxo import DataKind
from nvflare.apis.dxo import from_shareable as read_dxo
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from fedlora_kernels.adapters import peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.interop.exchange import (
    CONFIG,
    MERGES,
    Reply,
    RuleServer,
    label_of,
    read_config,
)
from fedlora_kernels.robust import Robust
from fedlora_kernels.rules import Rule

TRAINS, MERGED = "trains", "merged"
"""What the meta of a model says: the factors to train, the updates to merge."""


class LoraAggregator(ModelAggregator, RuleServer[str]):  # type: ignore[misc]
    """FedAvg's place taken by a rule.

    A site whose result is missing or not usable leaves the round with the rest: it is named in the
    metrics (``lost-sites``) and in the log, and :attr:`lost` says why. Not usable are tensors of
    other names, shapes or dtypes than the site was sent, NaN, differences (``TransferType.DIFF``),
    and a weight that is not a number. Ranks may differ between sites that send their config, where
    the rule can aggregate them.

    What a site is sent fits the ranks, scalings and dtype of what it sent last. The model that
    FedAvg keeps has the shapes of the recipe's initial one. Without any config the ranks must be
    equal, and one common scaling is assumed, which cancels.

    The metrics of a round are the sites' own averages and, of the aggregation, relative-error,
    svd-floor, rank, bytes-up, bytes-down, clients and lost-sites; with ``robust`` also
    robust-weights, of the sites that are not lost, in their order.

    Args:
        rule: a rule of ``flk.rules``, or the name of one; the command line's when None.
        rule_options: of a rule given by name.
        adapter_config: of sites that send none; a PEFT config or the mapping of its JSON.
        same_base: whether the sites have one base model whatever their configs call it.
        weighted_by_key: the number in a result's meta by which the site counts. Where no site
            sends it they count equally.
        device: where the server aggregates.
        magnitudes: "average" admits DoRA, see :class:`fedlora_kernels.Round`; None refuses it.
        state: a file of the server, written after every round, from which a job that is submitted
            again goes on.
        memory_limit: bytes of memory for the matrices and results of the modules that are worked on
            together. Every site's result is then written to an unnamed file when it arrives, and
            mapped; of all sites one module at a time is worked on. The aggregate has the same bits
            with every limit. No limit when None.
        scratch: folder of the server for those files; the system's temporary folder when None.
        robust: a robust rule of ``flk.robust``, or the name of one, that weighs the sites: see
            :meth:`Round.weighed`.
        robust_options: of a robust rule given by name.

    Raises:
        ValueError: the rule or the robust rule is unknown, an option is out of range, the robust
            rule's weights do not reach the rule, or memory_limit is under 1.
        TypeError: the rule has no such option.
        AdapterError: the state cannot be read, or is that of another rule.
    """

    expected_data_kind = DataKind.WEIGHTS
    """FedAvgRecipe compares it with its own."""

    def __init__(
        self,
        rule: str | Rule | None = None,
        rule_options: Mapping[str, Any] | None = None,
        adapter_config: object = None,
        *,
        same_base: bool = False,
        weighted_by_key: str = FLMetaKey.NUM_STEPS_CURRENT_ROUND,
        device: str | None = None,
        magnitudes: str | None = None,
        state: str | None = None,
        memory_limit: int | None = None,
        scratch: str | None = None,
        robust: str | Robust | None = None,
        robust_options: Mapping[str, Any] | None = None,
    ) -> None:
        ModelAggregator.__init__(self)
        config = None if adapter_config is None else dict(peft_format.plain(adapter_config))
        RuleServer.__init__(
            self,
            rule,
            rule_options,
            lost_key="lost-sites",
            log=getLogger(__name__),
            adapter_config=config,
            same_base=same_base,
            device=device,
            magnitudes=magnitudes,
            state=state,
            memory_limit=memory_limit,
            scratch=scratch,
            robust=robust,
            robust_options=robust_options,
        )
        # NVFlare writes a job's arguments as JSON, from attributes of their names.
        made, guard = self.exchange.rule, self.exchange.robust
        self.rule, self.rule_options = made.name, made.given
        self.robust = None if guard is None else guard.name
        self.robust_options = None if guard is None else guard.given
        self.adapter_config, self.same_base = config, same_base
        self.weighted_by_key, self.device, self.state = weighted_by_key, device, state
        self.memory_limit, self.scratch, self.magnitudes = memory_limit, scratch, magnitudes
        self._lock = Lock()  # sites fetch their models from several threads
        self._shapes: dict[str, torch.Size] = {}
        self._asked: set[str] = set()
        self._results: dict[str, FLModel] = {}
        self._as_numpy = False

    # ---- what sites are sent -------------------------------------------------------------------

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Put the site's own tensors in the place of the model that FedAvg sends to all."""
        super().handle_event(event_type, fl_ctx)
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        if event_type == EventType.BEFORE_TASK_DATA_FILTER and task == AppConstants.TASK_TRAIN:
            site = fl_ctx.get_peer_context().get_identity_name()
            data = fl_ctx.get_prop(FLContextKey.TASK_DATA)
            dxo = read_dxo(data)
            try:
                dxo.data, meta = self.sent(site, dxo.data)
            except AdapterError as error:  # NVFlare would log it and send FedAvg's model
                self.system_panic(f"{label_of(site)}: {error}", fl_ctx)
                return
            dxo.meta = {**dxo.meta, **meta}
            dxo.update_shareable(data)

    def sent(self, site: str, model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What one site is sent, tensors and meta, when FedAvg sends ``model`` to all."""
        with self._lock:
            if not self._shapes:
                tensors = _tensors(model)
                self._as_numpy = any(not isinstance(x, Tensor) for x in model.values())
                self._shapes = {key: x.shape for key, x in tensors.items()}
                if not self.exchange.round:
                    self.exchange.give(tensors)
            self._asked.add(site)
            start = self.exchange.start(site)
            meta: dict[str, Any] = {TRAINS: start.trains}
            if start.updates:
                meta[MERGED] = {
                    str(place): {
                        "tensors": self._given(update.state_dict()),
                        "config": json.dumps(update.config, allow_nan=False),
                    }
                    for place, update in start.updates.items()
                }
            return self._given(start.tensors), meta

    def _given(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Whole tensors, in the form in which the job exchanges them."""
        whole = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
        return {key: x.numpy() for key, x in whole.items()} if self._as_numpy else whole

    # ---- what sites send back ------------------------------------------------------------------

    def accept_model(self, model: FLModel) -> None:
        """A site's result, put aside where memory is limited; it is looked at at the end."""
        site = str(model.meta.get("client_name", AppConstants.CLIENT_UNKNOWN))
        kept = copy(model)
        with self._lock:
            if site in self._results:
                self.exchange.lose(site, "it replied twice")
            try:
                kept.params = self.exchange.put_aside(_tensors(model.params or {}))
            except AdapterError as error:
                kept.params = None
                self.exchange.lose(site, str(error))
            self._results[site] = kept

    def reset_stats(self) -> None:
        """A new round."""
        self._results, self._asked = {}, set()
        self.exchange.begin()

    def aggregate_model(self) -> FLModel:
        """The rule on all usable results.

        Raises:
            AdapterError: no site is left, the rest cannot be aggregated, or the recipe's initial
                model is no start of any site's.
        """
        exchange = self.exchange
        weighs = any(self.weighted_by_key in model.meta for model in self._results.values())
        for site in sorted(self._asked - set(self._results)):
            exchange.lose(site, "it sent nothing, or its task failed or was late")
        for site, model in self._results.items():
            if site not in exchange.lost:
                try:
                    exchange.receive(
                        site, read_result(model, self.weighted_by_key if weighs else None)
                    )
                except AdapterError as error:
                    exchange.lose(site, str(error))
        figures = self.finish()
        for key, shape in self._shapes.items():
            if exchange.arrays[key].shape != shape:
                raise AdapterError(
                    f"the recipe's model has {key} {list(shape)}, the sites' largest adapter "
                    f"{list(exchange.arrays[key].shape)}: give the recipe a model of that rank"
                )
        taken = {s: model for s, model in self._results.items() if s not in exchange.lost}
        self._results = {}
        return FLModel(
            params_type=ParamsType.FULL,
            params=self._given(exchange.arrays),
            metrics=self._metrics(taken, weighs) | figures,
        )

    def _metrics(self, taken: Mapping[str, FLModel], weighs: bool) -> dict[str, Any]:
        """The sites' own metrics, averaged; the numbers that all of them have."""
        found = [model.metrics or {} for model in taken.values()]
        weights = [
            float(model.meta[self.weighted_by_key]) if weighs else 1.0 for model in taken.values()
        ]
        total = math.fsum(weights)
        names = [{key for key, x in each.items() if _is_number(x)} for each in found]
        if not total > 0:
            return {}
        return {
            key: math.fsum(w * float(x[key]) for w, x in zip(weights, found, strict=True)) / total
            for key in sorted(set.intersection(*names))
        }


# ---- models ------------------------------------------------------------------------------------


def read_result(model: FLModel, weighted_by_key: str | None) -> Reply:
    """What a site's result says; without a key its weight is 1.

    Raises:
        AdapterError: it holds differences, a tensor cannot be read, there is no weight, or its
            config is not JSON.
    """
    if model.params_type != ParamsType.FULL:
        raise AdapterError(
            f"it sends params of type {model.params_type}, expected FULL: factors are aggregated, "
            "not their differences (params_transfer_type=TransferType.FULL)"
        )
    weight = 1.0 if weighted_by_key is None else model.meta.get(weighted_by_key)
    if not _is_number(weight):
        raise AdapterError(f"its meta has no number {weighted_by_key!r}, found {weight!r}")
    config = read_config(model.meta.get(CONFIG))
    merges = model.meta.get(MERGES) is True
    return Reply(_tensors(model.params or {}), float(weight), config, merges)


def updates(model: FLModel) -> dict[int, Adapter]:
    """On a site: place -> an update to be merged into the base, of the model that it was sent.

    Raises:
        AdapterError: a tensor cannot be read, or they are no adapter.
    """
    return {
        int(place): Adapter.from_state_dict(_tensors(said["tensors"]), json.loads(said["config"]))
        for place, said in sorted(model.meta.get(MERGED, {}).items(), key=lambda x: int(x[0]))
    }


def _tensors(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Torch's tensors and NumPy's arrays; anything else is an error that names it."""
    found = {}
    for name, value in params.items():
        try:
            whole = value.detach() if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        except (TypeError, AttributeError) as error:
            raise AdapterError(f"{name} is a {type(value).__name__}: {error}") from None
        found[name] = whole.contiguous()
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
