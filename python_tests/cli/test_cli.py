"""The command line: what it writes, what it refuses and how, and what it prints."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import fedlora_kernels as flk
from fedlora_kernels._inspect import inspect
from fedlora_kernels.cli import app, rule_options
from fedlora_kernels.gram_space.batches import ABSENT
from fedlora_kernels.rules import Rule
from fedlora_kernels.rules import option as rule_option

# Functions of the same names hide these modules in their packages.
AGGREGATE = import_module("fedlora_kernels._aggregate")
CLI = {
    name: import_module(f"fedlora_kernels.cli.{name}")
    for name in ("aggregate", "inspect", "doctor")
}

CONFIGS = {
    "a": {"r": 8, "lora_alpha": 16},
    "b": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "c": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "d": {"r": 4, "lora_alpha": 4},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
EPS = torch.finfo(torch.float32).eps


def base_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    """PEFT folders a, b, c, d of one tiny Llama."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("clients")
    for seed, (name, fields) in enumerate(CONFIGS.items()):
        model = get_peft_model(
            base_model(), LoraConfig(**{"target_modules": TARGETS, **fields}, task_type="CAUSAL_LM")
        )
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in model.named_parameters():
            if "lora_" in key:
                tensor.data = 0.1 * torch.randn(tensor.shape, generator=generator)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(name="here")
def _here(made, tmp_path, monkeypatch):
    """An empty working directory with links to the clients, so that messages are short."""
    for name in CONFIGS:
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> SimpleNamespace:
    result = CliRunner().invoke(app, list(arguments), prog_name="fedlora")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def run_process(*arguments: str, code: str = "", **environment: str):
    """`python -m fedlora_kernels`, or the same after some code."""
    start = ["-c", f"{code}\nfrom fedlora_kernels.cli import main\nmain()"]
    return subprocess.run(
        [sys.executable, *(start if code else ["-m", "fedlora_kernels"]), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def refused(result, text: str) -> None:
    """Exit code 2 and one line on stderr."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("fedlora")
    assert text in result.err


def test_a_memory_limit_tells_of_every_group_and_writes_the_same(here):
    assert run("aggregate", "a", "b", "d", "--out", "whole").code == 0
    result = run("aggregate", "a", "b", "d", "--out", "new/part", "--memory-limit", "1kB")
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert lines == [f"{done} of 6 modules" for done in range(1, 7)]
    whole, part = (load_file(f"{name}/adapter_model.safetensors") for name in ("whole", "new/part"))
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert sorted(os.listdir("new")) == ["part"]


@pytest.mark.parametrize("size", ["much", "0", "-1GB", "2TB"])
def test_a_memory_limit_is_a_size(here, size):
    result = run("aggregate", "a", "--out", "o", f"--memory-limit={size}")
    refused(result, f"'{size}' is not a size such as 2GB or 500MB")


# aggregate


def test_the_reloaded_adapter_is_the_truncated_svd_of_the_weighted_sum(here):
    """FLoRIST through PEFT: ranks 8, 4 and 3, rsLoRA in one client, modules absent in one."""
    from peft import PeftModel

    arguments = ["--rule", "florist", "--energy", "0.9", "--weights", "3,1,1", "--out", "g"]
    result = run("aggregate", "a", "b", "c", *arguments)
    assert (result.code, result.err) == (0, "")

    def deltas(folder: str) -> dict[str, torch.Tensor]:
        model = PeftModel.from_pretrained(base_model().double(), folder)
        return {
            name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
            for name, layer in model.named_modules()
            if hasattr(layer, "get_delta_weight")
        }

    shares = dict(zip("abc", (0.6, 0.2, 0.2), strict=True))
    clients = {name: deltas(name) for name in shares}
    reloaded = deltas("g")
    report = json.loads((here / "g" / "report.json").read_text())["modules"]
    assert reloaded.keys() == report.keys() == clients["a"].keys()
    for module, found in reloaded.items():
        ideal = sum(share * clients[name].get(module, 0) for name, share in shares.items())
        u, sigma, vh = torch.linalg.svd(ideal, full_matrices=False)
        captured = sigma.square().cumsum(0) / sigma.square().sum()
        rank = int((captured < 0.9).sum()) + 1
        assert (captured - 0.9).abs().min() > 1e-6  # the energies leave no doubt about the rank
        expected = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        assert report[module]["rank"] == rank
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        error = float((found - ideal).norm() / ideal.norm())
        assert report[module]["relative_error"] == pytest.approx(error, rel=1e-5)


def test_without_weights_clients_count_equally(here):
    assert run("aggregate", "a", "d", "--rule", "flora", "--out", "x").code == 0
    assert run("aggregate", "a", "d", "--rule", "flora", "--weights", "7,7", "--out", "y").code == 0
    one, other = (load_file(here / name / "adapter_model.safetensors") for name in "xy")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_json_is_the_report(here):
    result = run("aggregate", "a", "b", "--rule", "flexlora", "--out", "g/h", "--json")
    assert (result.code, result.err) == (0, "")
    printed = json.loads(result.out)
    clients = [flk.Adapter.load(name) for name in "ab"]
    expected = flk.aggregate(clients, rule="flexlora")
    assert printed["rule"] == "flexlora"
    assert printed["clients"] == ["a", "b"]
    assert printed["modules"] == expected.report.as_dict()
    assert printed["mean"]["rank"] == expected.report.mean_rank
    assert printed["mean"]["relative_error"] == expected.report.relative_error
    assert (printed["bytes_up"], printed["bytes_down"]) == (expected.bytes_up, expected.bytes_down)
    assert printed["out"] == "g/h"
    assert printed["seconds"] > 0
    assert {entry.name for entry in (here / "g" / "h").iterdir()} >= {"clients", "report.json"}


def test_json_stays_standard_where_an_error_is_infinite(here):
    """FedIT on updates that cancel, in factors that do not: an error beside a zero update."""
    b, a = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0, -2.0]])
    factors = {
        "plus": (torch.cat([b, b], 1), torch.cat([a, 0 * a])),
        "minus": (torch.cat([b, -b], 1), torch.cat([0 * a, a])),
    }
    for name, (wide, tall) in factors.items():
        stem = "base_model.model.q_proj.lora_"
        state = {f"{stem}B.weight": wide, f"{stem}A.weight": tall}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        flk.Adapter.from_state_dict(state, config).save(name)
    result = run("aggregate", "plus", "minus", "--rule", "fedit", "--out", "g", "--json")
    assert result.code == 0
    printed = json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert printed["modules"]["q_proj"]["relative_error"] is None
    assert printed["modules"]["q_proj"]["norm"] == 0
    assert "inf" in run("aggregate", "plus", "minus", "--rule", "fedit", "--out", "g").out


def test_the_table_lists_modules_and_sums_up_long_models(here, monkeypatch):
    short = run("aggregate", "a", "b", "--out", "g").out
    assert "model.layers.1.mlp.down_proj" in short
    monkeypatch.setattr(CLI["aggregate"], "_ROWS", 3)
    summed_up = run("aggregate", "a", "b", "--out", "g").out
    assert "model.layers.1.mlp.down_proj" not in summed_up
    rows = {row.split()[0]: row.split()[1:] for row in summed_up.splitlines() if "_proj" in row}
    assert set(rows) == set(TARGETS)
    report = json.loads((here / "g" / "report.json").read_text())["modules"]
    for name, cells in rows.items():
        own = [row for module, row in report.items() if module.endswith(name)]
        errors = [row["relative_error"] for row in own]
        assert cells[0] == str(len(own)) == "2"
        assert float(cells[1]) == sum(row["rank"] for row in own) / 2
        assert cells[2] == str(max(row["rank"] for row in own))
        assert float(cells[5]) == pytest.approx(sum(errors) / 2, abs=1e-4)
        assert float(cells[6]) == pytest.approx(max(errors), abs=1e-4)
    assert (
        "model.layers.1.mlp.down_proj" in run("aggregate", "a", "b", "--out", "g", "--modules").out
    )


def test_the_last_line_says_it_all(here):
    line = run("aggregate", "a", "b", "--rule", "fedex", "--out", "x")
    refused(line, "client 1 (b), module model.layers.0.mlp.down_proj: rank 4, expected 8")
    *_, line, after = run("aggregate", "b", "d", "--rule", "fedex", "--out", "g").out.splitlines()
    assert line.startswith(
        "FedEx-LoRA, 2 clients, 6 modules; mean rank 4, residual of mean rank 8; "
        "adapter and residual together: energy 1.0000, relative error "
    )
    merged = "merge g/residual into the base model, then start the clients from g"
    assert after == f"next round: {merged}"
    printed = json.loads(run("aggregate", "b", "d", "--rule", "fedex", "--out", "g", "--json").out)
    assert printed["next_round"] == merged
    mean = printed["mean"]
    assert (mean["rank"], mean["adapter_rank"], mean["residual_rank"]) == (12, 4, 8)
    up = sum(flk.Adapter.load(name).bytes for name in "bd") / 2
    assert f"per client {up / 1000:.3g} kB up" in line
    assert line.endswith("written to g")
    assert (here / "g" / "residual" / "adapter_config.json").is_file()


AFTER = {
    "florist": "written to g",
    "flora": "next round: merge g into the base model, then start the clients from new adapters "
    "(B = 0)",
    "flexlora": "next round: start the clients from g/clients/N (client N, from 0)",
}


@pytest.mark.parametrize("rule", AFTER)
def test_the_next_rounds_start_is_told(here, rule):
    result = run("aggregate", "b", "--rule", rule, "--out", "g")
    assert result.out.splitlines()[-1].endswith(AFTER[rule])
    assert " 1 client, 6 modules; " in result.out


@pytest.mark.parametrize("rule", flk.rules.names())
def test_a_rule_with_memory_is_told_to_have_lost_it(here, rule):
    """Which rules remember is what their results carry."""
    result = run("aggregate", "b", "--rule", rule, "--out", "g")
    carried = flk.aggregate([flk.Adapter.load("b")], rule=rule).carried
    told = "memory: " in result.out and "a first round. In Python, give aggregate(" in result.out
    assert (result.code, told) == (0, carried is not None)


def test_an_option_may_give_a_rule_its_memory(here):
    arguments = ["aggregate", "b", "--rule", "fedmomentum", "--out", "g"]
    assert "memory: " not in run(*arguments).out
    result = json.loads(run(*arguments, "--momentum", "0.5", "--json").out)
    assert result["memory"].startswith("FedMomentum remembers earlier rounds")


def test_energies_print_the_curve(here):
    result = run("aggregate", "a", "b", "--energies", "0.5,0.8,0.99", "--out", "g")
    lines = result.out.splitlines()
    start = lines.index("Rank against error")
    rows = [line.split() for line in lines[start + 1 :] if line.strip().startswith("0.")]
    assert [row[0] for row in rows] == ["0.5", "0.8", "0.99"]
    clients = [flk.Adapter.load(name) for name in "ab"]
    curve = flk.aggregate(clients, rule="florist", energies=[0.5, 0.8, 0.99]).curve
    assert [row[3] for row in rows] == [f"{point.parameters:,}" for point in curve]


def test_general_options_reach_the_result(here):
    arguments = ["--uniform-rank", "--dtype", "float64", "--absent", "renormalize"]
    assert run("aggregate", "a", "c", *arguments, "--weights", "1,3", "--out", "g").code == 0
    found = flk.Adapter.load("g")
    expected = flk.aggregate(
        [flk.Adapter.load(name) for name in "ac"],
        rule="florist",
        weights=[1, 3],
        uniform_rank=True,
        absent="renormalize",
        dtype=torch.float64,
    ).adapter
    assert len({factors.rank for factors in found.factors.values()}) == 1
    for module, factors in found.factors.items():
        assert factors.b.dtype == torch.float64
        assert torch.equal(found.delta(module), expected.delta(module))


def test_an_adapter_already_there_is_replaced_and_a_linked_folder_stays_linked(here):
    (here / "real").mkdir()
    (here / "link").symlink_to(here / "real")
    for rule in ("flora", "florist"):
        assert run("aggregate", "a", "b", "--rule", rule, "--out", "link").code == 0
    assert (here / "link").is_symlink()
    assert json.loads((here / "real" / "report.json").read_text())["rule"] == "florist"
    assert not [entry for entry in here.iterdir() if entry.name.startswith(".")]


# the rules' options


class CallError(Exception):
    """Carries the arguments that a command hands to the library."""

    def __init__(self, options: dict[str, object]) -> None:
        super().__init__()
        self.options = options


def handed_over(monkeypatch, *arguments: str) -> dict[str, object]:
    def record(adapters, **options):
        raise CallError(options)

    monkeypatch.setattr(AGGREGATE, "aggregate", record)
    with pytest.raises(CallError) as caught:
        run("aggregate", "a", "b", "--out", "g", *arguments)
    return caught.value.options


SAMPLES = {
    "budget": ("2", 2),
    "rank": ("5", 5),
    "energy": ("0.75", 0.75),
    "max_rank": ("6", 6),
    "rank_budget": ("40", 40),
    "energies": ("0.8, 0.9,0.95", (0.8, 0.9, 0.95)),
    "split": ("balanced", "balanced"),
    "max_sweeps": ("7", 7),
    "tol": ("1e-9", 1e-9),
    "residual_rank": ("2", 2),
    "norm_weighted": (None, False),
    "per_module": ("", True),
    "example_weighted": ("", True),
    "shared": ("", True),
    "around": ("global", "global"),
    "form": ("ridge", "ridge"),
    "penalty": ("0.1", 0.1),
    "error_rank": ("3", 3),
    "kept_energy": ("0.75", 0.75),
    "momentum": ("0.5", 0.5),
    "softness": ("0.75", 0.75),
}


@pytest.mark.parametrize(
    ("rule", "option"),
    [
        (rule.name, option)
        for rule in map(flk.rules.find, flk.rules.names())
        for option in rule.options()
    ],
)
def test_every_option_of_every_rule_is_a_flag(here, monkeypatch, rule, option):
    text, value = SAMPLES[option]
    flag = "--" + option.replace("_", "-")
    given = [flag, *filter(None, [text])] if text is not None else ["--no-" + flag[2:]]
    options = handed_over(monkeypatch, "--rule", rule, *given)
    assert options[option] == value
    assert type(options[option]) is type(value)


def test_options_that_were_not_given_keep_the_rules_own_defaults(here, monkeypatch):
    options = handed_over(monkeypatch, "--rule", "florist", "--energy", "0.8")
    own = flk.rules.find("florist").options().keys()
    assert own & options.keys() == {"energy"}
    assert handed_over(monkeypatch, "--rule", "hetlora", "--norm-weighted")["norm_weighted"] is True


def test_the_help_names_each_options_rules_and_default():
    text = " ".join(run("aggregate", "--help").out.split())
    assert "--rank INTEGER flexlora: rank of the global adapter" in text
    assert "florist: a fixed rank in the place of energy, at most min(R, m, n)" in text
    assert "hetlora: take the norm of each module by itself" in text
    assert "[default: --no-per-module]" in text
    assert "in (0, 1] [default: 0.9]" in text
    assert "--norm-weighted / --no-norm-weighted hetlora:" in text
    assert "--energies NUMBER,NUMBER,..." in text
    for option in SAMPLES:
        assert "--" + option.replace("_", "-") in text
    for python in ("None", "True", "False"):  # which cannot be typed
        assert python not in text


def test_no_rules_option_hides_one_of_the_commands_own():
    command = app.commands["aggregate"]
    names = [parameter.name for parameter in command.get_params(click.Context(command))]
    assert len(set(names)) == len(names)


def test_a_new_rules_options_appear_by_themselves(here, monkeypatch):
    @dataclass(frozen=True)
    class New(Rule):
        name, title, paper, exact = "new", "New", "0000.00000", "no"
        warm_up: bool = rule_option(False, "start slowly, and go on")
        ranks: "list[int] | None" = rule_option(None, "one per layer")
        mode: str = rule_option("x", "how")

        def solve(self, grams):
            raise ValueError(f"got {self.warm_up} {self.ranks} {self.mode}")

    monkeypatch.setitem(flk.rules.registry.kinds, "new", New)
    read_anew()
    try:
        text = " ".join(run("aggregate", "--help").out.split())
        assert "--warm-up / --no-warm-up new: start slowly, and go on" in text
        arguments = ["--rule", "new", "--warm-up", "--ranks", "1,2", "--mode", "y", "--out", "g"]
        refused(run("aggregate", "a", "b", *arguments), "got True (1, 2) y")
        refused(
            run("aggregate", "a", "b", *arguments[:4], "1,2.5", "--out", "g"), "is not an integer"
        )
        assert "--warm-up --ranks --mode" in run("rules").out
    finally:
        read_anew()


def read_anew():
    """Forget the flags of the rules that there were."""
    for name in ("owners", "options"):
        vars(rule_options.RULES).pop(name, None)


def test_robust_rules_and_their_options(here):
    arguments = ["a", "b", "c", "--rule", "florist", "--energy", "1", "--out", "g", "--json"]
    result = run("aggregate", *arguments, "--robust", "trimmed", "--robust-attackers", "1")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)["robust"]
    clients = [flk.Adapter.load(name) for name in "abc"]
    robust = flk.robust.Trimmed(attackers=1)
    expected = flk.aggregate(clients, rule="florist", energy=1.0, robust=robust)
    assert [client["name"] for client in found["clients"]] == ["a", "b", "c"]
    assert [client["weight"] for client in found["clients"]] == expected.weighing.weights
    assert found["options"] == {"attackers": 1, "by": "neighbors"}
    assert json.loads((here / "g" / "report.json").read_text())["robust"] == found
    shown = run("aggregate", *arguments[:-1], "--robust", "clip", "--robust-norm", "1e-3").out
    assert "Clients as norm clipping weighs them" in shown
    text = " ".join(run("aggregate", "--help").out.split())
    for name in flk.robust.names():
        assert name in text
        for option in flk.robust.find(name).options():
            assert "--robust-" + option.replace("_", "-") in text


def test_the_choices_are_the_librarys():
    for value in ABSENT:
        assert value in run("aggregate", "--help").out
    text = run("aggregate", "--help").out
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        assert dtype in text
        assert isinstance(getattr(torch, dtype), torch.dtype)


# what is refused

BAD = {
    "no-clients": (["--out", "g"], "Missing argument 'CLIENT...'"),
    "no-out": (["a", "b"], "Missing option '--out'"),
    "unknown-rule": (["a", "b", "--out", "g", "--rule", "fedavg"], "unknown rule 'fedavg'"),
    "unknown-option": (["a", "b", "--out", "g", "--speed", "9"], "No such option"),
    "another-rules-option": (
        ["a", "b", "--out", "g", "--rule", "flora", "--energy", "0.9"],
        "rule 'flora' has no option --energy (it belongs to florist); its options: none",
    ),
    "unknown-robust-rule": (
        ["a", "b", "--out", "g", "--robust", "mean"],
        "unknown robust rule 'mean'; expected one of",
    ),
    "another-robust-rules-option": (
        ["a", "b", "--out", "g", "--robust", "krum", "--robust-norm", "1"],
        "robust rule 'krum' has no option --robust-norm (it belongs to clip); its options: "
        "--robust-attackers",
    ),
    "robust-option-alone": (
        ["a", "b", "--out", "g", "--robust-norm", "1"],
        "--robust-norm needs --robust NAME",
    ),
    "robust-too-few": (
        ["a", "b", "--out", "g", "--robust", "krum"],
        "2 clients of positive weight: krum with attackers=0 needs at least",
    ),
    "robust-does-not-reach": (
        ["a", "b", "--out", "g", "--rule", "fedsa", "--robust", "clip"],
        "robust rule 'clip' scales B, and rule 'fedsa' aggregates A alone",
    ),
    "energy-out-of-range": (["a", "b", "--out", "g", "--energy", "1.5"], "energy must lie in"),
    "energy-nan": (["a", "b", "--out", "g", "--energy", "nan"], "energy must lie in"),
    "energy-no-number": (["a", "b", "--out", "g", "--energy", "much"], "'--energy'"),
    "energies-no-number": (["a", "b", "--out", "g", "--energies", "0.8,x"], "'x' in '0.8,x'"),
    "rank-zero": (["a", "b", "--out", "g", "--rank", "0"], "rank must be at least 1"),
    "rank-fraction": (["a", "b", "--out", "g", "--rank", "1.5"], "'1.5' is not a valid integer"),
    "two-ranks": (["a", "b", "--out", "g", "--rank", "1", "--rank-budget", "9"], "both be given"),
    "budget-too-small": (["a", "b", "--out", "g", "--rank-budget", "2"], "rank_budget 2 is less"),
    "split": (["a", "b", "--out", "g", "--split", "c"], "'c' is not one of 'b', 'balanced', 'a'"),
    "weights-count": (["a", "b", "--out", "g", "--weights", "1"], "1 weights for 2 clients"),
    "weights-negative": (["a", "b", "--out", "g", "--weights", "-1,2"], "client 0 (a): weight"),
    "weights-zero": (["a", "b", "--out", "g", "--weights", "0,0"], "all weights are zero"),
    "weights-nan": (["a", "b", "--out", "g", "--weights", "nan,1"], "client 0 (a): weight nan"),
    "weights-text": (
        ["a", "b", "--out", "g", "--weights", "1;2"],
        "'1;2' in '1;2' is not a number",
    ),
    "dtype": (["a", "b", "--out", "g", "--dtype", "int8"], "'int8' is not one of"),
    "absent": (["a", "b", "--out", "g", "--absent", "skip"], "'skip' is not one of"),
    "precision": (["a", "b", "--out", "g", "--precision", "half"], "'half' is not one of"),
    "device-unknown": (["a", "b", "--out", "g", "--device", "gpu"], "--device gpu cannot be used"),
    "device-missing": (["a", "--out", "g", "--device", "cuda:99"], "--device cuda:99 cannot be"),
    "device-meta": (["a", "b", "--out", "g", "--device", "meta"], "--device meta cannot be used"),
    "missing-folder": (["a", "./nowhere", "--out", "g"], "./nowhere is not a folder"),
    "no-adapter": (["a", "full", "--out", "g"], "full has no adapter_config.json"),
    "broken-json": (["a", "broken/json", "--out", "g"], "broken/json: adapter_config.json is not"),
    "broken-weights": (["broken/weights", "--out", "g"], "broken/weights: adapter_model.safet"),
    "nan-factors": (["a", "broken/nan", "--out", "g"], "broken/nan, module model.layers.0"),
    "dora": (["broken/dora", "--out", "g"], "broken/dora: use_dora is set"),
    "too-large-to-square": (
        ["broken/huge", "--out", "g", "--rule", "fedit"],
        "client 0 (broken/huge), module model.layers.0.mlp.down_proj: B holds NaN, Inf or number",
    ),
    "one-client-twice": (["a", "a", "--out", "g"], "client 1 (a) is the same folder as client 0"),
    "ranks-differ": (["a", "b", "--out", "g", "--rule", "fedit"], "client 1 (b), module model.lay"),
    "a-differs": (["b", "d", "--out", "g", "--rule", "ffa"], "client 1 (d), module model.layers"),
    "out-is-a-client": (["a", "b", "--out", "./a/"], "--out ./a/ is the client folder a"),
    "out-in-a-client": (["a", "b", "--out", "b/g"], "--out b/g is inside the client folder b"),
    "out-around-clients": (
        ["in/a", "b", "--out", "in"],
        "--out in contains the client folder in/a",
    ),
    "out-is-here": (["../a", "../b", "--out", "."], "--out . is the working directory"),
    "out-not-empty": (["a", "b", "--out", "full"], "full is not empty and holds no adapter_conf"),
    "out-is-a-file": (["a", "b", "--out", "file"], "file is a file, expected a folder"),
    "out-below-a-file": (["a", "b", "--out", "file/g"], "file/g cannot be written"),
}


def listing(folder) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.fixture(name="crowded")
def _crowded(here, made):
    """The working directory with things in the way and broken clients."""
    (here / "file").write_text("text")
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("text")
    (here / "in" / "a").mkdir(parents=True)
    (here / "empty").mkdir()
    config = json.loads((made / "d" / "adapter_config.json").read_text())
    state = load_file(made / "d" / "adapter_model.safetensors")
    poisoned = {
        key: tensor.index_fill(0, torch.tensor([1]), torch.nan) for key, tensor in state.items()
    }
    huge = {key: tensor.double() * 1e200 for key, tensor in state.items()}
    broken = {
        "huge": (json.dumps(config), huge),
        "json": ("{", state),
        "weights": (json.dumps(config), None),
        "nan": (json.dumps(config), poisoned),
        "dora": (json.dumps({**config, "use_dora": True}), state),
    }
    for name, (text, tensors) in broken.items():
        folder = here / "broken" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(text)
        if tensors is None:
            (folder / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
        else:
            save_file(tensors, folder / "adapter_model.safetensors")
    return here


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(crowded, monkeypatch, name):
    arguments, text = BAD[name]
    if name == "out-is-here":
        monkeypatch.chdir(crowded / "empty")
    before = listing(crowded)
    refused(run("aggregate", *arguments), text)
    assert listing(crowded) == before


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("out-")])
def test_a_bad_output_folder_is_refused_before_any_work(crowded, monkeypatch, name):
    def load(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(flk.Adapter, "load", load)
    arguments, text = BAD[name]
    if name == "out-is-here":
        monkeypatch.chdir(crowded / "empty")
    refused(run("aggregate", *arguments), text)


def test_out_may_not_hold_the_working_directory(here, monkeypatch):
    assert run("aggregate", "a", "b", "--out", "g").code == 0
    (here / "g" / "deeper").mkdir()
    monkeypatch.chdir(here / "g" / "deeper")
    refused(run("aggregate", "../../a", "--out", ".."), "--out .. contains the working directory")


def test_out_is_compared_with_where_links_lead(here):
    (here / "other").symlink_to(here / "a")
    refused(run("aggregate", "a", "b", "--out", "other"), "--out other is the client folder a")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("lost")])
def test_a_failure_to_write_leaves_no_folder(here, monkeypatch, error):
    def write(self, made):
        (made / "half").write_text("half")
        raise error

    monkeypatch.setattr(flk.Adapter, "write", write)
    before = listing(here)
    if isinstance(error, OSError):
        refused(run("aggregate", "a", "b", "--out", "g"), "No space left on device")
    else:  # no fault of the input's
        with pytest.raises(KeyError):
            run("aggregate", "a", "b", "--out", "g")
    assert listing(here) == before


def test_the_unexpected_keeps_its_traceback(here, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(AGGREGATE, "aggregate", fail)
    result = CliRunner().invoke(app, ["aggregate", "a", "b", "--out", "g"])
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)
    assert not (here / "g").exists()


def test_an_interrupt_leaves_nothing(here, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(AGGREGATE, "aggregate", interrupted)
    result = run("aggregate", "a", "b", "--out", "g")
    assert result.code == 130
    assert not (here / "g").exists()


# inspect


def test_inspect_prints_adapters_spectra_and_similarities(here):
    result = run("inspect", "a", "b", "c")
    assert (result.code, result.err) == (0, "")
    found = inspect([flk.Adapter.load(name) for name in "abc"])
    rows = [line.split() for line in result.out.splitlines()]
    assert ["1", "b", "rsLoRA", "6", "4", "4", "float32"] in [row[:7] for row in rows]
    for projection in found.projections:
        (row,) = [row for row in rows if row and row[0] == projection.name]
        assert row[1] == "2"
        assert row[5] == f"{projection.norm:.4g}"
    (row,) = [row for row in rows if row[:2] == ["1", "b"] and len(row) == 5]
    assert row[2:] == [f"{value:.3f}" for value in found.similarity[1]]
    (row,) = [row for row in rows if row[:2] == ["1", "b"] and row[-1] in ("yes", "no")]
    standing = found.outliers[1]
    assert row[2:] == [
        f"{standing.norm:.4g}",
        f"{standing.cosine:.3f}",
        f"{standing.distance:.4g}",
        "yes" if standing.flagged else "no",
    ]
    assert "Note: client 2 (c): 2 modules are absent: model.layers.0.mlp.down_proj" in result.out
    listed = run("inspect", "a", "--modules", "--energy", "0.5").out
    assert "model.layers.1.self_attn.v_proj" in listed
    assert "0.95" not in listed


def test_inspect_json_is_the_inspection(here):
    result = run("inspect", "a", "b", "--json", "--weights", "3,1", "--energy", "0.5,0.75")
    assert (result.code, result.err) == (0, "")
    printed = json.loads(result.out)
    expected = inspect(
        [flk.Adapter.load(name) for name in "ab"], weights=[3, 1], energies=[0.5, 0.75]
    )
    assert printed["similarity"] == [list(row) for row in expected.similarity]
    assert [client["weight"] for client in printed["clients"]] == [0.75, 0.25]
    assert printed["outliers"] == [vars(standing) for standing in expected.outliers]
    for module, spectrum in expected.modules.items():
        row = printed["modules"][module]
        assert row["sigma"] == list(spectrum.sigma)
        assert row["numerical_rank"] == 12
        assert row["ranks"] == {f"{energy:g}": rank for energy, rank in spectrum.ranks.items()}


def test_inspect_sums_up_the_similarities_of_many_clients(here, monkeypatch):
    monkeypatch.setattr(CLI["inspect"], "_MATRIX", 2)
    lines = run("inspect", "a", "b", "d").out.splitlines()
    similarity = inspect([flk.Adapter.load(name) for name in "abd"]).similarity
    (row,) = [line.split() for line in lines if line.split()[:2] == ["0", "a"]][1:2]
    others = {index: similarity[0][index] for index in (1, 2)}
    least, most = min(others, key=others.get), max(others, key=others.get)
    assert row[2:] == [
        f"{sum(others.values()) / 2:.3f}",
        f"{others[least]:.3f}",
        str(least),
        f"{others[most]:.3f}",
        str(most),
    ]


def test_inspect_draws_a_png(here):
    result = run("inspect", "a", "b", "c", "--plot", "spectra.png")
    assert result.code == 0
    assert "Figure written to spectra.png" in result.out
    data = (here / "spectra.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") > 2000  # pixels across
    assert json.loads(run("inspect", "a", "--plot", "spectra.png", "--json").out)["similarity"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "Missing argument 'DIR...'"),
        (["nowhere"], "nowhere is not a folder"),
        (["a", "--plot", "file/x.png"], "file/x.png cannot be written"),
        (["a", "--plot", "full"], "full is a folder"),
        (["a", "--plot", "/proc/x.png"], "/proc/x.png"),
        (["a", "--plot", "x.doc"], "x.doc: figures cannot be written as 'doc'"),
        (["a", "--plot", "x"], "x: figures cannot be written"),
        (["a", "--energy", "0"], "energy must lie in"),
        (["a", "--energy", "0.5,,1"], "'' in '0.5,,1' is not a number"),
        (["a", "b", "--weights", "1"], "1 weights for 2 clients"),
    ],
)
def test_inspect_refuses_in_one_line(crowded, arguments, text):
    before = listing(crowded)
    refused(run("inspect", *arguments), text)
    assert listing(crowded) == before


def test_plot_without_matplotlib_says_what_to_install(here, monkeypatch):
    monkeypatch.delitem(sys.modules, "fedlora_kernels.plot", raising=False)
    monkeypatch.delattr(flk, "plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    refused(run("inspect", "a", "--plot", "x.png"), "pip install fedlora_kernels[plot]")


# rules, doctor and the program


def test_rules_lists_every_rule():
    result = run("rules")
    assert (result.code, result.err) == (0, "")
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    for rule in map(flk.rules.find, flk.rules.names()):
        for cell in (rule.title, rule.paper, rule.travels, rule.exact, rule.after):
            assert cell in rows[rule.name]
        assert ("any" if rule.heterogeneous else "equal") in rows[rule.name]
        for option in rule.options():
            assert "--" + option.replace("_", "-") in rows[rule.name]


def test_doctor_reports_versions_backends_and_a_self_check():
    result = run("doctor")
    assert (result.code, result.err) == (0, "")
    for text in ("Python", torch.__version__, "CUDA device", "triton", "peft", "numpy", "threads"):
        assert text in result.out
    for backend in flk.backends.ordered():
        assert backend.name in result.out
        assert backend.reason in result.out
    (active,) = [line for line in result.out.splitlines() if " active " in line]
    assert active.split()[0] == flk.backend()
    assert "Self-check on cpu: ok, relative error" in result.out
    for rank in (64, 1024):
        for step in flk.solvers(rank, modules=224).steps:
            assert step.solver in result.out


def test_doctor_as_json():
    result = run("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["facts"]["torch"].startswith(torch.__version__)
    answer = report["solvers"]["cpu"]["512"]
    assert answer["backend"] == flk.backends.handling("cpu").name
    assert [step["solver"] for step in answer["steps"]] == [
        step.solver for step in flk.solvers(512, modules=224).steps
    ]
    assert list(report["backends"]) == [backend.name for backend in flk.backends.ordered()]
    assert report["backends"][flk.backend()]["usable"] == "active"
    assert report["refusal"] is None
    assert report["self_check"]["cpu"].startswith("ok, relative error")


def test_doctor_names_the_solver_of_any_problem():
    problem = ("--rank", "300", "--modules", "9", "--size", "256", "320", "--dtype", "float64")
    report = json.loads(run("doctor", "--json", *problem, "--energy", "0.5").out)
    asked = flk.solvers(300, modules=9, size=(256, 320), dtype="float64", energy=0.5)
    (found,) = report["solvers"]["cpu"].values()
    assert found["modules_at_once"] == asked.modules_at_once
    assert [step["solver"] for step in found["steps"]] == [step.solver for step in asked.steps]
    refused(run("doctor", "--dtype", "int8"), "'int8' is not one of")


@pytest.mark.parametrize("what", ["wrong", "raises"])
def test_doctor_fails_when_the_numbers_are_wrong(monkeypatch, what):
    def check(device):
        if what == "raises":
            raise RuntimeError("no kernel image")
        return 0.5

    monkeypatch.setattr(CLI["doctor"], "_self_check", check)
    result = run("doctor")
    assert result.code == 1
    assert "Self-check on cpu: FAILED" in result.out
    assert ("RuntimeError: no kernel image" if what == "raises" else "5.0e-01") in result.out


def test_version_and_help():
    assert run("--version").out == f"fedlora {flk.__version__}\n"
    assert run().out == run("--help").out
    for command in ("aggregate", "inspect", "rules", "doctor"):
        assert command in run("--help").out
    refused(run("train"), "No such command 'train'")


def test_the_process_aggregates_and_refuses(here):
    """Whole processes: nothing else on stderr, ASCII terminals and odd names included."""
    (here / "client é").symlink_to(here / "b")
    done = run_process("aggregate", "a", "client é", "--out", "g", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("written to g")
    shown = run_process("inspect", "a", "client é", PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "client \\xe9" in shown.stdout
    assert (here / "g" / "adapter_model.safetensors").is_file()
    failed = run_process("aggregate", "a", "nowhere", "--out", "h")
    assert (failed.returncode, failed.stdout) == (2, "")
    expected = "fedlora aggregate: nowhere is not a folder; expected a PEFT adapter folder\n"
    assert failed.stderr == expected
    assert not (here / "h").exists()


NO_TORCH = "import sys; sys.modules['torch'] = None"


def test_without_torch_the_doctor_works_and_the_others_say_what_is_missing(here):
    doctor = run_process("doctor", code=NO_TORCH, FEDLORA_BACKEND="none-such")
    assert (doctor.returncode, doctor.stderr) == (0, "")
    assert "pip install torch" in doctor.stdout
    assert "FEDLORA_BACKEND=none-such cannot serve" in doctor.stdout
    failed = run_process("aggregate", "a", "--out", "g", "--energy", "0.9", code=NO_TORCH)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    assert "needs torch, which is not installed" in failed.stderr
    for arguments in (["rules"], ["aggregate", "--help"]):
        assert run_process(*arguments, code=NO_TORCH).returncode == 0


def test_the_commands_modules_import_no_torch():
    """Whatever a command needs, it imports when it runs."""
    code = f"{NO_TORCH}\nimport fedlora_kernels.cli\nassert 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_bench_without_a_checkout_says_so_in_one_line(tmp_path, monkeypatch) -> None:
    """As a wheel in site-packages: benchmarks/ is not part of the package."""
    import fedlora_kernels

    installed = tmp_path / "site-packages" / "fedlora_kernels" / "__init__.py"
    monkeypatch.setattr(fedlora_kernels, "__file__", str(installed))
    done = run("bench")
    assert (done.code, done.out) == (2, "")
    assert done.err.strip().count("\n") == 0
    assert "needs a source checkout" in done.err


def test_bench_runs_the_short_suite_of_the_checkout(monkeypatch) -> None:
    from benchmarks import run as program

    asked: list[list[str]] = []
    monkeypatch.setattr(program, "main", lambda arguments: asked.append(arguments) or 1)
    assert run("bench", "--threads", "2", "--out", "results").code == 1
    assert run("bench", "--long", "--device", "cuda").code == 1
    assert asked == [
        ["--suite", "short", "--device", "cpu", "--threads", "2", "--results", "results"],
        ["--suite", "long", "--device", "cuda"],
    ]
