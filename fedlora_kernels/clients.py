"""The clients of one round: what must hold between them before anything is computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import ops, peft_format
from fedlora_kernels.adapter import Adapter
from fedlora_kernels.factors import AdapterError
from fedlora_kernels.peft_format import label
from fedlora_kernels.report import ModuleReport, Report
from fedlora_kernels.rules import Rule

# PEFT's keys of VeRA's frozen projections: equal in all clients, not averaged.
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def check(adapters: Sequence[Adapter], rule: Rule) -> None:
    """Refuse clients that do not belong to one federation.

    Raises:
        AdapterError: no clients, one folder named twice, configs that disagree (base model, task,
            modules_to_save, VeRA's projection key, ...), extra tensors that only some clients
            have, or what the rule itself refuses. The message names the client.
    """
    if not adapters:
        raise AdapterError("no clients: expected at least one adapter")
    seen: dict[object, int] = {}
    named = next((a for a in adapters if a.config.get("base_model_name_or_path")), adapters[0])
    for index, adapter in enumerate(adapters):
        who = label(index, adapter.name)
        if adapter.source is not None and seen.setdefault(adapter.source, index) != index:
            raise AdapterError(f"{who} is the same folder as client {seen[adapter.source]}")
        for number, other in ((0, adapters[0]), (adapters.index(named), named)):
            problem = peft_format.disagreement(other.config, adapter.config)
            if problem is not None:
                raise AdapterError(f"{who}: {problem} as in {label(number, other.name)}")
        if adapter.vera and not rule.personal:
            raise AdapterError(
                f"{who}: VeRA vectors, which rule {rule.name!r} cannot aggregate; use fedsa"
            )
        _check_extras(adapters[0], adapter, who)
    if rule.validate is not None:
        rule.validate(adapters)


def _check_extras(first: Adapter, adapter: Adapter, who: str) -> None:
    for key in sorted(first.extras.keys() ^ adapter.extras.keys()):
        verb = "lacks" if key in first.extras else "has an unexpected"
        raise AdapterError(f"{who} {verb} tensor {key}")
    for key, tensor in adapter.extras.items():
        expected = first.extras[key]
        if tensor.shape != expected.shape:
            raise AdapterError(
                f"{who}, tensor {key}: shape {list(tensor.shape)}, expected {list(expected.shape)}"
            )
        fixed = key in PROJECTIONS or not tensor.is_floating_point()
        if fixed and not torch.equal(tensor, expected):
            raise AdapterError(f"{who}, tensor {key}: differs from client 0's and is not averaged")


def normalised(weights: Sequence[float] | None, adapters: Sequence[Adapter]) -> Tensor:
    """The clients' weights as [K] float64 that sum to 1; equal when None.

    Raises:
        AdapterError: the count is wrong, a weight is negative or no finite number, or all are zero.
    """
    if weights is None:
        return torch.full((len(adapters),), 1 / len(adapters), dtype=torch.float64)
    if len(weights) != len(adapters):
        raise AdapterError(f"found {len(weights)} weights for {len(adapters)} clients")
    values: list[float] = []
    for adapter, weight in zip(adapters, weights, strict=True):
        try:
            value = float(weight)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value) or value < 0:
            who = label(len(values), adapter.name)
            raise AdapterError(f"{who}: weight {weight}, expected a finite number >= 0")
        values.append(value)
    if not sum(values) > 0:
        raise AdapterError("all weights are zero; at least one client must count")
    shares = torch.tensor(values, dtype=torch.float64) / max(values)  # the sum may overflow
    return shares / shares.sum()


def average_extras(adapters: Sequence[Adapter], weights: Tensor) -> dict[str, Tensor]:
    """The weighted mean of the tensors beside the factors (heads, biases)."""
    averaged = {}
    for key, first in adapters[0].extras.items():
        if key in PROJECTIONS or not first.is_floating_point():
            averaged[key] = first
            continue
        stacked = torch.stack([adapter.extras[key] for adapter in adapters])[None]
        averaged[key] = ops.weighted_sum(stacked, weights.to(first.device))[0]
    return averaged


def unreported(adapters: Sequence[Adapter]) -> Report:
    """Rows of VeRA modules whose projections were not saved: the rank is all that is known."""
    unknown = math.nan
    return Report(
        {
            module: ModuleReport(lambda_d.numel(), unknown, unknown, unknown, unknown)
            for module, (_, lambda_d) in adapters[0].vera.items()
        }
    )
