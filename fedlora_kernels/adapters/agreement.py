"""The clients of one round: what must hold between them before anything is computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.adapters import extras, peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.peft_format import label


def check(adapters: Sequence[Adapter]) -> None:
    """Refuse clients that do not belong to one federation.

    Raises:
        AdapterError: one folder named twice, configs that disagree (base model, task,
            modules_to_save, VeRA's projection key, ...), or extra tensors that only some clients
            have. The message names the client.
    """
    seen: dict[object, int] = {}
    named = next((a for a in adapters if a.config.get("base_model_name_or_path")), adapters[0])
    others = [(0, adapters[0])]
    if named is not adapters[0]:
        others.append((adapters.index(named), named))
    for index, adapter in enumerate(adapters):
        if adapter.source is not None and seen.setdefault(adapter.source, index) != index:
            who = label(index, adapter.name)
            raise AdapterError(f"{who} is the same folder as client {seen[adapter.source]}")
        for number, other in others:
            problem = peft_format.disagreement(other.config, adapter.config)
            if problem is not None:
                who = label(index, adapter.name)
                raise AdapterError(f"{who}: {problem} as in {label(number, other.name)}")
        if adapter.extras or adapters[0].extras:
            extras.check(adapters[0], adapter, label(index, adapter.name))


def normalized(weights: Sequence[float] | None, adapters: Sequence[Adapter]) -> Tensor:
    """The clients' weights as [K] float64 that sum to 1; equal when None.

    Raises:
        AdapterError: there are no clients, the count is wrong, a weight is negative or no finite
            number, or all are zero.
    """
    if not adapters:
        raise AdapterError("no clients: expected at least one adapter")
    if weights is None:
        return torch.full((len(adapters),), 1 / len(adapters), dtype=torch.float64)
    if len(weights) != len(adapters):
        raise AdapterError(f"found {len(weights)} weights for {len(adapters)} clients")
    values: list[float] = []
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        values.append(checked(weight, label(index, adapter.name)))
    if not sum(values) > 0:
        raise AdapterError("all weights are zero; at least one client must count")
    shares = torch.tensor(values, dtype=torch.float64) / max(values)  # the sum may overflow
    return shares / shares.sum()


def checked(weight: float, who: str) -> float:
    """One client's weight as given.

    Raises:
        AdapterError: it is negative or no finite number; names the client.
    """
    try:
        value = float(weight)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise AdapterError(f"{who}: weight {weight}, expected a finite number >= 0")
    return value
