"""gram and gram_list against x x^T in float64."""

import pytest
import torch
from assertions import (
    BadCall,
    assert_compiles,
    assert_gram,
    assert_refuses,
    assert_same_bits,
    assert_within,
    poisoned_memory,
    strided_in_nan,
)
from matrices import CASES, DEVICE, DTYPES, FAMILIES, case_id

from fedlora_kernels import ops, reference

raw = torch.ops.fedlora


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_both_sides(case: tuple[str, torch.dtype], precision: str) -> None:
    name, dtype = case
    batch = FAMILIES[name].build(dtype)
    b, a, _ = batch.inputs()
    with poisoned_memory():
        assert_gram(raw.gram(b, False, precision), batch.b, False, precision)
        assert_gram(raw.gram(a, True, precision), batch.a, True, precision)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_list_is_the_stack(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    batch = FAMILIES[name].build(dtype)
    bs, as_ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    assert_gram(raw.gram_list(bs, batch.modules, False), batch.b, False)
    assert_gram(raw.gram_list(as_, batch.modules, True), batch.a, True)
    assert_gram(raw.gram_list(as_, batch.modules, True, "fast"), batch.a, True, "fast")


@pytest.mark.parametrize("depth", [1, 2, 511, 512, 513, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depths_around_a_chunk(depth: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, depth, dtype=torch.float64).to(dtype)
    for precision in ("exact", "fast"):
        assert_gram(raw.gram(x.to(DEVICE), True, precision), x, True, precision)
        assert_gram(raw.gram(x.mT.to(DEVICE), False, precision), x.mT, False, precision)


def test_fast_promotes_to_float64() -> None:
    """400000 equal terms: a float32 total alone would be off by far more than FAST_PRODUCT."""
    x = torch.full((1, 2, 400_000), 1.1, dtype=torch.float32)
    assert_gram(raw.gram(x.to(DEVICE), True, "fast"), x, True, "fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [None, 1 / 3, 0.7])
def test_fast_is_within_its_documented_error(value: float | None, dtype: torch.dtype) -> None:
    """Positive terms, and equal ones whose roundings all go one way: docs/kernels.md."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, 24, 4133, generator=generator).to(dtype)
    if value is not None:
        x = torch.full_like(x, value)
    exact = reference.gram(x, True)
    error = (raw.gram(x.to(DEVICE), True, "fast").cpu() - exact).abs()
    assert_within(error, 32 * torch.finfo(torch.float32).eps * exact, "Gram matrix")


def test_exact_resolves_what_float32_data_carries() -> None:
    """Nearly parallel rows: 1e-7 of the norm is left after cancellation, and is right to 1e-6."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(1, 1, 301, generator=generator)
    x = torch.cat([start, start * (1 + 2**-20 * torch.randn(1, 1, 301, generator=generator))], 1)
    gram = raw.gram(x.to(DEVICE), True).cpu()
    difference = gram[0, 0, 0] - 2 * gram[0, 0, 1] + gram[0, 1, 1]
    expected = (x[0, 0].double() - x[0, 1].double()).square().sum()
    assert_within((difference - expected).abs(), 1e-2 * expected, "squared distance")


def test_single_module_and_batch_agree() -> None:
    batch = FAMILIES["tile_edges"].build(torch.float32)
    _, a, _ = batch.inputs()
    for module in range(batch.modules):
        one = raw.gram(a[module : module + 1].clone(), True)
        assert_gram(one, batch.a[module : module + 1], True)


def test_single_element() -> None:
    x = torch.tensor([[[3.0]]], dtype=torch.bfloat16, device=DEVICE)
    assert raw.gram(x, True).tolist() == [[[9.0]]]
    assert raw.gram(x, False).tolist() == [[[9.0]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype: torch.dtype) -> None:
    batch = FAMILIES["primes"].build(dtype)
    b, a, _ = batch.inputs()
    for precision in ("exact", "fast"):
        assert_gram(raw.gram(strided_in_nan(b), False, precision), batch.b, False, precision)
        assert_gram(raw.gram(strided_in_nan(a), True, precision), batch.a, True, precision)
    bs, as_ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    assert_gram(raw.gram_list([strided_in_nan(b) for b in bs], 1, False), batch.b, False)
    assert_gram(raw.gram_list([strided_in_nan(a) for a in as_], 1, True), batch.a, True)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_deterministic(precision: str) -> None:
    b, a, _ = FAMILIES["tile_edges"].build(torch.float32).inputs()
    assert_same_bits(raw.gram(b, False, precision), raw.gram(b, False, precision))
    assert_same_bits(raw.gram(a, True, precision), raw.gram(a, True, precision))


def test_inputs_are_left_alone() -> None:
    _, a, _ = FAMILIES["independent"].build(torch.float32).inputs()
    before = a.clone()
    raw.gram(a, True)
    assert_same_bits(a, before)


def test_opcheck() -> None:
    batch = FAMILIES["heterogeneous_ranks"].build(torch.float32)
    b, a, _ = batch.inputs()
    bs, _ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    torch.library.opcheck(raw.gram.default, (a, True))
    torch.library.opcheck(raw.gram.default, (b, False, "fast"))
    torch.library.opcheck(raw.gram_list.default, (bs, batch.modules, False))


def test_compiles() -> None:
    batches = [FAMILIES[name].build(torch.float32) for name in ("independent", "sign_flipped")]
    assert_compiles(ops.gram, [(batch.inputs()[1], True) for batch in batches])
    lists = [[a.to(DEVICE) for a in batch.client_factors()[1][:2]] for batch in batches]
    assert_compiles(ops.gram_list, [(factors, 1, True) for factors in lists])


def bad_calls() -> dict[str, BadCall]:
    x = torch.ones(2, 3, 5)
    return {
        "two_dimensions": (ValueError, "gram", (x[0], True)),
        "four_dimensions": (ValueError, "gram", (x[None], True)),
        "unknown_precision": (ValueError, "gram", (x, True, "exactly")),
        "integers": (TypeError, "gram", (x.int(), True)),
        "complex": (TypeError, "gram", (x.to(torch.complex64), True)),
        "no_tensors": (ValueError, "gram_list", ([], 1, True)),
        "three_tensors_of_two_modules": (ValueError, "gram_list", ([x[0], x[0], x[0]], 2, True)),
        "no_modules": (ValueError, "gram_list", ([x[0], x[0]], 0, True)),
        "a_stack_in_the_list": (ValueError, "gram_list", ([x], 1, True)),
        "depths_differ": (ValueError, "gram_list", ([x[0], x[0, :, :4]], 1, True)),
        "ranks_differ_between_modules": (ValueError, "gram_list", ([x[0], x[0, :2]], 2, True)),
        "unknown_precision_of_a_list": (ValueError, "gram_list", ([x[0], x[0]], 1, True, "quick")),
        "dtypes_differ": (TypeError, "gram_list", ([x[0], x[0].double()], 1, True)),
        "integers_in_the_list": (TypeError, "gram_list", ([x[0].int(), x[0].int()], 1, True)),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])


def test_reference_is_the_definition() -> None:
    x = torch.randint(-9, 10, (2, 3, 7))
    expected = torch.stack([module @ module.T for module in x]).double()
    assert torch.equal(reference.gram(x.float(), True), expected)
    assert torch.equal(reference.gram(x.float().mT, False), expected)
