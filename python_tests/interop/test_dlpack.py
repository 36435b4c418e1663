"""interop.dlpack: the torch operators' bits for arrays of other kinds, and what is refused.

Expected values come from the torch operators and ``flk.aggregate`` on the same numbers.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import torch
from calls import Call, calls
from federation import draw
from matrices import CASES, FAMILIES, case_id

import fedlora_kernels as flk
from fedlora_kernels.interop import dlpack

NAMES = [name for name in dlpack.__all__ if name not in ("Aggregated", "aggregate")]


class Other:
    """An array of a framework that only speaks DLPack: no array namespace, no other method."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def from_dlpack(array: Any) -> Other:
    return Other(torch.from_dlpack(array))


FRAMEWORK = ModuleType("other_arrays")
FRAMEWORK.__dict__["from_dlpack"] = from_dlpack
sys.modules["other_arrays"] = FRAMEWORK
Other.__module__ = "other_arrays.array"


class Elsewhere(Other):
    """An array on a device that torch does not read."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (7, 0)


@pytest.fixture
def x64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def to_jax(tensor: torch.Tensor) -> Any:
    return jax.numpy.from_dlpack(tensor.contiguous())


KINDS: dict[str, tuple[Callable[[torch.Tensor], Any], type]] = {
    "numpy": (lambda tensor: tensor.numpy(), np.ndarray),
    "jax": (to_jax, jax.Array),
    "other": (Other, Other),
    "torch": (lambda tensor: tensor, torch.Tensor),
}


def converted(value: Any, make: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(converted(item, make) for item in value)
    return make(value) if isinstance(value, torch.Tensor) else value


def assert_same_bits(found: Any, expected: Any, kind: type, what: str) -> None:
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for left, right in zip(found, expected, strict=True):
        assert isinstance(left, kind), what
        tensor = torch.from_dlpack(left)
        assert tensor.dtype == right.dtype, what
        assert tensor.shape == right.shape, what
        bits = [x.contiguous().flatten().view(torch.uint8) for x in (tensor, right)]
        assert torch.equal(*bits), what


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_same_bits_as_the_torch_operators(case: tuple[str, torch.dtype], kind: str) -> None:
    name, dtype = case
    if kind == "numpy" and dtype == torch.bfloat16:
        dtype = torch.float64  # NumPy has no bfloat16 in DLPack
    make, type_ = KINDS[kind]
    for operator, arguments in calls(FAMILIES[name].build(dtype)):
        found = getattr(dlpack, operator)(*converted(arguments, make))
        expected = getattr(flk.ops, operator)(*arguments)
        assert_same_bits(found, expected, type_, operator)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_the_operators(name: str) -> None:
    assert inspect.signature(getattr(dlpack, name)) == inspect.signature(getattr(flk.ops, name))


def test_every_operator_is_there() -> None:
    assert set(NAMES) == set(flk.ops.__all__)


def test_inputs_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = torch.from_dlpack

    def spy(array: Any, **options: Any) -> torch.Tensor:
        tensor = original(array, **options)
        seen.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(dlpack, "from_dlpack", spy)
    x = np.ones((2, 3, 4))
    dlpack.gram(x, False)
    assert seen == [x.ctypes.data]


def call() -> Call:
    batch = FAMILIES["independent"].build(torch.float32)
    return "stacked_svd", (batch.b.numpy(), batch.a.numpy(), batch.scale.numpy(), 0.9)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.tolist(), TypeError, "must be an array with __dlpack__"),
        (lambda x: None, TypeError, "must be an array with __dlpack__"),
        (lambda x: x.astype(object), TypeError, "cannot be read through DLPack"),
        (lambda x: Elsewhere(torch.from_numpy(x)), ValueError, "DLPack's type 7"),
        (lambda x: torch.from_numpy(x).to("meta"), ValueError, "one device"),
    ],
    ids=["list", "none", "object", "elsewhere", "meta"],
)
def test_refused_arguments_are_named(
    place: int, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    name, arguments = call()
    changed = list(arguments)
    changed[place] = change(changed[place])
    with pytest.raises(error, match=message) as refusal:
        getattr(dlpack, name)(*changed)
    assert ("b", "a", "scale")[place] in str(refusal.value)


def test_jax_without_x64_names_the_switch() -> None:
    assert not jax.config.jax_enable_x64
    with pytest.raises(TypeError, match="jax_enable_x64"):
        dlpack.gram(jax.numpy.ones((2, 3, 4)), False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["florist", "fedit", "ffa"])
def test_aggregate_gives_the_clients_kind(rule: str, kind: str) -> None:
    make, type_ = KINDS[kind]
    round_ = draw(ranks=(4, 4, 4), common_a=rule == "ffa")
    states = [adapter.state_dict() for adapter in round_.adapters]
    configs = [adapter.config for adapter in round_.adapters]
    expected = flk.aggregate(round_.adapters, rule=rule).adapter
    found = dlpack.aggregate(
        [converted_state(state_, make) for state_ in states], configs, rule=rule
    )
    assert found.config == expected.config
    assert found.state_dict.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert_same_bits(found.state_dict[key], tensor, type_, key)
        if kind == "numpy":
            memory = [np.shares_memory(found.state_dict[key], s[key].numpy()) for s in states]
            assert not any(memory), key


def converted_state(tensors: dict[str, Any], make: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: make(tensor) for key, tensor in tensors.items()}


def test_aggregate_names_the_client_and_tensor() -> None:
    round_ = draw(ranks=(4, 4, 4))
    states = [converted_state(x.state_dict(), lambda t: t.numpy()) for x in round_.adapters]
    key = sorted(states[1])[0]
    states[1][key] = states[1][key].tolist()
    with pytest.raises(flk.AdapterError, match=r"client 1, tensor .*__dlpack__"):
        dlpack.aggregate(states, round_.adapters[0].config, rule="fedit")
    with pytest.raises(ValueError, match="found 2 for 3"):
        dlpack.aggregate(states, [{}, {}], rule="fedit")
