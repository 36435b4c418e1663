"""interop.jax: the NumPy functions' bits, under jit and vmap, without torch, with and without x64.

This process has torch, and its JAX has no 64-bit arrays but where a test asks for them.
"""

import inspect
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import Call, calls
from matrices import CASES, FAMILIES, case_id

import fedlora_kernels.numpy as flk_numpy

jax = pytest.importorskip("jax", reason="needs JAX: pip install 'fedlora_kernels[jax]'")

import jax.numpy as jnp  # noqa: E402 - after the check

from fedlora_kernels.interop import jax as flk_jax  # noqa: E402 - after the check

EXAMPLE = Path(__file__).parents[2] / "examples" / "jax_aggregate.py"
# bfloat16 comes to NumPy through ml_dtypes, as in test_numpy.
NARROW = {np.dtype("float64"): np.dtype("float32"), np.dtype("int64"): np.dtype("int32")}


@pytest.fixture(name="x64")
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def in_numpy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(jnp.bfloat16)
    return value.numpy()


def calls_of(case: tuple[str, torch.dtype]) -> Iterator[Call]:
    """The calls that this door has, on NumPy arrays."""
    name, dtype = case
    for operator, arguments in calls(FAMILIES[name].build(dtype)):
        if operator in flk_jax.__all__:
            yield operator, tuple(map(in_numpy, arguments))


def static(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(i for i, value in enumerate(arguments) if not isinstance(value, np.ndarray))


def assert_same_bits(found: Any, expected: Any, what: str) -> None:
    found, expected = (one if isinstance(one, tuple) else (one,) for one in (found, expected))
    for index, (left, right) in enumerate(zip(found, expected, strict=True)):
        left = np.asarray(left)
        assert (left.dtype, left.shape) == (right.dtype, right.shape), f"{what}, result {index}"
        assert left.tobytes() == right.tobytes(), f"{what}, result {index} differs"


def narrowed(results: Any) -> Any:
    results = results if isinstance(results, tuple) else (results,)
    return tuple(one.astype(NARROW.get(one.dtype, one.dtype)) for one in results)


@pytest.mark.parametrize("name", flk_jax.__all__)
def test_arguments_and_defaults_are_those_of_numpy(name: str) -> None:
    ours, theirs = (
        [(item.name, item.default) for item in inspect.signature(face).parameters.values()]
        for face in (getattr(flk_jax, name), getattr(flk_numpy, name))
    )
    assert ours == theirs


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_same_bits_as_numpy(case: tuple[str, torch.dtype]) -> None:
    for name, arguments in calls_of(case):
        expected = getattr(flk_numpy, name)(*arguments)
        assert_same_bits(getattr(flk_jax, name)(*arguments), expected, name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_jit(dtype: torch.dtype) -> None:
    for name, arguments in calls_of(("independent", dtype)):
        compiled = jax.jit(getattr(flk_jax, name), static_argnums=static(arguments))
        expected = getattr(flk_numpy, name)(*arguments)
        for _ in range(2):
            assert_same_bits(compiled(*arguments), expected, f"{name} under jit")


def shifted(value: Any, by: int) -> Any:
    """Other values of the same kind: modules in another order."""
    return np.roll(value, by, axis=0) if isinstance(value, np.ndarray) else value


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_vmap(dtype: torch.dtype) -> None:
    """All arrays batched; only the first; and two batch dimensions, under jit."""
    for name, arguments in calls_of(("independent", dtype)):
        run, on_host = getattr(flk_jax, name), getattr(flk_numpy, name)
        options = static(arguments)
        arrays = [value for i, value in enumerate(arguments) if i not in options]
        others = arguments[len(arrays) :]
        assert options == tuple(range(len(arrays), len(arguments)))
        batches = [[shifted(value, by) for value in arrays] for by in range(3)]
        expected = [on_host(*batch, *others) for batch in batches]
        stacked = [np.stack(values) for values in zip(*batches, strict=True)]
        face = partial(lambda run, others, *arrays: run(*arrays, *others), run, others)

        found = jax.vmap(face)(*stacked)
        check_entries(found, expected, name)
        found = jax.jit(jax.vmap(jax.vmap(face)))(*(value[None] for value in stacked))
        check_entries(jax.tree.map(lambda one: one[0], found), expected, f"{name} twice")
        found = jax.vmap(face, in_axes=(0,) + (None,) * (len(arrays) - 1))(stacked[0], *arrays[1:])
        expected = [on_host(batch[0], *arrays[1:], *others) for batch in batches]
        check_entries(found, expected, f"{name}, first argument only")


def check_entries(found: Any, expected: list[Any], what: str) -> None:
    for index, one in enumerate(expected):
        entry = jax.tree.map(lambda array, index=index: array[index], found)
        assert_same_bits(entry, one, f"{what}, entry {index}")


# without 64-bit arrays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_without_x64_results_are_rounded(dtype: torch.dtype) -> None:
    """The same computation in float64; float32 is what goes in and what comes out."""
    names = set()
    for name, arguments in calls_of(("heterogeneous_ranks", dtype)):
        check_rounded(name, arguments, names)
    for name, arguments in calls_of(("independent", dtype)):
        check_rounded(name, arguments, names)
    assert names == {"combine", "weighted_sum", "stacked_svd", "flora_na"}


def check_rounded(name: str, arguments: tuple[Any, ...], names: set[str]) -> None:
    if name not in ("combine", "weighted_sum", "stacked_svd", "flora_na"):
        return
    names.add(name)
    single = tuple(
        value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value
        for value in arguments
    )
    expected = narrowed(getattr(flk_numpy, name)(*single))
    assert_same_bits(getattr(flk_jax, name)(*arguments), expected, name)
    compiled = jax.jit(getattr(flk_jax, name), static_argnums=static(arguments))
    assert_same_bits(compiled(*arguments), expected, f"{name} under jit")


@pytest.mark.parametrize(
    "name", ["gram", "spectrum", "select_rank", "client_products", "surrogate"]
)
def test_without_x64_the_switch_is_named(name: str) -> None:
    for operator, arguments in calls_of(("independent", torch.float32)):
        if operator == name:
            with pytest.raises(TypeError, match=f"{name} computes in float64.*jax_enable_x64"):
                getattr(flk_jax, name)(*arguments)


# mistakes


def test_mistakes_are_those_of_numpy_and_found_while_tracing() -> None:
    b, a, scale = np.ones((2, 5, 6), np.float32), np.ones((2, 6, 7), np.float32), np.ones((2, 6))
    scale = scale.astype(np.float32)
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("stacked_svd", (b[0], a, scale, 0.9)),
        ("stacked_svd", (b, a[:1], scale, 0.9)),
        ("stacked_svd", (b, a, scale[:, :5], 0.9)),
        ("stacked_svd", (b, a, scale, 1.5)),
        ("stacked_svd", (b, a, scale, 0.9, 0)),
        ("stacked_svd", (b, a, scale, 1.0, None, "fast")),
        ("stacked_svd", (b, a.astype(np.float16), scale, 0.9)),
        ("stacked_svd", (b.astype(np.int32), a.astype(np.int32), scale, 0.9)),
        ("stacked_svd", (np.ones((), np.float32), a, scale, 0.9)),
        ("flora_na", (b, a, np.ones(4, np.float32), np.ones((2, 4), np.float32))),
        ("weighted_sum", (b, np.ones(4, np.float32))),
        ("weighted_sum", (b[0, 0], scale)),
        ("combine", (b, a, scale, scale)),
    ]
    for name, arguments in wrong:
        with pytest.raises((TypeError, ValueError)) as expected:
            getattr(flk_numpy, name)(*arguments)
        compiled = jax.jit(getattr(flk_jax, name), static_argnums=static(arguments))
        for run in (getattr(flk_jax, name), lambda *a, c=compiled: c.lower(*a)):
            with pytest.raises(expected.type) as found:
                run(*arguments)
            assert str(found.value) == str(expected.value)


def test_an_option_must_be_static() -> None:
    b, a, scale = jnp.ones((1, 3, 2)), jnp.ones((1, 2, 3)), jnp.ones((1, 2))
    with pytest.raises(TypeError, match=r"energy must be a Python value, found a traced one"):
        jax.jit(flk_jax.stacked_svd)(b, a, scale, 0.9)


def test_factors_that_are_not_finite() -> None:
    b, a, scale = jnp.full((1, 3, 2), jnp.nan), jnp.ones((1, 2, 3)), jnp.ones((1, 2))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"module 0: .* not finite"):
        jax.block_until_ready(flk_jax.stacked_svd(b, a, scale, 0.9))


# a process of its own

WITHOUT = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_example_in_a_process_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(EXAMPLE)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["layer 0", "layer 1", "layer 2"]
    assert all(float(line.rpartition(" ")[2]) < 0.32 for line in lines)  # sqrt(1 - 0.9)


def test_the_example_here(capsys: pytest.CaptureFixture[str]) -> None:
    """The relative errors that the example prints, computed densely in float64."""
    names = runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    b, a, scale, b_g, a_g = (
        np.asarray(names[key], np.float64) for key in ("b", "a", "scale", "b_g", "a_g")
    )
    ideal = (b * scale[:, None, :]) @ a
    errors = np.linalg.norm(b_g @ a_g - ideal, axis=(1, 2)) / np.linalg.norm(ideal, axis=(1, 2))
    assert errors == pytest.approx(printed, abs=1e-4)
