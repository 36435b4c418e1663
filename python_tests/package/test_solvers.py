"""`fedlora_kernels.solvers`: what is named is what the code that chooses says."""

import pytest
import torch

import fedlora_kernels as flk
from fedlora_kernels.gram_space.batches import GRAM_BYTES, WIDE_RANK, modules_at_once


def names(answer: flk.Solvers) -> list[str]:
    return [step.solver for step in answer.steps]


@pytest.mark.parametrize("rank", [1, 16, 64, 128, 256, 257, 512, 1024, 4000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_every_answer_holds_up_to_its_limits_and_no_further(rank, dtype):
    answer = flk.solvers(rank, modules=224, dtype=dtype)
    assert answer.backend == flk.backends.handling("cpu").name
    assert answer.steps
    for step in answer.steps:
        first, last = step.ranks
        assert first <= rank
        assert last is None or rank <= last
        assert step.source
        assert str(step).startswith(step.solver)
        for inside in {first, rank, last or 4 * rank}:
            assert step.solver in names(flk.solvers(inside, dtype=dtype))
        for outside in {first - 1, (last or -1) + 1} - {0}:
            assert step.solver not in names(flk.solvers(outside, dtype=dtype))


def test_a_batch_holds_what_the_gram_matrices_may_take():
    assert flk.solvers(128, modules=5000).modules_at_once == GRAM_BYTES // (8 * 128**2)
    assert flk.solvers(128, modules=7).modules_at_once == 7
    assert flk.solvers(600, modules=7, size=(512, 512)).modules_at_once == 1
    assert modules_at_once(WIDE_RANK, (512, 512), torch.device("cpu")) == 1


def test_shape_energy_and_cap_decide():
    (wide,) = flk.solvers(600, size=(512, 800)).steps
    assert wide.ranks == (512, None)
    assert "dense update" in wide.solver
    whole, part = flk.solvers(400, energy=1.0), flk.solvers(400, energy=0.9)
    if flk.backend() == "cpu":
        assert len(whole.steps) == 1
        assert "trace" in part.steps[0].solver
        assert part.steps[0].ranks[0] == 257
        assert part.steps[1:] == whole.steps
        assert names(flk.solvers(400, energy=1.0, max_rank=100)) == names(part)


def test_a_device_without_kernels_is_composed():
    answer = flk.solvers(128, device="meta")
    assert answer.backend == ("composed" if flk.backend() == "cpu" else flk.backend())
    if answer.backend == "composed":
        assert names(answer) == ["torch.linalg.eigh of two R x R matrices"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"stacked_rank": 0}, "at least 1"),
        ({"modules": 0}, "at least 1"),
        ({"size": (0, 3)}, "at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\]"),
        ({"max_rank": 0}, "max_rank must be at least 1"),
        ({"precision": "low"}, "precision must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        flk.solvers(**{"stacked_rank": 8, **arguments})


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(RuntimeError):
        flk.solvers(8, device="nowhere")
    if not torch.cuda.is_available():
        assert flk.solvers(8, device="cuda").backend == flk.backends.handling("cuda").name
