"""Micro-batches: a step in parts is the whole batch's step."""

import pytest
import torch
from miniature import miniature, settings_like

from integration.model.tokens import IGNORED
from integration.model.trainer import LocalTrainer
from integration.rounds.federation import Federation
from integration.settings import SettingsError

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Of sums in another order; relative to the norm."""

CHANGES = {
    "classification": {"max_tokens": 32},
    "language": {
        "task": "arithmetic",
        "config": "llama-tiny",
        "target_modules": ("q_proj", "v_proj"),
        "max_tokens": 64,
        "max_new_tokens": 2,
        "shared_per_class": 0,
        "test_size": 8,
    },
}


@pytest.fixture(scope="module", params=list(CHANGES))
def federation(request):
    return Federation.build(miniature(**CHANGES[request.param]))


def trained(federation, size, batches):
    """Loss, AdamW's moments and the shapes that went through the model, in parts of `size`."""
    settings = settings_like(federation.settings, micro_batch_size=size)
    model, trainer = federation.model, LocalTrainer(federation.model, settings)
    start = model.fresh(8, 0)
    for factors in start.factors.values():  # with B = 0 half of the gradients would be 0
        factors.b.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    frequencies = None
    if federation.task.kind == "classification":
        frequencies = federation.clients[0].log_frequencies(federation.train, model.classes)
    shapes, steps = [], []

    def seen(_, __, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))

    with model.network.register_forward_pre_hook(seen, with_kwargs=True):
        loss, moments = trainer.fit(
            model.take(start),
            federation.train,
            batches,
            rate=1e-12,  # the parameters stay where they are: gradients are what is compared
            seed=0,
            frequencies=frequencies,
            on_step=lambda: steps.append(len(shapes)),
        )
    return loss, moments, shapes, steps


def gradient(moments):
    """AdamW's first moment: 0.1 of the gradient after one step, a mean of them after several.

    The step itself is little but the sign of it, and would not show a wrong scale.
    """
    return torch.cat([moment["exp_avg"].flatten() for moment in moments.values()])


def test_micro_batches_of_uneven_sizes_add_up_to_the_batch(federation):
    """Also where they hold different numbers of counted tokens, which the mean goes over."""
    tokens, batch = federation.train, sorted(range(8), key=federation.train.length)
    whole, moments, shapes, _ = trained(federation, None, [batch])
    parts, in_parts, smaller, _ = trained(federation, 3, [batch])
    lengths = [tokens.length(position) for position in batch]
    assert shapes == [(8, max(lengths))]
    assert smaller == [(3, max(lengths[:3])), (3, max(lengths[3:6])), (2, max(lengths[6:]))]
    if federation.task.kind == "language":
        labels = [tokens.batch(batch[k : k + 3])["labels"] for k in (0, 3, 6)]
        assert len({float((part != IGNORED).sum() / len(part)) for part in labels}) > 1
    assert parts == pytest.approx(whole, rel=ROUNDING)
    expected, found = gradient(moments), gradient(in_parts)
    assert expected.count_nonzero() > 0.99 * expected.numel()
    assert (found - expected).norm() < ROUNDING * expected.norm()


def test_a_short_batch_between_others_is_one_step(federation):
    batches = [list(range(8)), list(range(8, 12)), list(range(12, 20))]
    whole, moments, _, _ = trained(federation, None, batches)
    parts, in_parts, _, steps = trained(federation, 3, batches)
    assert steps == [3, 5, 8]
    assert parts == pytest.approx(whole, rel=ROUNDING)
    assert {float(moment["step"]) for moment in in_parts.values()} == {3.0}
    expected, found = gradient(moments), gradient(in_parts)
    assert (found - expected).norm() < ROUNDING * expected.norm()


def test_micro_batches_as_large_as_the_batch_change_no_bit(federation):
    one = trained(federation, None, [list(range(8))])
    other = trained(federation, 8, [list(range(8))])
    assert one[0] == other[0]
    assert torch.equal(gradient(one[1]), gradient(other[1]))


def test_a_micro_batch_holds_at_least_one_example():
    with pytest.raises(SettingsError, match="micro_batch_size must be at least 1, found 0"):
        miniature(micro_batch_size=0)
