"""One encoder in memory: switching, merging and restoring leave no trace in its base weights."""

import gguf
import pytest
import torch
from miniature import language, miniature

from integration.model import loading
from integration.model.loading import Shipped, shape
from integration.model.model import Model
from integration.model.trainer import LocalTrainer
from integration.rounds.evaluate import evaluate
from integration.settings import SettingsError
from integration.tasks import Example, LoadedTask

EXAMPLES = [
    Example("Return the square root of a number.", 0),
    Example("Send a mail message to the server and wait for the reply.", 1),
    Example("Return the cosine of x.", 0),
]


TASK = LoadedTask("two", ("mathematics", "mail"), tuple(EXAMPLES), tuple(EXAMPLES), tuple(EXAMPLES))


@pytest.fixture(scope="module")
def model():
    return Model(miniature(ranks=(4, 2)), TASK)


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokens(EXAMPLES, 32)


def trained(model, rank, seed):
    """A fresh adapter with a B that is not zero."""
    adapter = model.fresh(rank, seed)
    generator = torch.Generator().manual_seed(seed)
    for factors in adapter.factors.values():
        factors.b.normal_(0, 0.02, generator=generator)
    return adapter


def embedded(model, tokens, positions):
    batch = tokens.batch(positions)
    batch.pop("labels")
    return model.network.embed(**batch)


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
        expected = weight + adapter.delta(name).float()
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)
        assert not torch.equal(merged[name], weight)
    model.restore()
    assert same(model.base(), before)


def test_evaluating_leaves_the_base_bit_identical_even_after_an_error(model, tokens):
    before = model.base()
    model.make_head(tokens)
    scores = [evaluate(model, TASK, tokens)]
    scores += [evaluate(model, TASK, tokens, trained(model, 4, 1), trained(model, 2, 2))]
    assert same(model.base(), before)
    with pytest.raises(KeyError, match="stop"), model.carrying(trained(model, 4, 1)):
        raise KeyError("stop")
    assert same(model.base(), before)
    assert evaluate(model, TASK, tokens) == scores[0] != scores[1]


@pytest.mark.parametrize("rank", [4, 2])
def test_a_slot_a_hook_and_a_merge_compute_the_same(model, tokens, rank):
    """|difference| of unit vectors < 1e-5 between PEFT's slot, the hooks and the merged base."""
    adapter = trained(model, rank, 3)
    with torch.inference_mode():
        with model.carrying(adapter):
            hooked = embedded(model, tokens, [0, 1, 2])
        with model.carrying():
            start = embedded(model, tokens, [0, 1, 2])
        model.take(adapter)
        switched = embedded(model, tokens, [0, 1, 2])
        model.merge(adapter)
        with model.carrying():
            merged = embedded(model, tokens, [0, 1, 2])
    model.restore()
    assert (hooked - switched).abs().max() < 1e-5
    assert (merged - switched).abs().max() < 1e-5
    assert (hooked - start).abs().max() > 1e-3


def test_what_a_slot_gives_back_is_a_copy(model):
    adapter = trained(model, 4, 4)
    model.take(adapter)
    given = model.give(4)
    model.take(trained(model, 4, 5))
    for name, factors in adapter.factors.items():
        assert torch.equal(given.factors[name].b, factors.b)
        assert torch.equal(given.factors[name].a, factors.a)
        assert given.factors[name].scaling == 2.0


@pytest.mark.parametrize(("trains", "sides"), [("both", {"A", "B"}), ("b", {"B"}), ("a", {"A"})])
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
    with torch.inference_mode(), model.carrying():
        together = embedded(model, tokens, [0, 1])
        alone = embedded(model, tokens, [0])
    assert (together[0] - alone[0]).abs().max() < 1e-5


def test_merging_into_bfloat16_sums_up_in_float32():
    """A hundred updates too small for a bfloat16 weight still move it once they are together."""
    model = Model(miniature(dtype="bfloat16"), TASK)
    name = model.modules[0]
    before = model.base()[name]
    adapter = model.fresh(8, 0)
    adapter.factors[name].b.fill_(1e-4)
    step = adapter.delta(name).float()
    for _ in range(100):
        model.merge(adapter)
    expected = (before.float() + 100 * step).to(torch.bfloat16)
    moved = model.base()[name]
    assert moved.dtype == torch.bfloat16
    assert (moved != before).float().mean() > 0.5
    assert (moved.float() - expected.float()).abs().max() <= 2**-8 * expected.float().abs().max()
    model.restore()
    assert torch.equal(model.base()[name], before)


def test_per_module_ranks():
    model = Model(miniature(ranks=(8, 4), rank_pattern={"value": 2}), TASK)
    for rank in (8, 4):
        factors = model.fresh(rank, 0).factors
        assert {name.rsplit(".", 1)[1]: f.rank for name, f in factors.items()} == {
            "query": rank,
            "value": 2,
        }
        assert {f.scaling for f in factors.values()} == {2.0}


def test_rslora_scales_by_the_root_of_the_rank():
    model = Model(miniature(method="rslora", ranks=(16, 16)), TASK)
    assert {f.scaling for f in model.fresh(16, 0).factors.values()} == {2.0 * 16 / 16**0.5}


def test_an_unknown_model_is_an_error():
    with pytest.raises(SettingsError, match="model 'nothing' cannot be loaded"):
        Model(miniature(model="nothing"), TASK)


def test_a_module_that_is_not_there_is_an_error():
    with pytest.raises(SettingsError, match=r"all-MiniLM-L6-v2: .*nowhere"):
        Model(miniature(target_modules=("nowhere",)), TASK)


def test_an_unknown_shape_is_an_error():
    with pytest.raises(SettingsError, match=r"unknown shape 'nothing'; known: .* or a config.json"):
        shape("nothing")


def test_a_model_of_a_package_that_is_not_installed(monkeypatch):
    shipped = Shipped("no_such_package", file="model.gguf", install="make models")
    monkeypatch.setitem(loading.PACKAGES, "shipped", shipped)
    with pytest.raises(SettingsError, match=r"package no-such-package, .* installed: make models"):
        loading.folder("shipped")


def test_a_model_in_a_gguf_file(tmp_path, monkeypatch):
    """Its numbers, its tokenizer and its chat template; it trains like any other."""
    (tmp_path / "shipped_model").mkdir()
    (tmp_path / "shipped_model" / "__init__.py").write_text("raise ImportError('not imported')")
    weights = gguf_llama(tmp_path / "shipped_model" / "model.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    shipped = Shipped("shipped_model", file="model.gguf")
    monkeypatch.setitem(loading.PACKAGES, "shipped", shipped)
    settings = language(model="shipped", config=None, init="pretrained", ranks=(2,))
    example = Example("", 0, completion="ab", turns=(("user", "ba"),))
    task = LoadedTask("t", ("t",), (example,), (), (example,), "language")
    model = Model(settings, task)
    values = model.base()["model.layers.0.self_attn.v_proj"]
    torch.testing.assert_close(values, weights["blk.0.attn_v.weight"], rtol=0, atol=0)
    assert model.tokenizer.eos_token == "<e>"
    tokens = model.tokens([example], 16)
    assert model.tokenizer.decode(tokens.texts[0]) == "[ba]ab<e>"
    trainer = LocalTrainer(model, settings)
    parameters = model.take(model.fresh(2, 0))
    before = [parameter.detach().clone() for parameter in parameters]
    trainer.fit(parameters, tokens, [[0], [0]], rate=0.1, seed=0)
    moved = [not torch.equal(x, y) for x, y in zip(before, parameters, strict=True)]
    assert all(moved)


def gguf_llama(path):
    """Write a Llama of one layer; returns its matrices by their names in the file."""
    width, inner, words = 32, 64, ["<u>", "<s>", "<e>", "a", "b", "ab", "[", "]"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(width // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
        "{% else %}{{ m['content'] }}<e>{% endif %}{% endfor %}"
    )
    shapes = {
        "token_embd.weight": (len(words), width),
        **{f"blk.0.attn_{name}.weight": (width, width) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (inner, width),
        "blk.0.ffn_up.weight": (inner, width),
        "blk.0.ffn_down.weight": (width, inner),
    }
    drawn_from = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=drawn_from) for name, shape in shapes.items()}
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    for name, tensor in [*weights.items(), *((f"{n}.weight", torch.ones(width)) for n in norms)]:
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
