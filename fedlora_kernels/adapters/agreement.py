"""The clients of one round: what must hold between them before anything is computed."""

import math
from collections.abc import KeysView, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from fedlora_kernels.adapters import keys, peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.kinds import vera
from fedlora_kernels.adapters.kinds.kind import Kind
from fedlora_kernels.adapters.peft_format import label


def check(adapters: Sequence[Adapter], *, same_base: bool = False) -> None:
    """Refuse clients that do not belong to one federation.

    Args:
        adapters: the clients.
        same_base: whether they are known to have one base model, whatever they call it.

    Raises:
        AdapterError: one folder named twice, configs that disagree (base model, task, VeRA's
            projection key, ...), layers of different kinds under one name, module names that do
            not belong to one base model, or VeRA's projections or vectors that do not fit each
            other. The message names the client.
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
            problem = peft_format.disagreement(other.config, adapter.config, same_base=same_base)
            if problem is not None:
                if _agreeing(adapters, other, same_base) < _agreeing(adapters, adapter, same_base):
                    (index, adapter), (number, other) = (number, other), (index, adapter)
                    problem = peft_format.disagreement(
                        other.config, adapter.config, same_base=same_base
                    )
                who = label(index, adapter.name)
                raise AdapterError(f"{who}: {problem} as in {label(number, other.name)}")
    vera.check(adapters)
    _refuse_other_kinds(adapters)
    names(adapters)


def _agreeing(adapters: Sequence[Adapter], one: Adapter, same_base: bool) -> int:
    """How many clients' configs agree with one client's."""
    return sum(
        peft_format.disagreement(one.config, other.config, same_base=same_base) is None
        for other in adapters
    )


def _refuse_other_kinds(adapters: Sequence[Adapter]) -> None:
    """One name, one kind of layer: a kernel of another size, or other experts, is refused."""
    known: dict[str, tuple[Kind, int]] = {}
    for index, adapter in enumerate(adapters):
        for module, item in adapter.trained.items():
            kind, first = known.setdefault(module, (item.kind, index))
            if item.kind is not kind and item.kind != kind:
                raise AdapterError(
                    f"{label(index, adapter.name)}, module {module}: found {item.kind.told}, "
                    f"expected {kind.told} as in {label(first, adapters[first].name)}"
                )


def names(adapters: Sequence[Adapter]) -> None:
    """Refuse clients whose module names do not belong to one base model.

    Clients may train different modules. Two names that no client has together, of one shape, that
    differ only by leading or inserted segments, are one layer under two names; and every client
    shares a module with another, directly or through further clients.

    Raises:
        AdapterError: names the clients and the two modules.
    """
    modules = [_modules(adapter) for adapter in adapters]
    if all(found == modules[0] for found in modules):
        return
    owners: dict[str, set[int]] = {}
    for index, found in enumerate(modules):
        for module in found:
            owners.setdefault(module, set()).add(index)
    _refuse_two_names(adapters, owners)
    _refuse_strangers(adapters, modules)


def absent(adapters: Sequence[Adapter]) -> dict[int, list[str]]:
    """Client -> the modules that it lacks and another client has; nothing for the others."""
    modules = [_modules(adapter) for adapter in adapters]
    if all(found == modules[0] for found in modules):
        return {}
    every = sorted(set().union(*modules), key=natural)
    lacking = [[module for module in every if module not in found] for found in modules]
    return {index: missing for index, missing in enumerate(lacking) if missing}


def natural(module: str) -> list[tuple[int, int, str]]:
    """Sort key of modules that puts layer 10 after layer 9."""
    return [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in module.split(".")]


def _modules(adapter: Adapter) -> KeysView[str]:
    return adapter.vera.keys() if adapter.vera else adapter.factors.keys()


def _shape(adapter: Adapter, module: str) -> tuple[int, ...]:
    """(m, n), of VeRA (m,)."""
    if adapter.vera:
        return (adapter.vera[module][0].shape[0],)
    return adapter.factors[module].layout[:2]


def _refuse_two_names(adapters: Sequence[Adapter], owners: Mapping[str, set[int]]) -> None:
    """Only names that some client lacks, end alike and have one shape are compared."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for module, having in owners.items():
        if len(having) < len(adapters):
            shape = _shape(adapters[min(having)], module)
            groups.setdefault((module.rpartition(".")[2], shape), []).append(module)
    for (_, shape), group in groups.items():
        for one, other in combinations(group, 2):
            if owners[one].isdisjoint(owners[other]) and keys.alike(one, other):
                fewer = len(owners[other]) <= len(owners[one])
                odd, usual = (other, one) if fewer else (one, other)
                k, j = min(owners[odd]), min(owners[usual])
                raise AdapterError(
                    f"{label(k, adapters[k].name)}, module {odd}: found beside {usual} of the same "
                    f"shape {list(shape)} in {label(j, adapters[j].name)}\nexpected one name for "
                    "one layer; rename it, or train all clients on the same model class"
                )


def _refuse_strangers(adapters: Sequence[Adapter], modules: Sequence[KeysView[str]]) -> None:
    groups: list[tuple[set[int], set[str]]] = []
    for index, found in enumerate(modules):
        mine, names = {index}, set(found)
        for group in [group for group in groups if not group[1].isdisjoint(found)]:
            groups.remove(group)
            mine |= group[0]
            names |= group[1]
        groups.append((mine, names))
    if len(groups) == 1:
        return
    members, names = min(groups, key=lambda group: (len(group[0]), -min(group[0])))
    k = min(members)
    j = next(index for index in range(len(adapters)) if index not in members)
    raise AdapterError(
        f"{label(k, adapters[k].name)} shares no module with {label(j, adapters[j].name)}: found "
        f"{min(modules[k])}, expected names such as {min(modules[j])}\ntrain all clients on the "
        "same model class, with at least one target module in common"
    )


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
        raise AdapterError("all weights are zero; at least one client must have a positive weight")
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
