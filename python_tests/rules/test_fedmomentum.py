"""FedMomentum: the leading components go on training, the tail is merged (arXiv 2603.08014)."""

import pytest
import torch
from assertions import EPS
from federation import EQUAL_RANK_CASES, Federation, draw, norm, of_batch, product_bound, update
from matrices import EQUAL_RANK_CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

import fedlora_kernels as flk
from fedlora_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_round(
    round_: Federation,
    last: dict[str, torch.Tensor],
    carried: flk.Adapter | None,
    momentum: float,
) -> flk.Aggregation:
    """One round beside the dense reference; ``last`` becomes this round's aggregate."""
    result = round_.aggregate("fedmomentum", momentum=momentum, carried=carried)
    assert result.residual is not None
    for module in round_.modules:
        before = last.get(module, torch.zeros_like(round_.ideal(module)))
        whole = round_.ideal(module) + momentum * before
        top, kept = reference.rules.fedmomentum(*round_.of(module), momentum=momentum, last=before)
        room = 2 * product_bound(round_, module, round_.dtype)
        room += 8 * EPS[round_.dtype] * norm(before)
        found = update(result.adapter, module)
        assert norm(whole - found) <= norm(whole - top) + room, module
        both = found + update(result.residual, module)
        best = min(norm(whole - kept), norm(whole - top))
        # A rank at the threshold may fall to the other side.
        assert norm(whole - both) <= max(best, 0.01 * norm(whole)) + room, module
        last[module] = update(result.carried, module) if momentum else kept
    return result


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_rounds_equal_the_reference(case: str, dtype: torch.dtype, momentum: float) -> None:
    carried, last = None, dict[str, torch.Tensor]()
    for seed in range(3):
        round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype, seed=seed)
        result = assert_round(round_, last, carried, momentum)
        carried = result.carried
    assert (carried is None) == (momentum == 0)


@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case[1] in DTYPES], ids=case_id)
def test_families(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    round_, last = of_batch(FAMILIES[name].build(dtype)), dict[str, torch.Tensor]()
    carried = assert_round(round_, last, None, 0.9).carried
    assert_round(round_, last, carried, 0.9)


def test_at_the_whole_energy_nothing_is_lost() -> None:
    round_ = draw()
    result = round_.aggregate("fedmomentum", kept_energy=1.0)
    assert result.residual is not None
    for module in round_.modules:
        found = update(result.adapter, module) + update(result.residual, module)
        assert norm(found - round_.ideal(module)) <= product_bound(round_, module, torch.float32)
        assert result.report[module].relative_error <= 1e-6
        factors = result.adapter.factors[module]
        sizes = factors.b.double().norm(dim=0), factors.a.double().norm(dim=1)
        assert torch.allclose(*sizes, rtol=1e-5)


def test_without_momentum_nothing_is_carried() -> None:
    first = draw().aggregate("fedmomentum")
    assert first.carried is None
    with pytest.raises(TypeError, match="has no memory"):
        draw().aggregate("fedmomentum", carried=first.adapter)


@pytest.mark.parametrize("options", [{"kept_energy": 0.0}, {"momentum": 1.0}], ids=str)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        draw().aggregate("fedmomentum", **options)
