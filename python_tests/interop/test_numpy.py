"""fedlora_kernels.numpy: the torch operators' bits, lists, layouts, errors, threads, no torch.

Expected values come from the torch operators on the compiled CPU backend, in the same process.
"""

import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from assertions import strided_in_nan
from calls import Call, calls
from matrices import CASES, DTYPES, FAMILIES, Family, case_id, normal

import fedlora_kernels as flk
import fedlora_kernels.numpy as flk_numpy

NAMES = [name for name in flk_numpy.__all__ if name != "set_num_threads"]
LARGE = Family(
    "large", FAMILIES["independent"].draw, m=700, n=450, ranks=(16,) * 6, scalings=(0.5,) * 6
)
"""Big enough that one module's work is divided between threads."""


def to_numpy(value: Any) -> Any:
    """A torch tensor as an array on the same memory and strides; lists and tuples of them too."""
    if isinstance(value, list | tuple):
        return type(value)(to_numpy(item) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def strided(value: Any) -> Any:
    """Tensors with gaps of NaN between their elements; other arguments as they are."""
    if isinstance(value, list):
        return [strided(item) for item in value]
    if isinstance(value, torch.Tensor) and value.dim() >= 2:
        return strided_in_nan(value)
    return value


def in_torch(call: Call) -> Any:
    name, arguments = call
    return getattr(flk.ops, name)(*arguments)


def in_numpy(call: Call) -> Any:
    name, arguments = call
    return getattr(flk_numpy, name)(*to_numpy(arguments))


def assert_same_bits(found: Any, expected: Any, what: str) -> None:
    """Arrays, or tuples of them, of one dtype, shape and content, signs of zero included."""
    assert isinstance(found, tuple) == isinstance(expected, tuple), what
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for index, (left, right) in enumerate(zip(found, to_numpy(expected), strict=True)):
        assert left.dtype == right.dtype, f"{what}, result {index}"
        assert left.shape == right.shape, f"{what}, result {index}"
        assert left.tobytes() == right.tobytes(), f"{what}, result {index} differs"


def test_every_function_is_called_by_these_tests() -> None:
    assert {name for name, _ in calls(FAMILIES["independent"].build(torch.float32))} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_defaults_are_the_operators(name: str) -> None:
    faces = (getattr(flk.ops, name), getattr(flk_numpy, name))
    ours, theirs = (
        [(item.name, item.default) for item in inspect.signature(face).parameters.values()]
        for face in faces
    )
    assert ours == theirs


# the same bits


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_same_bits_as_the_torch_operators(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    for call in calls(FAMILIES[name].build(dtype)):
        assert_same_bits(in_numpy(call), in_torch(call), call[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["independent", "rank_deficient", "wide_stack", "wide_stack_tall", "tile_edges"]
)
def test_strides_do_not_change_bits(name: str, dtype: torch.dtype) -> None:
    for name_, arguments in calls(FAMILIES[name].build(dtype)):
        gaps = (name_, tuple(strided(argument) for argument in arguments))
        found = in_numpy(gaps)
        assert_same_bits(found, in_torch(gaps), f"{name_} with gaps")
        assert_same_bits(found, in_torch((name_, arguments)), f"{name_} without gaps")


def reversed_in_memory(x: np.ndarray) -> np.ndarray:
    """Negative strides in every dimension."""
    everything = (slice(None, None, -1),) * x.ndim
    return x[everything].copy()[everything]


def reversed_rows(x: np.ndarray) -> np.ndarray:
    """A contiguous last dimension under negative strides, which nothing has to copy."""
    rows = (slice(None, None, -1),) * (x.ndim - 1)
    return x[rows].copy()[rows]


def read_only(x: np.ndarray) -> np.ndarray:
    copy = x.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    "layout",
    [np.asfortranarray, reversed_in_memory, reversed_rows, read_only],
    ids=lambda layout: layout.__name__,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_that_torch_has_not(layout: Any, dtype: torch.dtype) -> None:
    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [layout(item) for item in value]
        return layout(value) if isinstance(value, np.ndarray) else value

    for name, arguments in calls(FAMILIES["independent"].build(dtype)):
        values = [changed(argument) for argument in to_numpy(arguments)]
        assert_same_bits(getattr(flk_numpy, name)(*values), in_torch((name, arguments)), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clients_and_modules_may_share_memory(dtype: torch.dtype) -> None:
    """numpy.broadcast_to: strides of zero over the modules and over the clients."""
    batch = FAMILIES["independent"].build(dtype)
    b, a = to_numpy((batch.b[:1], batch.a[:1]))
    scale = to_numpy(batch.scale)
    wide_b, wide_a = (np.broadcast_to(x, (batch.modules, *x.shape[1:])) for x in (b, a))
    found = flk_numpy.stacked_svd(wide_b, wide_a, scale, 0.9)
    expected = flk_numpy.stacked_svd(wide_b.copy(), wide_a.copy(), scale, 0.9)
    assert_same_bits(found, expected, "modules")
    clients = np.broadcast_to(a[:, None, :5], (1, batch.clients, 5, a.shape[2]))
    weights = to_numpy(batch.weights)
    found = flk_numpy.weighted_sum(clients, weights)
    assert_same_bits(found, flk_numpy.weighted_sum(clients.copy(), weights), "clients")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trailing", [(), (7,), (3, 5), (2, 3, 5)], ids=str)
def test_weighted_sum_of_any_shape(trailing: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(trailing))
    stacked = normal(generator, 2, 4, *trailing).to(dtype)
    call = ("weighted_sum", (stacked, normal(generator, 2, 4)))
    assert_same_bits(in_numpy(call), in_torch(call), "weighted_sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_modules_and_empty_factors(dtype: torch.dtype) -> None:
    b, a = torch.zeros(0, 5, 4, dtype=dtype), torch.zeros(0, 4, 7, dtype=dtype)
    weights, scalings = torch.ones(2), torch.ones(0, 2)
    for call in (
        ("gram", (b, False)),
        ("gram", (torch.zeros(2, 3, 0, dtype=dtype), True)),
        ("combine", (b, a, torch.ones(0, 4, 2), torch.ones(0, 2, 4))),
        ("stacked_svd", (b, a, torch.ones(0, 4), 0.9)),
        ("flora_na", (b, a, weights, scalings)),
        ("weighted_sum", (torch.zeros(0, 2, 3, dtype=dtype), weights)),
    ):
        assert_same_bits(in_numpy(call), in_torch(call), call[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["independent", "heterogeneous_ranks", "wide_stack", "all_zero"])
def test_lists_equal_stacks(name: str, dtype: torch.dtype) -> None:
    batch = FAMILIES[name].build(dtype)
    b, a, scale, weights, scalings = to_numpy(
        (batch.b, batch.a, batch.scale, batch.weights, batch.scalings)
    )
    bs, as_ = to_numpy(batch.client_factors())
    x, y = np.ones((batch.modules, scale.shape[1], 2)), np.ones((batch.modules, 2, scale.shape[1]))
    for precision in ("exact", "fast"):
        for factors, stacked, rows in ((bs, b, False), (as_, a, True)):
            found = flk_numpy.gram_list(factors, batch.modules, rows, precision)
            assert_same_bits(found, flk_numpy.gram(stacked, rows, precision), "gram_list")
        found = flk_numpy.stacked_svd_list(bs, as_, scale, 0.9, None, precision)
        expected = flk_numpy.stacked_svd(b, a, scale, 0.9, None, precision)
        assert_same_bits(found, expected, "stacked_svd_list")
    found = flk_numpy.combine_list(bs, as_, x, y)
    assert_same_bits(found, flk_numpy.combine(b, a, x, y), "combine_list")
    if len(set(batch.ranks)) > 1:
        return
    found = flk_numpy.flora_na_list(bs, as_, weights, scalings)
    assert_same_bits(found, flk_numpy.flora_na(b, a, weights, scalings), "flora_na_list")
    stacked = a.reshape(batch.modules, batch.clients, -1, a.shape[2])
    found = flk_numpy.weighted_sum_list(as_, scalings)
    assert_same_bits(found, flk_numpy.weighted_sum(stacked, scalings), "weighted_sum_list")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_new_arrays_and_arguments_stay(dtype: torch.dtype) -> None:
    for name, arguments in calls(FAMILIES["rank_deficient"].build(dtype)):
        values = to_numpy(arguments)
        before = pickle.dumps(values)
        results = getattr(flk_numpy, name)(*values)
        for result in results if isinstance(results, tuple) else (results,):
            assert result.flags.c_contiguous, name
            assert result.flags.owndata, name
            result[...] = 1
        assert pickle.dumps(values) == before, name


# threads


@pytest.fixture(name="large", scope="module")
def _large() -> list[Call]:
    """Calls that are worth several threads, on an odd number of modules."""
    family = Family(**{**vars(LARGE), "modules": 3})
    return list(calls(family.build(torch.float32)))


@pytest.fixture(name="set_threads")
def _set_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """set_num_threads; afterwards the number is what it was."""
    monkeypatch.setattr(flk_numpy, "_threads", flk_numpy._threads)
    return flk_numpy.set_num_threads


def test_the_number_of_threads_does_not_change_bits(large: list[Call], set_threads: Any) -> None:
    expected = [in_torch(call) for call in large]
    for count in (1, 2, 3, 8):
        set_threads(count)
        for call, result in zip(large, expected, strict=True):
            assert_same_bits(in_numpy(call), result, f"{call[0]} on {count} threads")


def test_calls_from_several_python_threads(large: list[Call]) -> None:
    expected = [in_torch(call) for call in large]
    with ThreadPoolExecutor(4) as pool:
        for call, found, result in zip(
            large * 2, pool.map(in_numpy, large * 2), expected * 2, strict=True
        ):
            assert_same_bits(found, result, call[0])


def test_there_is_at_least_one_thread() -> None:
    before = flk_numpy._threads
    for count in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1 thread, found {count}"):
            flk_numpy.set_num_threads(count)
    assert flk_numpy._threads == before


@pytest.mark.parametrize(
    ("variable", "count"), [("3", 3), ("", len(os.sched_getaffinity(0))), ("4,2", 4)]
)
def test_threads_at_first(variable: str, count: int) -> None:
    """OMP_NUM_THREADS as OpenMP reads it: empty is unset, a list has a number for each level."""
    code = "import fedlora_kernels.numpy as flk_numpy; print(flk_numpy._threads)"
    assert run(code, threads=variable) == f"{count}\n"


# An interpreter that never takes its lock away: the other thread runs only when a call gives it up.
LOCK = """
import sys, threading, time
sys.setswitchinterval(3600)
import numpy as np
import fedlora_kernels.numpy as flk_numpy

x, gate, ran = np.ones((1, 64, 20000), np.float32), threading.Lock(), []
gate.acquire()
threading.Thread(target=lambda: (gate.acquire(), ran.append(True)), daemon=True).start()
gate.release()
start = time.monotonic()
while time.monotonic() < start + 0.3:
    pass
before = len(ran)
while not ran and time.monotonic() < start + 60:
    flk_numpy.gram(x, True)
after = len(ran)  # printing gives the lock up as well
print(before, after)
"""


def test_the_interpreters_lock_is_released() -> None:
    """Plain Python lets no other thread run here; an operator does."""
    assert run(LOCK).split() == ["0", "1"]


# errors


def mistakes() -> Iterator[tuple[str, Call]]:
    """One wrong argument each, as name and call."""
    b, a = torch.ones(2, 5, 6), torch.ones(2, 6, 7)
    bs, as_ = [torch.ones(5, 3)] * 4, [torch.ones(3, 7)] * 4
    gram, scale = torch.eye(6, dtype=torch.float64).expand(2, 6, 6), torch.ones(2, 6)
    weights, scalings = torch.ones(2), torch.ones(2, 2)
    x, y = torch.ones(2, 6, 3), torch.ones(2, 3, 6)
    sigma, total = torch.ones(2, 6, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    yield "two dimensions", ("gram", (b[0], False))
    yield "integers", ("gram", (b.long(), False))
    yield "booleans", ("gram", (b.bool(), False))
    yield "complex", ("gram", (b.cfloat(), False))
    yield "precision", ("gram", (b, False, "exactly"))
    yield "empty list", ("gram_list", ([], 2, False))
    yield "modules 0", ("gram_list", (bs, 0, False))
    yield "modules 3", ("gram_list", (bs, 3, False))
    yield "listed cube", ("gram_list", ([*bs[:3], b], 2, False))
    yield "listed dtypes", ("gram_list", ([*bs[:3], bs[3].half()], 2, False))
    yield "listed integers", ("gram_list", ([item.int() for item in bs], 2, False))
    yield "ranks by module", ("gram_list", ([*bs[:3], bs[3][:, :2]], 2, False))
    yield "depths", ("gram_list", ([bs[0], bs[1][:4]] * 2, 2, False))
    yield "listed precision", ("gram_list", (bs, 2, False, ""))
    yield "float32 gram", ("spectrum", (gram, gram.float(), scale))
    yield "matrix gram", ("spectrum", (gram[0], gram, scale))
    yield "oblong gram", ("spectrum", (gram[:, :5], gram, scale))
    yield "smaller gram", ("spectrum", (gram, gram[:, :5, :5], scale))
    yield "integer scale", ("spectrum", (gram, gram, scale.int()))
    yield "long scale", ("spectrum", (gram, gram, torch.ones(2, 7)))
    yield "energy 0", ("spectrum", (gram, gram, scale, 0.0))
    yield "energy nan", ("spectrum", (gram, gram, scale, float("nan")))
    yield "max_rank 0", ("spectrum", (gram, gram, scale, 0.5, 0))
    yield "sigma dtype", ("select_rank", (sigma.float(), total, 0.9))
    yield "sigma dimensions", ("select_rank", (sigma[0], total, 0.9))
    yield "total dtype", ("select_rank", (sigma, total.float(), 0.9))
    yield "total shape", ("select_rank", (sigma, total[:1], 0.9))
    yield "energy 1.5", ("select_rank", (sigma, total, 1.5))
    yield "energy -2", ("select_rank", (sigma, total, -2.0))
    yield "max_rank -1", ("select_rank", (sigma, total, 0.9, -1))
    yield "scale of three", ("client_products", (gram, gram, torch.ones(2, 3), [3, 3]))
    yield "scale dtype", ("client_products", (gram, gram, scalings.half(), [3, 3]))
    yield "client gram", ("client_products", (gram, gram.float(), scalings, [3, 3]))
    yield "rank -1", ("client_products", (gram, gram, scalings, [7, -1]))
    yield "ranks of seven", ("client_products", (gram, gram, scalings, [3, 4]))
    yield "three clients", ("surrogate", (gram, gram, torch.ones(4), torch.ones(2, 4)))
    yield "no clients", ("surrogate", (gram, gram, torch.ones(0), torch.ones(2, 0)))
    yield "weights shape", ("surrogate", (gram, gram, scalings, scalings))
    yield "weights dtype", ("surrogate", (gram, gram, weights.half(), scalings))
    yield "scalings shape", ("surrogate", (gram, gram, weights, torch.ones(2, 3)))
    yield "no sweeps", ("surrogate", (gram, gram, weights, scalings, 0))
    yield "tol -1", ("surrogate", (gram, gram, weights, scalings, 5, -1.0))
    yield "tol tiny", ("surrogate", (gram, gram, weights, scalings, 5, -1e-20))
    yield "tol nan", ("surrogate", (gram, gram, weights, scalings, 5, float("nan")))
    yield "b and a", ("combine", (b, a[:, :5], x, y))
    yield "b and a dtypes", ("combine", (b, a.half(), x, y))
    yield "half x", ("combine", (b, a, x.half(), y.half()))
    yield "x and y dtypes", ("combine", (b, a, x, y.double()))
    yield "x shape", ("combine", (b, a, torch.ones(2, 5, 3), y))
    yield "x dimensions", ("combine", (b, a, x[0], y))
    yield "y shape", ("combine", (b, a, x, x))
    yield "unequal lists", ("combine_list", (bs, as_[:2], x, y))
    yield "listed heights", ("combine_list", ([bs[0], bs[1][:4]] * 2, as_, x, y))
    yield "listed ranks", ("combine_list", (bs, [as_[0], as_[1][:2]] * 2, x, y))
    yield "lists' dtypes", ("combine_list", (bs, [item.half() for item in as_], x, y))
    yield "matrix x", ("combine_list", (bs, as_, x[0], y))
    yield "no client axis", ("weighted_sum", (torch.ones(3), weights))
    yield "integer stack", ("weighted_sum", (torch.ones(2, 2, 3).int(), weights))
    yield "integer weights", ("weighted_sum", (torch.ones(2, 2, 3), weights.long()))
    yield "many weights", ("weighted_sum", (torch.ones(2, 2, 3), torch.ones(3)))
    yield "weights cube", ("weighted_sum", (torch.ones(2, 2, 3), torch.ones(2, 2, 1)))
    yield "flat weights", ("weighted_sum_list", (bs, weights))
    yield "short list", ("weighted_sum_list", (bs[:3], scalings))
    yield "shapes", ("weighted_sum_list", ([*bs[:3], bs[3][:2]], scalings))
    yield "dtypes", ("weighted_sum_list", ([*bs[:3], bs[3].double()], scalings))
    yield "scale shape", ("stacked_svd", (b, a, scalings, 0.9))
    yield "scale dtype", ("stacked_svd", (b, a, scale.int(), 0.9))
    yield "energy 2", ("stacked_svd", (b, a, scale, 2.0))
    yield "fast energy 1", ("stacked_svd", (b, a, scale, 1.0, None, "fast"))
    yield "svd max_rank", ("stacked_svd", (b, a, scale, 0.9, 0))
    yield "svd precision", ("stacked_svd", (b, a, scale, 0.9, None, "slow"))
    yield "listed scale", ("stacked_svd_list", (bs, as_, scalings, 0.9))
    yield "flat scale", ("stacked_svd_list", (bs, as_, weights, 0.9))
    yield "listed fast", ("stacked_svd_list", (bs, as_, scale, 0.9999995, None, "fast"))
    yield "four clients", ("flora_na", (b, a, torch.ones(4), torch.ones(2, 4)))
    yield "flora scale", ("flora_na", (b, a, weights, scale))
    yield "flora precision", ("flora_na", (b, a, weights, scalings, "Exact"))
    yield "ranks", ("flora_na_list", ([bs[0], bs[1][:, :2]] * 2, [as_[0], as_[1][:2]] * 2,
                                      weights, scalings))  # fmt: skip
    yield "few scalings", ("flora_na_list", (bs, as_, torch.ones(1), torch.ones(2, 1)))


MISTAKES = dict(mistakes())


@pytest.mark.parametrize("what", MISTAKES)
def test_errors_are_the_operators(what: str) -> None:
    """Types and sentences; dtypes are called torch's there and numpy's here."""
    with pytest.raises((TypeError, ValueError)) as expected:
        in_torch(MISTAKES[what])
    with pytest.raises(expected.type) as found:
        in_numpy(MISTAKES[what])
    assert type(found.value) is expected.type
    assert str(found.value) == str(expected.value).replace("torch.", "")


def test_arrays_the_core_cannot_read() -> None:
    x = np.ones((2, 3, 5), np.float32)
    record = np.zeros((2, 3, 5), [("tag", np.int8), ("value", np.float32)])["value"]
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.float32, x.size, 1).reshape(x.shape)
    for array in (x.astype(">f4"), record, unaligned):
        with pytest.raises(ValueError, match="aligned and in native byte order"):
            flk_numpy.gram(array, True)
    for array in (np.full((2, 3, 5), "x"), np.full((2, 3, 5), None), np.zeros((2, 3, 5), "V4")):
        with pytest.raises(TypeError, match="x must be bfloat16, float16, float32 or float64"):
            flk_numpy.gram(array, True)


NOTHING = """
import numpy as np
import fedlora_kernels.numpy as flk_numpy

try:
    flk_numpy.gram(np.empty((2, 3, 5), []), True)
except TypeError as error:
    print(error)
"""


def test_elements_of_no_bytes() -> None:
    """A record without fields; in a process of its own, because a division by zero would end it."""
    assert "x must be bfloat16, float16, float32 or float64" in run(NOTHING)


# without torch

BLOCK = """
import sys

class Without:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)

names = sys.argv[1].split(",")
sys.meta_path[:] = [Without(finder, names) for finder in sys.meta_path]
"""

ALL = """
import pickle
from pathlib import Path
import fedlora_kernels.numpy as flk_numpy

made = pickle.loads(Path(sys.argv[2], "calls").read_bytes())
results = [getattr(flk_numpy, name)(*arguments) for name, arguments in made]
Path(sys.argv[2], "results").write_bytes(pickle.dumps(results))
try:
    flk_numpy.gram(made[0][1][0], True, "roughly")
except ValueError as error:
    print(error)
try:
    flk_numpy.gram(made[0][1][0].astype(int), True)
except TypeError as error:
    print(error)
print(sorted({*names} & set(sys.modules)))
"""


def run(code: str, *arguments: str, threads: str = "2") -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_functions_in_a_process_without_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    names = ("independent", "rank_deficient", "all_zero", "wide_stack", "heterogeneous_ranks")
    made = [call for name in names for call in calls(FAMILIES[name].build(dtype))]
    (tmp_path / "calls").write_bytes(pickle.dumps(to_numpy(made)))
    lines = run(BLOCK + ALL, "torch", str(tmp_path)).splitlines()
    results = pickle.loads((tmp_path / "results").read_bytes())
    for call, found in zip(made, results, strict=True):
        assert_same_bits(found, in_torch(call), call[0])
    assert lines[0] == "precision must be 'exact' or 'fast', found 'roughly'"
    assert lines[1] == "x must be bfloat16, float16, float32 or float64, found int64"
    assert lines[2] == "[]"


WITHOUT_BFLOAT16 = """
import numpy as np
import fedlora_kernels.numpy as flk_numpy

for dtype in (np.float16, np.float32, np.float64):
    b_g, a_g, sigma, ranks = flk_numpy.stacked_svd(
        np.ones((1, 3, 2), dtype), np.ones((1, 2, 5), dtype), np.ones((1, 2)), 0.9
    )
    print(b_g.dtype, ranks[0], abs(b_g @ a_g - 2).max() < 0.01)
print("ml_dtypes" in sys.modules)
"""


def test_ml_dtypes_is_needed_for_bfloat16_only() -> None:
    lines = run(BLOCK + WITHOUT_BFLOAT16, "torch,ml_dtypes").splitlines()
    assert lines == ["float16 1 True", "float32 1 True", "float64 1 True", "False"]
