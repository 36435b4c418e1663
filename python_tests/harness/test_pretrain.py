"""Pretraining from scratch: what it leaves is a transformers folder, decided by its seed alone."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration.__main__ import main
from integration.model.loading import SHAPES, shape
from integration.model.pretrain import HELD_OUT, Pretraining, _texts, pretrain, recipe
from integration.rounds.federation import Federation
from integration.settings import SettingsError, from_preset
from integration.tasks import TASKS
from integration.tasks.arithmetic import problems, sums
from integration.tasks.task import hashed

PARAMETERS = {
    "llama-2-7b": 6738.4,
    "llama-3-8b": 8030.3,
    "llama-3.2-1b": 1235.8,
    "llama-30m": 29.9,
    "llama-7b": 6738.4,
    "llama-tiny": 3.0,
    "mistral-7b-v0.3": 7248.0,
    "roberta-large": 355.4,
    "smollm2-135m": 134.5,
    "tinyllama-1.1b": 1100.0,
}
"""Millions, as the models' pages and papers say (without a head or a pooler that ours lack)."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A shape of 40 thousand parameters, and what pretrains it in a few seconds."""
    path = tmp_path_factory.mktemp("shape") / "config.json"
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "vocab_size": 400, "tie_word_embeddings": True}
    path.write_text(json.dumps({"model_type": "llama", **tiny, **heads}))
    return Pretraining(
        str(path), steps=30, batch_size=8, length=64, learning_rate=0.01, problems=400, code=0.25
    )


def test_it_leaves_a_model_that_has_learned(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    consoles = Console(file=said, width=120), Console(quiet=True)
    losses = [
        pretrain(small, tmp_path / name, console)
        for name, console in zip("ab", consoles, strict=True)
    ]
    assert losses[0] == losses[1] < 4.5, "log(400) is 6.0"
    told = [line for line in said.getvalue().splitlines() if line.startswith("pretraining: step")]
    assert len(told) == 30, "a line for every twentieth of the steps, here for each"
    assert told[-1] == f"pretraining: step 30 of 30, loss {losses[0]:.3f}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "and nothing else"
    model, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("Question: 12 + 7", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Question: 12 + 7"
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 5.5


def test_a_federation_starts_from_it(small, tmp_path):
    pretrain(small, tmp_path, Console(quiet=True))
    settings = from_preset(
        "quickstart",
        task="arithmetic",
        model=str(tmp_path),
        target_modules=("q_proj", "v_proj"),
        max_tokens=64,
        max_new_tokens=2,
        test_size=16,
        train_size=64,
        shared_per_class=0,
    )
    assert Federation.build(settings).evaluate().loss < 5.5


def test_test_splits_are_left_out():
    """A test split of a fifth of a task has the lowest hashes; the training has none of them."""
    for level in (1, 3):
        task = TASKS["arithmetic"].load(test_size=1200, level=level, examples=6000)
        tests = {example.text + example.completion for example in task.test}
        trained = set(_texts(problems(level, 40, 6000, 0)))
        assert all(hashed(text)[0] <= HELD_OUT + 4 for text in tests)
        assert len(trained & tests) <= 0.05 * len(tests)
        smaller = TASKS["arithmetic"].load(test_size=1000, level=level, examples=6000)
        assert not trained & {example.text + example.completion for example in smaller.test}


def test_the_sums_are_every_first_line_of_a_solution():
    table = sums(20)
    for line in table:
        sum_, result = line.split(" = ")
        assert eval(sum_.replace("/", "//")) == int(result) > 0
    asked = {problem.completion.strip().split("\n")[0] for problem in problems(2, 20, 4000, 0)}
    assert asked <= set(table)
    assert len(asked) > 0.9 * len(table), "and hardly any that is never asked"


@pytest.mark.parametrize("name", sorted(path.stem for path in SHAPES.glob("*.json")))
def test_named_shapes_have_the_published_size(name):
    config = shape(name)
    from transformers import AutoModel

    kind = AutoModel if config.model_type == "roberta" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    found = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert found == pytest.approx(PARAMETERS[name], abs=0.1)
    assert json.loads((SHAPES / f"{name}.json").read_text())["source"]


def test_a_shape_has_its_recipe():
    assert recipe("llama-tiny", steps=None, seed=3).steps == 3000
    assert recipe("llama-tiny", seed=3).seed == 3
    assert recipe("llama-2-7b").shape == "llama-2-7b"
    assert recipe(None).shape == ("llama-30m" if torch.cuda.is_available() else "llama-tiny")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "steps must be at least 1, found 0"),
        ("--code 2", "code must be between 0 and 1, found 2.0"),
        ("--sums -1", "sums must be between 0 and 1, found -1.0"),
        ("--code 0.6 --sums 0.6", "code and sums must be at most 1 together, found 0.6 and 0.6"),
        ("--shape nothing", "unknown shape 'nothing'; known: llama-2-7b, "),
    ],
)
def test_wrong_flags_end_with_two_and_one_line(tmp_path, capsys, flags, message):
    assert main(["pretrain", "--out", str(tmp_path / "out"), *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_config_that_describes_nothing_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="describes no model"):
        shape(str(tmp_path))
