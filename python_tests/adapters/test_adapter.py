"""Adapter: state dicts, config, dense updates, and fitting an update into other ranks."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from assertions import EPS, assert_within
from federation import (
    SIZES,
    WORKING_DTYPES,
    Drawn,
    client_config,
    draw,
    federation,
    norm,
    product_bound,
    state,
    update,
    write,
    write_client,
)

import fedlora_kernels as flk
from fedlora_kernels import reference


def one_client(rank: int = 4, alpha: float = 8, seed: int = 0, **options: object) -> flk.Adapter:
    return draw(ranks=(rank,), alphas=(alpha,), weights=(1,), seed=seed, **options).adapters[0]  # type: ignore[arg-type]


def assert_same_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize("dtype", [*WORKING_DTYPES, torch.float16, torch.float64], ids=str)
def test_load_and_save_keep_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    drawn = draw(dtype=dtype, ranks=(3, 4, 5)).drawn[2]
    tensors = {**state(drawn), "base_model.model.score.weight": torch.randn(3, 24)}
    folder = write(tmp_path / "site", tensors, client_config(drawn))
    loaded = flk.Adapter.load(folder)
    assert loaded.name == str(folder)
    loaded.save(tmp_path / "copy")
    again = flk.Adapter.load(tmp_path / "copy")
    assert_same_tensors(loaded.state_dict(), tensors)
    assert_same_tensors(again.state_dict(), tensors)
    assert again.config == json.loads((folder / "adapter_config.json").read_text())


def test_names_are_the_models_own() -> None:
    adapter = one_client()
    assert list(adapter.factors) == sorted(SIZES)
    bare = {key.removeprefix("base_model.model."): x for key, x in adapter.state_dict().items()}
    again = flk.Adapter.from_state_dict(bare, adapter.config)
    assert_same_tensors(again.state_dict(), adapter.state_dict())


@pytest.mark.parametrize("rslora", [False, True])
def test_delta_follows_rank_and_alpha_patterns(rslora: bool) -> None:
    """The first pattern that matches the end of a module's name, as PEFT resolves them."""
    generator = torch.Generator().manual_seed(3)
    ranks = {"h.0.attn.q": 2, "h.1.attn.q": 3, "h.10.attn.q": 5, "h.0.mlp.up": 4}
    alphas = {"h.0.attn.q": 16, "h.1.attn.q": 16, "h.10.attn.q": 7, "h.0.mlp.up": 24}
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 24,
        "use_rslora": rslora,
        "rank_pattern": {"h.0.attn.q": 2, "h\\.1\\..*": 3, "10.attn.q": 5},
        "alpha_pattern": {"h.10.attn.q": 7, "attn.q": 16},
    }
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(
            rank, 6, generator=generator
        )
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(
            9, rank, generator=generator
        )
    adapter = flk.Adapter.from_state_dict(tensors, config)
    for module, rank in ranks.items():
        scaling = alphas[module] / (rank**0.5 if rslora else rank)
        b = tensors[f"base_model.model.{module}.lora_B.weight"].double()
        a = tensors[f"base_model.model.{module}.lora_A.weight"].double()
        torch.testing.assert_close(adapter.delta(module), scaling * (b @ a), rtol=1e-14, atol=0)


def test_delta_of_a_module_that_is_not_there() -> None:
    with pytest.raises(KeyError, match=r"layers\.9"):
        one_client().delta("layers.9.q")


NESTED = {"q": 2, "net.q": 3, "a.net.q": 4, "b.a.net.q": 5, "xnet.q": 3, "q2": 2, "b.q2": 7}


@pytest.mark.parametrize("rslora", [False, True])
def test_module_names_that_are_ends_of_each_other(rslora: bool) -> None:
    """Each module of the result keeps its own rank and alpha through the config alone."""
    drawn = []
    for k in range(2):
        client = {}
        for index, (module, rank) in enumerate(NESTED.items()):
            generator = torch.Generator().manual_seed(10 * k + index)
            b = torch.randn(9, rank, generator=generator)
            a = torch.randn(rank, 14, generator=generator)
            client[module] = Drawn(b, a, (index + 1) / (rank**0.5 if rslora else rank))
        drawn.append(client)
    # The clients' own configs must say it too, so they are built with anchored patterns.
    adapters = [
        flk.Adapter(
            {m: flk.Factors(x.b, x.a, x.scaling) for m, x in client.items()},
            {"peft_type": "LORA", "use_rslora": rslora},
        )
        for client in drawn
    ]
    for rule in ("fedit", "florist", "flora"):
        result = flk.aggregate(adapters, rule=rule).adapter
        again = flk.Adapter.from_state_dict(result.state_dict(), result.config)
        for module in NESTED:
            assert again.factors[module].rank == result.factors[module].rank, module
            expected = update(result, module)
            assert norm(update(again, module) - expected) <= 1e-12 * norm(expected), module


def test_module_names_with_pattern_characters() -> None:
    """A ModuleDict key such as "a+b" is a name, not a regular expression."""
    adapters = [
        flk.Adapter(
            {
                "net.a+b": flk.Factors(torch.randn(6, 2), torch.randn(2, 9), 1.0),
                "net.c": flk.Factors(torch.randn(6, 4), torch.randn(4, 9), 2.0),
                "net.d": flk.Factors(torch.randn(6, 4), torch.randn(4, 9), 2.0),
            },
            {"peft_type": "LORA"},
        )
    ]
    result = flk.aggregate(adapters, rule="fedit").adapter
    again = flk.Adapter.from_state_dict(result.state_dict(), result.config)
    for module in result.factors:
        assert again.factors[module].rank == result.factors[module].rank
        assert again.factors[module].scaling == result.factors[module].scaling


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_fit_into_a_smaller_rank_is_the_best_of_that_rank(rank: int, dtype: torch.dtype) -> None:
    """Not the first columns of the stack, which would keep the first client only."""
    round_ = draw(dtype=dtype)
    whole = round_.aggregate("flora").adapter
    template = one_client(rank, alpha=3 * rank, dtype=dtype, seed=5)
    fitted = whole.fit(template)
    assert fitted.config == template.config
    for module in round_.modules:
        factors, ideal = fitted.factors[module], round_.ideal(module)
        assert (factors.rank, factors.scaling) == (rank, 3.0)
        assert factors.b.dtype == dtype
        floor = float(reference.rules.svd_floor(ideal, rank))
        error = torch.linalg.matrix_norm(update(fitted, module) - ideal)
        assert_within(error, floor + 2 * product_bound(round_, module, dtype), module)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
def test_fit_into_a_larger_rank_keeps_the_update_and_leaves_room_to_learn(
    dtype: torch.dtype,
) -> None:
    small, template = one_client(3, alpha=6, dtype=dtype), one_client(8, 8, dtype=dtype, seed=1)
    fitted = small.fit(template)
    for module in SIZES:
        factors, start = fitted.factors[module], template.factors[module]
        assert (factors.rank, factors.scaling) == (8, 1.0)
        error = norm(update(fitted, module) - update(small, module))
        bound = EPS[dtype] * norm(small.factors[module].b) * norm(small.factors[module].a)
        assert error <= 2 * bound
        assert not factors.b[:, 3:].any()
        assert torch.equal(factors.a[3:], start.a[3:])
        assert factors.a[3:].any(dim=1).all()


def test_fit_into_equal_ranks_and_scalings_is_the_identity() -> None:
    adapter = one_client()
    fitted = adapter.fit(one_client(seed=1))
    assert_same_tensors(fitted.state_dict(), adapter.state_dict())


def test_fit_folds_the_scaling_into_b() -> None:
    adapter, template = one_client(4, alpha=12), one_client(4, alpha=4, seed=1)
    fitted = adapter.fit(template)
    for module in SIZES:
        assert fitted.factors[module].scaling == 1.0
        assert torch.equal(fitted.factors[module].a, adapter.factors[module].a)
        expected = update(adapter, module)
        assert norm(update(fitted, module) - expected) <= EPS[torch.float32] * 50 * norm(expected)


def test_fit_gives_a_missing_module_a_zero_update() -> None:
    whole = draw(ranks=(4,), alphas=(8,), weights=(1,))
    partial = federation([{"layers.0.down": whole.drawn[0]["layers.0.down"]}]).adapters[0]
    template = one_client(seed=1)
    fitted = partial.fit(template)
    assert fitted.factors.keys() == template.factors.keys()
    for module in SIZES:
        if module != "layers.0.down":
            assert not fitted.factors[module].b.any()
            assert torch.equal(fitted.factors[module].a, template.factors[module].a)
    assert norm(update(fitted, "layers.0.down") - update(partial, "layers.0.down")) == 0


def test_fit_does_not_touch_its_arguments() -> None:
    adapter, template = one_client(8), one_client(3, seed=1)
    before = {key: x.clone() for key, x in adapter.state_dict().items()}
    held = {key: x.clone() for key, x in template.state_dict().items()}
    fitted = adapter.fit(template)
    for factors in fitted.factors.values():
        factors.a.zero_()
        factors.b.zero_()
    assert_same_tensors(adapter.state_dict(), before)
    assert_same_tensors(template.state_dict(), held)


@pytest.mark.parametrize("module", SIZES)
@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize(
    ("large", "alpha", "dtype"),
    [
        (1e5, 4, torch.float16),
        (1e3, 1e-2, torch.float16),
        (1e30, 1e-9, torch.float32),
        (1e30, 1e-9, torch.bfloat16),
    ],
    ids=str,
)
def test_fit_refuses_an_update_that_overflows(
    large: float, alpha: float, dtype: torch.dtype, rank: int, module: str
) -> None:
    adapter = one_client(4, alpha=4)
    factors = {
        name: replace(x, b=large * x.b) if name == module else x
        for name, x in adapter.factors.items()
    }
    template = one_client(rank, alpha=alpha * rank / 4, dtype=dtype, seed=1)
    with pytest.raises(
        flk.AdapterError, match=f"^module {module}: the update overflows {dtype} at"
    ):
        flk.Adapter(factors, adapter.config).fit(template)


@pytest.mark.parametrize("beside", ["bias", "magnitude"])
def test_fit_refuses_what_overflows_beside_the_factors(beside: str) -> None:
    adapter, template = (one_client(4, alpha=4, dtype=x) for x in (torch.float32, torch.float16))
    large, small = (
        flk.Adapter(
            {
                name: replace(x, **{beside: torch.full((len(x.b),), value, dtype=x.b.dtype)})
                for name, x in one.factors.items()
            },
            one.config,
        )
        for one, value in ((adapter, 1e6), (template, 1.0))
    )
    with pytest.raises(flk.AdapterError, match=r"^module .*: the update overflows torch.float16"):
        large.fit(small)


def test_fit_refuses_other_modules_and_sizes() -> None:
    adapter = one_client()
    fewer = draw(ranks=(4,), alphas=(8,), weights=(1,), sizes={"layers.0.attn.q": (24, 17)})
    with pytest.raises(flk.AdapterError, match=r"layers.0.down.*no such module"):
        adapter.fit(fewer.adapters[0])
    turned = draw(
        ranks=(4,), alphas=(8,), weights=(1,), sizes={m: (n, m_) for m, (m_, n) in SIZES.items()}
    )
    with pytest.raises(flk.AdapterError, match=r"layers.0.attn.q.*24 x 17.*17 x 24"):
        adapter.fit(turned.adapters[0])


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    """flora from one client, tied factors: safetensors refuses what this library must not."""
    b = torch.randn(6, 3)
    shared = {
        m: flk.Factors(b, torch.randn(3, 4), 1.0) for m in ("encoder.q", "decoder.q", "other.q")
    }
    adapter = flk.Adapter(shared, {"peft_type": "LORA", "r": 3, "lora_alpha": 3})
    adapter.save(tmp_path / "tied")
    again = flk.Adapter.load(tmp_path / "tied")
    assert_same_tensors(again.state_dict(), adapter.state_dict())


def test_extras_are_averaged_by_weight(tmp_path: Path) -> None:
    key = "base_model.model.score.weight"
    plain = draw()
    heads = [torch.randn(3, 24, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    round_ = federation(plain.drawn, plain.weights, extras=[{key: head} for head in heads])
    expected = 0.5 * heads[0].double() + 0.2 * heads[1].double() + 0.3 * heads[2].double()
    for rule in ("fedit", "florist", "flora", "flexlora", "hetlora", "fedex", "flora_na"):
        result = round_.aggregate(rule)
        torch.testing.assert_close(
            result.adapter.extras[key].double(), expected, rtol=1e-6, atol=1e-7
        )
        received = result.client_adapter(1)
        assert torch.equal(received.extras[key], result.adapter.extras[key])
        result.save(tmp_path / rule)
        saved = flk.Adapter.load(tmp_path / rule)
        assert torch.equal(saved.extras[key], result.adapter.extras[key])


def test_loading_needs_no_prefix_and_survives_a_folder_with_more_files(tmp_path: Path) -> None:
    drawn = draw().drawn[0]
    folder = write_client(tmp_path / "site", drawn)
    (folder / "README.md").write_text("a model card")
    (folder / "tokenizer.json").write_text("{}")
    loaded = flk.Adapter.load(folder)
    for module, item in drawn.items():
        assert torch.equal(loaded.factors[module].b, item.b)
