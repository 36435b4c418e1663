"""Bad input: the message names the client and the module, and nothing is written."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Drawn, client_config, draw, state, write, write_client
from refusals import assert_refused, config_of, reconfigure, rewrite, serve, tensors_of

import fedlora_kernels as flk

MODULE = "layers.0.down"
KEY_A = f"base_model.model.{MODULE}.lora_A.weight"
KEY_B = f"base_model.model.{MODULE}.lora_B.weight"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(name: str, sites: list[str]) -> None:
    (Path("site-1") / name).unlink()
    assert_refused(sites, rf"^site-1 has no {name}")


def test_missing_folder_and_file_in_its_place(sites: list[str]) -> None:
    assert_refused([*sites, "site-7"], r"^site-7 is not a folder")
    Path("site-8").write_text("not a folder")
    assert_refused([*sites, "site-8"], r"^site-8 is not a folder")


def test_only_a_pickle_is_there(sites: list[str]) -> None:
    weights = Path("site-1") / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    assert_refused(sites, r"^site-1 .*adapter_model.bin.*safe_serialization")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(share: float, sites: list[str]) -> None:
    weights = Path("site-2") / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(share * len(data))])
    assert_refused(sites, r"^site-2: adapter_model.safetensors cannot be read")


@pytest.mark.parametrize(
    "text",
    ["", "{", "not json", "[1, 2]", "3", "\udcff", '{"r": 1' + "0" * 5000 + "}", "[" * 200_000],
    ids=lambda text: ascii(text[:10]),
)
def test_config_is_no_json_object(text: str, sites: list[str]) -> None:
    (Path("site-1") / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(sites, r"^site-1: adapter_config.json (is not valid JSON|holds no JSON object)")


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "eight"},
        {"r": None},
        {"lora_alpha": "many"},
        {"lora_alpha": None},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": 10**400},
        {"modules_to_save": 5},
        {"modules_to_save": "score"},
        {"modules_to_save": {"score": 1}},
        {"modules_to_save": [["score"]]},
        {"modules_to_save": ["score", 1]},
        {"target_parameters": 5},
        {"target_parameters": math.nan},
        {"target_parameters": True},
        {"target_parameters": "experts"},
        {"target_parameters": {"experts": 1}},
        {"target_parameters": ["experts", 1]},
        {"rank_pattern": [4, 4]},
        {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"down": "x"}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_config_fields_of_the_wrong_kind(changes: dict[str, Any], sites: list[str]) -> None:
    reconfigure("site-1", **changes)
    assert_refused(sites, r"^site-1")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [KEY_A, KEY_B, "base_model.model.score.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_inf_in_files(key: str, bad: float, dtype: torch.dtype, sites: list[str]) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.setdefault("base_model.model.score.weight", torch.zeros(3, 4))
        tensors[key] = tensors[key].to(dtype)
        tensors[key].flatten()[-1] = bad

    rewrite("site-1", spoil)
    where = "score" if "score" in key else MODULE
    assert_refused(sites, rf"^site-1, .*{where}.*1 of \d+ entries are NaN or Inf")


@pytest.mark.parametrize("side", ["b", "a"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rule", ["fedit", "flora", "florist", "flora_na", "fedsa"])
def test_nan_and_inf_in_live_adapters(rule: str, bad: float, side: str) -> None:
    round_ = draw()
    factors = dict(round_.adapters[1].factors)
    item = factors[MODULE]
    b, a = item.b.clone(), item.a.clone()
    (b if side == "b" else a)[0, 0] = bad
    factors[MODULE] = flk.Factors(b, a, item.scaling)
    spoiled = flk.Adapter(factors, round_.adapters[1].config, name="site-1")
    clients = [round_.adapters[0], spoiled, round_.adapters[2]]
    with pytest.raises(flk.AdapterError, match=rf"site-1.*{MODULE}.*{side.upper()} holds NaN"):
        flk.aggregate(clients, rule=rule)


ROWS = 4096
"""A float16 sum of as many numbers of 17 overflows: 65504 is the largest."""


@pytest.mark.parametrize("value", [17.0, 65504.0, -65504.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("beside", ["lora_magnitude_vector", "lora_B.bias", None])
@pytest.mark.parametrize("rule", ["fedit", "florist"])
def test_finite_numbers_with_a_large_sum_are_no_overflow(
    rule: str, beside: str | None, dtype: torch.dtype, value: float
) -> None:
    """Magnitudes and biases of one sign are where a sum in float16 overflows."""
    round_ = draw(sizes={"q": (ROWS, 3)}, alphas=(4, 4, 4), dtype=dtype)
    extra = {} if beside is None else {f"base_model.model.q.{beside}": torch.full((ROWS,), value)}
    adapters = [
        flk.Adapter.from_state_dict(
            {**x.state_dict(), **{key: y.to(dtype) for key, y in extra.items()}},
            {
                **x.config,
                "use_dora": beside == "lora_magnitude_vector",
                "lora_bias": beside == "lora_B.bias",
            },
        )
        for x in round_.adapters
    ]
    item = flk.aggregate(adapters, rule=rule, magnitudes="average").adapter.factors["q"]
    if beside == "lora_magnitude_vector":
        assert torch.equal(item.magnitude, torch.full((ROWS,), value, dtype=dtype))


def one_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY_B] = tensors[KEY_B][:1].clone()


def one_column(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY_A] = tensors[KEY_A][:, :1].clone()


@pytest.mark.parametrize("change", [one_row, one_column])
@pytest.mark.parametrize("rule", ["fedit", "flora", "florist", "hetlora", "fedex"])
def test_a_size_that_would_broadcast(
    rule: str, change: Callable[[dict[str, torch.Tensor]], None], sites: list[str]
) -> None:
    rewrite("site-1", change)
    found = "1 x 40" if change is one_row else "13 x 1"
    words = rf"client 1 \(site-1\), module {MODULE}.*{found}.*13 x 40.*client 0 \(site-0\)"
    assert_refused(sites, words, rule=rule)


@pytest.mark.parametrize("rule", ["fedit", "ffa", "fedsa", "flora_na", "fedex"])
def test_a_rank_one_client_among_rank_eight(rule: str, sites: list[str]) -> None:
    for k, client in enumerate(draw(ranks=(8, 1, 8), common_a=False).drawn):
        write_client(Path(f"site-{k}"), client)
    words = r"client 1 \(site-1\), module layers.0.attn.q.*rank 1.*8.*client 0 \(site-0\).*hetlora"
    assert_refused(sites, words, rule=rule)


@pytest.mark.parametrize(("lost", "kept"), [(KEY_A, "lora_B"), (KEY_B, "lora_A")])
def test_one_factor_without_the_other(lost: str, kept: str, sites: list[str]) -> None:
    tensors = tensors_of("site-1")
    del tensors[lost]
    write(Path("site-1"), tensors, config_of("site-1"))
    assert_refused(sites, rf"^site-1, module {MODULE}: found {kept} without lora_")


def test_factors_that_do_not_fit_each_other(sites: list[str]) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY_A] = tensors[KEY_A][:3].clone()

    rewrite("site-1", cut)
    assert_refused(sites, rf"^site-1, module {MODULE}: found B \[13, 4\] and A \[3, 40\]")


def test_rank_that_contradicts_the_config(sites: list[str]) -> None:
    reconfigure("site-1", r=8)
    assert_refused(sites, r"^site-1, module layers.0.attn.q: factors have rank 4.*8")
    reconfigure("site-1", r=4, rank_pattern={"down": 2})
    assert_refused(sites, rf"^site-1, module {MODULE}: factors have rank 4.*2")


@pytest.mark.parametrize("shape", [(13, 4, 1), (13,), (13, 4, 1, 1)], ids=str)
def test_factors_that_are_no_matrices(shape: tuple[int, ...], sites: list[str]) -> None:
    rewrite("site-1", lambda tensors: tensors.update({KEY_B: torch.ones(shape)}))
    assert_refused(sites, rf"^site-1, module {MODULE}")


def convolved(path: str, kernel: tuple[int, int], groups: int = 1) -> None:
    def convolve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY_A] = torch.ones(4, 3, *kernel)
        tensors[KEY_B] = torch.ones(13, 4 // groups, 1, 1)

    rewrite(path, convolve)


def test_a_convolution_with_groups(sites: list[str]) -> None:
    convolved("site-1", (3, 3), groups=2)
    assert_refused(sites, rf"^site-1, module {MODULE}: .*2 groups.*target_modules")


def test_a_kernel_or_a_kind_that_only_one_client_has(sites: list[str]) -> None:
    convolved("site-1", (1, 3))
    words = rf"client 1 \(site-1\), module {MODULE}: found a convolution with the kernel \[1, 3\]"
    assert_refused(sites, words)
    for path in ("site-0", "site-2"):
        convolved(path, (3, 1))
    assert_refused(sites, rf"{words}, expected .*\[3, 1\] as in client 0")


def test_a_bias_of_another_size(sites: list[str]) -> None:
    rewrite("site-1", lambda t: t.update({KEY_B.replace("weight", "bias"): torch.ones(12)}))
    assert_refused(sites, rf"^site-1, module {MODULE}: lora_B.bias is .*\[12\], expected \[13\]")


EXPERTS = {
    f"base_model.model.mlp.experts{inner}.lora_{side}.weight": torch.ones(*shape)
    for inner, r in (("", 8), (".base_layer", 12))
    for side, shape in (("A", (r, 5)), ("B", (6, r)))
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"mlp.experts.base_layer: found factors of a parameter, expected it in target_para"),
        ({"target_parameters": ["experts.w"]}, "mlp.experts.base_layer: found factors of a param"),
        ({"target_parameters": ["experts.w", "experts.v"], "r": 5}, "mlp.experts: found .* rows"),
        (
            {
                "target_parameters": ["experts.w", "experts.v"],
                "rank_pattern": {"experts.w": 2},
                "alpha_pattern": {"experts.v": 3},
            },
            "mlp.experts: found .* rows of A, which do not tell the ranks",
        ),
    ],
    ids=["not named", "too few", "other rank", "ambiguous"],
)
def test_experts_whose_parameters_are_not_known(
    changes: dict[str, Any], words: str, sites: list[str]
) -> None:
    write(Path("site-1"), dict(EXPERTS), {**config_of("site-1"), **changes})
    assert_refused(sites, rf"^site-1, module {words}")


def test_clients_with_other_experts_or_parameters(sites: list[str]) -> None:
    for path, rank in (("site-0", 2), ("site-1", 4), ("site-2", 4)):
        tensors = {key: x for key, x in EXPERTS.items() if "base_layer" not in key}
        config = {**config_of(path), "target_parameters": ["experts.w"], "r": rank}
        write(Path(path), tensors, config)
    assert_refused(
        sites, r"client 1 \(site-1\), module mlp.experts.0: found expert 0 of 2.* 0 of 4"
    )
    reconfigure("site-2", target_parameters=["experts.v"])
    assert_refused(sites, r"client 2 \(site-2\): target_parameters is \['experts.v'\], expected")


@pytest.mark.parametrize("key", [KEY_A, "base_model.model.score.weight"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8(dtype: torch.dtype, key: str, sites: list[str]) -> None:
    """Storage that nothing can add up."""
    for path in sites:
        rewrite(path, lambda tensors: tensors.update({key: torch.ones(4, 40).to(dtype)}))
    assert_refused(sites, rf"^site-0, tensor {key}: {dtype}, expected bfloat16")


@pytest.mark.parametrize("empty", [KEY_A, KEY_B])
def test_modules_of_size_zero(empty: str, sites: list[str]) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        shape = (4, 0) if empty == KEY_A else (0, 4)
        tensors[empty] = torch.zeros(shape)

    for path in sites:
        rewrite(path, cut)
    assert_refused(sites, rf"^site-0, module {MODULE}: found B .* expected \[m,r\]", rule="florist")


def test_one_factor_under_two_names(sites: list[str]) -> None:
    """With PEFT's prefix and without: one of the two would win silently."""
    rewrite("site-1", lambda t: t.update({KEY_A.removeprefix("base_model.model."): t[KEY_A] + 1}))
    assert_refused(sites, rf"^site-1, module {MODULE}: .*lora_A.weight is there twice")


def test_a_name_that_would_break_the_line(sites: list[str]) -> None:
    rewrite("site-1", lambda t: t.update({"score\n.weight": torch.tensor([math.nan])}))
    assert_refused(
        sites, r"^site-1: the tensor name 'score\\n.weight' holds unprintable characters$"
    )


def test_names_of_a_live_model(sites: list[str]) -> None:
    """model.state_dict() names the adapter in its keys, which PEFT's files do not."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    rewrite("site-1", rename)
    assert_refused(sites, r"^site-1, tensor .*lora_A.default.weight: .*from_model")


def test_integer_factors(sites: list[str]) -> None:
    rewrite("site-1", lambda t: t.update({KEY_B: torch.ones(13, 4, dtype=torch.int8)}))
    assert_refused(sites, rf"^site-1, module {MODULE}.*int8")


def test_no_factors_at_all(sites: list[str]) -> None:
    write(Path("site-1"), {"base_model.model.score.weight": torch.ones(2, 2)}, config_of("site-1"))
    assert_refused(sites, r"^site-1.*no LoRA factors")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_model_name_or_path", "another-base"),
        ("revision", "v2"),
        ("task_type", "SEQ_CLS"),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [7]),
        ("use_qalora", True),
    ],
)
def test_clients_of_different_federations(field: str, value: object, sites: list[str]) -> None:
    for path in sites:
        reconfigure(path, revision="v1")
    reconfigure("site-2", **{field: value})
    assert_refused(sites, rf"client 2 \(site-2\): {field} is .*client 0 \(site-0\)")


def test_different_bases_when_the_first_client_names_none(sites: list[str]) -> None:
    reconfigure("site-0", base_model_name_or_path=None)
    reconfigure("site-2", base_model_name_or_path="another-base")
    assert_refused(sites, r"client 2 \(site-2\): base_model_name_or_path")


def test_the_same_folder_twice(sites: list[str], tmp_path: Path) -> None:
    words = r"client 3 \({}\) is the same folder as client 1"
    assert_refused([*sites, "site-1"], words.format("site-1"))
    assert_refused([*sites, "./site-2/../site-1"], words.format(r"\./site-2/\.\./site-1"))
    absolute = str(tmp_path / "site-1")
    assert_refused([*sites, absolute], words.format(absolute.replace(".", r"\.")))
    os.symlink("site-1", "link")
    assert_refused([*sites, "link"], words.format("link"))


def test_equal_contents_in_different_folders_are_two_clients(sites: list[str]) -> None:
    write(Path("twin"), tensors_of("site-1"), config_of("site-1"))
    serve([*sites, "twin"], "new", rule="flora")
    assert flk.Adapter.load("new").factors[MODULE].rank == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": None}, "peft_type"),
    ],
    ids=str,
)
def test_features_that_no_pair_of_factors_represents(
    changes: dict[str, Any], words: str, sites: list[str]
) -> None:
    reconfigure("site-1", **changes)
    assert_refused(sites, rf"^site-1: .*{words}")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_fine(start: object, sites: list[str]) -> None:
    for path in sites:
        reconfigure(path, init_lora_weights=start)
    serve(sites, "new", rule="florist")
    assert config_of("new")["init_lora_weights"] is True


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"base_model.model.{MODULE}.lora_magnitude_vector", "DoRA"),
    ],
)
def test_tensors_that_no_pair_of_factors_represents(key: str, words: str, sites: list[str]) -> None:
    rewrite("site-1", lambda tensors: tensors.update({key: torch.ones(13)}))
    assert_refused(sites, rf"^site-1.*{MODULE}.*{words}")


def test_ffa_with_different_starts(sites: list[str]) -> None:
    assert_refused(sites, r"client 1 \(site-1\), module .*A differs.*site-0", rule="ffa")


HEAD = "base_model.model.score.weight"


def test_extra_tensors_in_some_clients_only(sites: list[str]) -> None:
    rewrite("site-1", lambda tensors: tensors.update({HEAD: torch.ones(2, 3)}))
    assert_refused(sites, rf"client 1 \(site-1\).*{HEAD}")
    rewrite("site-0", lambda tensors: tensors.update({HEAD: torch.ones(2, 3)}))
    assert_refused(sites, rf"client 2 \(site-2\).*{HEAD}")


def test_extra_tensors_that_would_broadcast(sites: list[str]) -> None:
    for path in sites:
        rows = 1 if path == "site-2" else 3
        rewrite(path, lambda tensors, rows=rows: tensors.update({HEAD: torch.ones(rows, 5)}))
    assert_refused(sites, rf"client 2 \(site-2\).*{HEAD}.*\[1, 5\].*\[3, 5\]")


def test_scaling_zero_is_a_zero_update_and_no_crash() -> None:
    """lora_alpha = 0 switches a client off; nothing divides by it."""
    round_ = draw(alphas=(8, 0, 8))
    for rule in ("flora", "florist", "flexlora", "hetlora", "fedit", "flora_na"):
        result = round_.aggregate(rule)
        for k in range(3):
            received = result.client_adapter(k)
            assert all(x.isfinite().all() for x in received.state_dict().values())


def test_state_dict_without_a_name_is_called_by_its_number() -> None:
    drawn = draw().drawn
    clients = [flk.Adapter.from_state_dict(state(c), client_config(c)) for c in drawn]
    item = drawn[2][MODULE]
    odd = {**drawn[2], MODULE: Drawn(item.b[:5], item.a, item.scaling)}
    clients[2] = flk.Adapter.from_state_dict(state(odd), client_config(odd))
    with pytest.raises(flk.AdapterError, match=rf"^client 2, module {MODULE}"):
        flk.aggregate(clients, rule="fedit")
