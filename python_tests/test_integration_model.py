"""One encoder in memory: switching, merging and restoring leave no trace in its base weights."""

import pytest
import torch

from integration.model import Model
from integration.settings import SettingsError
from integration.tasks import Example
from integration.tokens import Tokens

EXAMPLES = [
    Example("Return the square root of a number.", 0),
    Example("Send a mail message to the server and wait for the reply.", 1),
    Example("Return the cosine of x.", 0),
]


@pytest.fixture(scope="module")
def model():
    return Model("all-MiniLM-L6-v2", [4, 2], 2.0, ["query", "value"], 20.0)


@pytest.fixture(scope="module")
def tokens(model):
    return Tokens(EXAMPLES, model.tokenizer, 32)


def trained(model, rank, seed):
    """A fresh adapter with a B that is not zero."""
    adapter = model.fresh(rank, seed)
    generator = torch.Generator().manual_seed(seed)
    for factors in adapter.factors.values():
        factors.b.normal_(0, 0.02, generator=generator)
    return adapter


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_lora_sits_on_query_and_value_of_six_layers(model):
    assert len(model.modules) == 12
    assert {name.rsplit(".", 1)[1] for name in model.modules} == {"query", "value"}


def test_merging_and_restoring_leave_the_base_bit_identical(model):
    before = model.base()
    adapter = trained(model, 4, 1)
    model.merge(adapter)
    merged = model.base()
    for name, weight in before.items():
        expected = weight + adapter.delta(name).to(weight.dtype)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)
        assert not torch.equal(merged[name], weight)
    model.restore()
    assert same(model.base(), before)


def test_judging_leaves_the_base_bit_identical_even_after_an_error(model, tokens):
    before = model.base()
    model.make_head(tokens, 2)
    model.judge(tokens, trained(model, 4, 1), trained(model, 2, 2))
    assert same(model.base(), before)
    with pytest.raises(KeyError, match="stop"), model.merged(trained(model, 4, 1)):
        raise KeyError("stop")
    assert same(model.base(), before)


@pytest.mark.parametrize("rank", [4, 2])
def test_a_slot_computes_what_merging_computes(model, tokens, rank):
    """Through PEFT's slot and through the merged base: |difference| of unit vectors < 1e-5."""
    adapter = trained(model, rank, 3)
    batch = tokens.batch([0, 1, 2])
    with torch.inference_mode():
        with model.merged(adapter):
            merged = model.embed(batch)
        with model.merged():
            start = model.embed(batch)
        model.take(adapter)
        switched = model.embed(batch)
    assert (merged - switched).abs().max() < 1e-5
    assert (merged - start).abs().max() > 1e-3


def test_what_a_slot_gives_back_is_a_copy(model):
    adapter = trained(model, 4, 4)
    model.take(adapter)
    given = model.give(4)
    model.take(trained(model, 4, 5))
    for name, factors in adapter.factors.items():
        assert torch.equal(given.factors[name].b, factors.b)
        assert torch.equal(given.factors[name].a, factors.a)
        assert given.factors[name].scaling == 2.0


@pytest.mark.parametrize(("trains", "sides"), [("both", {"A", "B"}), ("b", {"B"})])
def test_only_the_taken_slot_trains(model, trains, sides):
    parameters = model.take(trained(model, 2, 6), trains)
    assert len(parameters) == 12 * len(sides)
    ranks = {min(parameter.shape) for parameter in parameters}
    assert ranks == {2}


def test_starts_of_smaller_rank_are_the_first_rows_of_the_same_a(model):
    large, small = model.fresh(4, 0, 1), model.fresh(2, 0, 1)
    other = model.fresh(4, 0, 2)
    for name in model.modules:
        assert torch.equal(large.factors[name].a[:2], small.factors[name].a)
        assert not torch.equal(large.factors[name].a, other.factors[name].a)
        assert not large.factors[name].b.any()


def test_padding_does_not_change_an_embedding(model, tokens):
    with torch.inference_mode(), model.merged():
        together = model.embed(tokens.batch([0, 1]))
        alone = model.embed(tokens.batch([0]))
    assert (together[0] - alone[0]).abs().max() < 1e-5


def test_an_unknown_model_is_an_error():
    with pytest.raises(SettingsError, match="unknown model 'nothing'"):
        Model("nothing", [4], 2.0, ["query"], 20.0)
