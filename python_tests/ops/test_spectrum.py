"""spectrum against the dense singular value decomposition of the update."""

from collections.abc import Iterable

import pytest
import torch
from assertions import (
    EPS,
    EXACT_PRODUCT,
    SPECTRUM_TERMS,
    BadCall,
    assert_compiles,
    assert_refuses,
    assert_same_bits,
    assert_singular_values,
    assert_within,
    poisoned_memory,
    strided_in_nan,
)
from matrices import (
    CANCELLED,
    CASES,
    DEVICE,
    EXACT_AND_ROUNDED,
    FAMILIES,
    Batch,
    Large,
    Shape,
    canceling,
    case_id,
    large_cases,
)

from fedlora_kernels import ops, reference

raw = torch.ops.fedlora

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def grams(batch: Batch) -> Arguments:
    """Float64 Gram matrices and the diagonal of D, on the device under test."""
    gram_b, gram_a = reference.gram(batch.b, rows=False), reference.gram(batch.a, rows=True)
    return gram_b.to(DEVICE), gram_a.to(DEVICE), batch.scale.to(DEVICE)


def gram_noise(batch: Batch) -> torch.Tensor:
    """[L], c R eps magnitude^2: what is left of a squared singular value after a Gram matrix."""
    terms = SPECTRUM_TERMS * batch.stacked_rank * EPS[torch.float64]
    return terms * batch.magnitude().square()


def assert_spectrum(
    batch: Batch,
    expected: torch.Tensor,
    sigma: torch.Tensor,
    total_energy: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    info: torch.Tensor,
    needed: torch.Tensor,
) -> None:
    """The contract for the leading ``needed`` components; ``expected`` is from dense SVDs."""
    sigma, total_energy, left, right = (x.cpu() for x in (sigma, total_energy, left, right))
    b, a, dense, noise = batch.b.double(), batch.a.double(), batch.dense(), gram_noise(batch)
    assert info.dtype == torch.int64
    assert not info.any()
    assert_singular_values(sigma, expected, needed, batch.magnitude())
    assert_within((total_energy - dense.square().sum((1, 2))).abs(), noise, "total energy")
    absent = sigma == 0
    assert not left[absent[:, None, :].expand_as(left)].any(), "left is not zero where sigma is"
    assert not right[absent[:, :, None].expand_as(right)].any(), "right is not zero where sigma is"
    principal = b @ left
    products = principal.mT @ principal - torch.diag_embed(sigma.square())
    assert_within(products.abs().amax((1, 2)), noise, "B left is not U Sigma")
    for module in range(batch.modules):
        count = int((sigma[module].square() > noise[module]).sum())
        if count == 0:
            continue
        rows = right[module, :count] @ a[module]
        error = (rows @ rows.mT - torch.eye(count)).abs().amax(1)
        bound = noise[module] / sigma[module, :count].square()
        assert_within(error, bound.amax(), "rows of right A are not orthonormal")
        projected = dense[module] @ rows.mT - principal[module, :, :count]
        lost = noise[module] / sigma[module, :count]
        bound = EXACT_PRODUCT * batch.magnitude()[module] + lost
        assert_within(projected.norm(dim=0), bound, "dW V is not B left")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_component(case: tuple[str, torch.dtype]) -> None:
    assert_every_component(FAMILIES[case[0]].build(case[1]))


@pytest.mark.parametrize("case", large_cases())
def test_large_ranks(case: Large) -> None:
    """Another kernel, or another share of its memory, than the families' own sizes reach."""
    assert_every_component(case.build(torch.float32))


def assert_every_component(batch: Batch) -> None:
    """The decomposition of a whole batch, and the update from it."""
    with poisoned_memory():
        result = raw.spectrum(*grams(batch))
    everything = torch.full((batch.modules,), batch.attainable_rank)
    _, _, sigma, _ = reference.stacked_svd(batch.b, batch.a, batch.scale, 1.0)
    numerical = sigma.square() > 2 * gram_noise(batch)[:, None]
    assert_spectrum(batch, sigma, *result, needed=torch.minimum(everything, numerical.sum(1)))
    # What the decomposition leaves out is below the resolution of a Gram matrix.
    _, _, left, right, _ = (x.cpu() for x in result)
    error = torch.linalg.matrix_norm(
        (batch.b.double() @ left) @ (right @ batch.a.double()) - batch.dense()
    )
    dropped = torch.where(numerical, 0.0, sigma).norm(dim=1)
    assert_within(error, EXACT_PRODUCT * batch.magnitude() + dropped, "B left right A")


@pytest.mark.parametrize("name", FAMILIES)
def test_energy_and_cap_still_give_the_leading_part(name: str) -> None:
    batch = FAMILIES[name].build(torch.float32)
    few = ((0.5, None), (0.9, 3), (0.99, batch.stacked_rank + 5), (1 - 1e-6, None))
    assert_leading_part(batch, few)


@pytest.mark.parametrize("case", large_cases())
def test_leading_part_of_large_ranks(case: Large) -> None:
    """A kernel of its own on a GPU, from a stacked rank of 65 on."""
    assert_leading_part(case.build(torch.float32), ((0.9, None), (1.0, 16)))


def assert_leading_part(batch: Batch, wanted: Iterable[tuple[float, int | None]]) -> None:
    """What the asked shares of the energy and numbers of components need, and no less."""
    _, _, sigma, _ = reference.stacked_svd(batch.b, batch.a, batch.scale, 1.0)
    total = batch.dense().square().sum((1, 2))
    real = total > gram_noise(batch)
    for energy, cap in wanted:
        # Just below the asked energy, so that a component on the threshold is not required.
        needed = reference.select_rank(sigma, total, energy - 1e-9, cap)
        with poisoned_memory():
            result = raw.spectrum(*grams(batch), energy, cap)
        assert_spectrum(batch, sigma, *result, needed=torch.where(real, needed, 0))


@pytest.mark.parametrize("shape", CANCELLED)
def test_clients_that_cancel_are_zero(shape: Shape) -> None:
    """Exactly, and up to the rounding of the weights: no sigma, and zero coefficients."""
    for weights in EXACT_AND_ROUNDED:
        b, a, scale = canceling(torch.float32, shape, weights)
        gram_b, gram_a = reference.gram(b, rows=False), reference.gram(a, rows=True)
        for result in (
            reference.spectrum(gram_b, gram_a, scale),
            raw.spectrum(gram_b.to(DEVICE), gram_a.to(DEVICE), scale.to(DEVICE)),
        ):
            sigma, _, left, right, info = result
            for tensor in (sigma, left, right, info):
                assert not tensor.any(), weights


def test_modules_do_not_mix() -> None:
    batch = FAMILIES["mixed_modules"].build(torch.float64)
    together = raw.spectrum(*grams(batch))
    for module in range(batch.modules):
        alone = raw.spectrum(*(x[module : module + 1].clone() for x in grams(batch)))
        bound = gram_noise(batch)[module] / batch.magnitude()[module].clamp_min(1e-300)
        error = (alone[0][0] - together[0][module]).abs().cpu()
        assert_within(error, bound, f"singular values of module {module}")


def test_order_of_clients_changes_rounding_only() -> None:
    batch = FAMILIES["heterogeneous_ranks"].build(torch.float32)
    other = batch.reordered([4, 0, 5, 2, 1, 3])
    sigma, total_energy, *_ = raw.spectrum(*grams(batch))
    sigma_other, total_other, *_ = raw.spectrum(*grams(other))
    noise = gram_noise(batch)
    difference = (sigma.square() - sigma_other.square()).abs().amax(1).cpu()
    assert_within(difference, noise, "squared singular values")
    assert_within((total_energy - total_other).abs().cpu(), noise, "total energy")


def test_float32_scale_and_non_contiguous_grams() -> None:
    batch = FAMILIES["zero_weight"].build(torch.float32)
    gram_b, gram_a, scale = grams(batch)
    plain = raw.spectrum(gram_b, gram_a, scale)
    strided = raw.spectrum(
        strided_in_nan(gram_b), strided_in_nan(gram_a), strided_in_nan(scale[None])[0]
    )
    assert_within((plain[0] - strided[0]).abs().cpu(), 1e-12, "singular values of strided Grams")
    rounded = raw.spectrum(gram_b, gram_a, scale.float())
    assert rounded[0].dtype == torch.float64
    assert_within((plain[0] - rounded[0]).abs().cpu(), 0.0, "singular values of float32 scale 0.5")


def test_deterministic() -> None:
    arguments = grams(FAMILIES["many_clients"].build(torch.float32))
    assert_same_bits(raw.spectrum(*arguments), raw.spectrum(*arguments))


def test_opcheck() -> None:
    arguments = grams(FAMILIES["independent"].build(torch.float32))
    torch.library.opcheck(raw.spectrum.default, arguments)
    torch.library.opcheck(raw.spectrum.default, (*arguments, 0.9, 4))


def test_compiles() -> None:
    batches = [FAMILIES[name].build(torch.float32) for name in ("independent", "sign_flipped")]
    assert_compiles(ops.spectrum, [(*grams(batch), 0.9, 3) for batch in batches])


def bad_calls() -> dict[str, BadCall]:
    gram = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    scale = torch.ones(2, 4, dtype=torch.float64)
    return {
        "gram_b_float32": (TypeError, "spectrum", (gram.float(), gram, scale)),
        "gram_a_float32": (TypeError, "spectrum", (gram, gram.float(), scale)),
        "integer_scale": (TypeError, "spectrum", (gram, gram, scale.long())),
        "two_dimensions": (ValueError, "spectrum", (gram[0], gram[0], scale)),
        "gram_b_not_square": (ValueError, "spectrum", (gram[:, :, :3], gram, scale)),
        "ranks_differ": (ValueError, "spectrum", (gram, gram[:, :3, :3], scale)),
        "gram_a_of_one_module": (ValueError, "spectrum", (gram, gram[:1], scale)),
        "scale_of_another_rank": (ValueError, "spectrum", (gram, gram, scale[:, :3])),
        "scale_of_one_dimension": (ValueError, "spectrum", (gram, gram, scale[0])),
        "no_energy": (ValueError, "spectrum", (gram, gram, scale, 0.0)),
        "energy_over_1": (ValueError, "spectrum", (gram, gram, scale, 1.5)),
        "energy_nan": (ValueError, "spectrum", (gram, gram, scale, float("nan"))),
        "max_rank_0": (ValueError, "spectrum", (gram, gram, scale, 0.9, 0)),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])


@pytest.mark.parametrize("name", FAMILIES)
def test_reference_agrees_with_a_dense_svd(name: str) -> None:
    batch = FAMILIES[name].build(torch.float64)
    gram_b, gram_a = reference.gram(batch.b, rows=False), reference.gram(batch.a, rows=True)
    result = reference.spectrum(gram_b, gram_a, batch.scale)
    _, _, sigma, _ = reference.stacked_svd(batch.b, batch.a, batch.scale, 1.0)
    real = (sigma.square() > gram_noise(batch)[:, None]).sum(1)
    noise = gram_noise(batch)
    assert_within((result[0].square() - sigma.square()).abs(), noise[:, None], "singular values")
    assert_within((result[1] - sigma.square().sum(1)).abs(), noise, "total energy")
    b_left, right_a = batch.b.double() @ result[2], result[3] @ batch.a.double()
    for module, rank in enumerate(real.tolist()):
        left, right = b_left[module, :, :rank], right_a[module, :rank]
        truncated = reference.rules.truncate(batch.dense()[module], rank)
        error = torch.linalg.matrix_norm(left @ right - truncated)
        assert_within(error, EXACT_PRODUCT * batch.magnitude()[module], "leading part of dW")


@pytest.mark.parametrize("own", [0.02, 1.0])
def test_leading_part_of_a_rank_whose_core_is_not_formed(own: float) -> None:
    """From R = 1024 on the CPU applies it: what clients share is certified, what each has is not,
    and then the core is formed.
    """
    rank, size = 1040, 1056
    generator = torch.Generator().manual_seed(7)
    b, a, common = (torch.randn(rank, size, generator=generator).double() for _ in range(3))
    sizes = torch.linspace(2, 1, 5).repeat(rank // 5)[:, None]
    b = own * b + sizes * common[:5].repeat(rank // 5, 1)
    a = a + 3 * common[5:10].repeat(rank // 5, 1)
    scale = torch.linspace(0.5, 1.5, rank, dtype=torch.float64)
    sigma, total, left, right, info = raw.spectrum(
        (b @ b.mT)[None].to(DEVICE), (a @ a.mT)[None].to(DEVICE), scale[None].to(DEVICE), 0.9, None
    )
    dense = b.mT @ (scale[:, None] * a)
    values = torch.linalg.svdvals(dense)
    squares = values.square()
    needed = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
    noise = SPECTRUM_TERMS * rank * EPS[torch.float64]
    noise *= float((b.square().sum(1) * scale.square() * a.square().sum(1)).sum())
    assert not info.any()
    assert abs(float(total) - float(squares.sum())) <= noise
    assert ((sigma[0, :needed].cpu().square() - squares[:needed]).abs() <= noise).all()
    made = (b.mT @ left[0, :, :needed].cpu()) @ (right[0, :needed].cpu() @ a)
    lost = float((dense - made).square().sum()) - float(squares[needed:].sum())
    assert abs(lost) <= 1e-9 * float(squares.sum())
