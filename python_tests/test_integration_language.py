"""Language tasks: generated problems, library sources, data sets from files, tokens and losses."""

import itertools
import json
import math
import re

import pytest
import torch
from miniature import miniature, settings_like
from torch.nn.functional import cross_entropy

import fedlora_kernels as flk
from integration.engine import LocalEngine
from integration.federation import Federation
from integration.judge import judge
from integration.server import Server
from integration.settings import SettingsError
from integration.tasks import TASKS, Example, TaskError, arithmetic, load_task
from integration.tasks.answers import after_hashes, boxed, same_box, same_number
from integration.tasks.programs import passes
from integration.tokenizer import trained_tokenizer
from integration.tokens import IGNORED, Completions
from integration.trainer import LocalTrainer

SIZES = {"test_size": 100, "shared_per_class": 0}
PROBLEM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def language(**changes):
    """A federation of a language task on a random model of 3 million parameters."""
    tiny = {
        "task": "arithmetic",
        "config": "llama-tiny",
        "target_modules": ("q_proj", "v_proj"),
        "max_tokens": 64,
        "test_size": 8,
        "max_new_tokens": 4,
        "shared_per_class": 0,
    }
    return miniature(**(tiny | changes))


@pytest.fixture(scope="module")
def federation():
    return Federation.build(language())


# ---- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 4])
def test_every_solution_is_right(level):
    for problem in arithmetic.problems(level, 40, 800, 0):
        lines = PROBLEM.findall(problem.completion)
        assert 1 <= len(lines) <= level
        for left, sign, right, result in lines:
            assert eval(f"{left} {sign} {right}") == int(result) > 0
        assert lines[-1][3] == problem.answer == after_hashes(problem.completion)
        assert lines[0][0] in problem.text
        for (*_, before), (after, *_) in itertools.pairwise(lines):
            assert before == after


def test_topics_come_in_turn_and_differ_in_their_operations():
    problems = arithmetic.problems(1, 40, 800, 0)
    assert len({problem.text for problem in problems}) == 800
    for label, topic in enumerate(arithmetic.TOPICS):
        mine = [problem for problem in problems if problem.label == label]
        assert len(mine) == 100
        assert {PROBLEM.search(problem.completion)[2] for problem in mine} == set(topic.events)


def test_the_seed_decides_the_problems():
    assert arithmetic.problems(2, 40, 50, 3) == arithmetic.problems(2, 40, 50, 3)
    assert arithmetic.problems(2, 40, 50, 3) != arithmetic.problems(2, 40, 50, 4)


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(TaskError, match=r"different problems in .* need 5000; raise largest \(6\)"):
        TASKS["arithmetic"](**SIZES, level=1, largest=6, examples=5_000)


def test_unknown_options_and_tasks_are_errors():
    with pytest.raises(TaskError, match="task arithmetic has no option 'levels'; its options: lev"):
        load_task(language(task_options={"levels": 3}))
    with pytest.raises(TaskError, match="unknown task 'sums'; known: stdlib_chapters"):
        load_task(language(task="sums"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,200", "1200"),
        ("####-3.50 dollars", "-3.5"),
        ("#### 10.", "10"),
        ("#### 100", "100"),
        ("it is 7", None),
        ("#### none", None),
    ],
)
def test_the_number_after_hashes(text, answer):
    assert after_hashes(text) == answer
    assert same_number(Example("", 0, answer="7"), text) == (answer == "7")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{ x + 2 }", "x+2"),
        (r"\boxed{\left( 3, \dfrac{1}{2} \right)}", r"(3,\frac{1}{2})"),
        (r"\boxed{never closed", None),
        ("7", None),
    ],
)
def test_the_contents_of_a_box(text, answer):
    assert boxed(text) == answer
    assert same_box(Example("", 0, answer="x+2"), text) == (answer == "x+2")


# ---- the library's sources ----------------------------------------------------------------------


def test_library_sources_are_whole_definitions():
    task = TASKS["stdlib_code"](**SIZES, most_characters=100_000)
    assert len(task.train) > 1000
    assert len({example.label for example in task.train}) == 8
    for example in task.test:
        assert example.text == ""
        compile(example.completion, "definition", "exec")


# ---- data sets from files -----------------------------------------------------------------------

MESSAGES = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
]

FILES = {
    "gsm8k": [
        {"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
        for n in range(40)
    ],
    "math": [
        {
            "problem": f"Square {n}.",
            "level": "Level 1",
            "type": ("Algebra", "Geometry")[n % 2],
            "solution": rf"It is $\boxed{{{n * n}}}$.",
        }
        for n in range(40)
    ],
    "programs": [
        {
            "text": f"Write a function that adds {n}.",
            "code": f"def add(x):\n    return x + {n}\n",
            "test_list": [f"assert add(1) == {1 + n}", "assert add(0) != 99"],
        }
        for n in range(40)
    ],
    "dolly": [
        {
            "instruction": f"Say {n}.",
            "context": "" if n % 2 else "Be brief.",
            "response": str(n),
            "category": ("open_qa", "brainstorming")[n % 2],
        }
        for n in range(40)
    ],
    "alpaca_gpt4": [
        {"instruction": f"Say {n}.", "input": "", "output": str(n), "text": ""} for n in range(40)
    ],
}


def written(folder, rows, name="train"):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` makes of the files goes with the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", list(FILES))
def test_data_sets_from_files(tmp_path, name):
    source = written(tmp_path / "set", FILES[name])
    task = TASKS[name](test_size=10, shared_per_class=0, source=source)
    assert (len(task.train), len(task.test)) == (30, 10)
    assert task.kind == "language"
    if task.right is not None:
        assert all(task.right(example, example.completion) for example in task.test)
        assert not any(task.right(example, "#### none") for example in task.test)
    written(tmp_path / "set", FILES[name][:5], "test")
    own = TASKS[name](test_size=10, shared_per_class=0, source=source)
    assert (len(own.train), len(own.test)) == (40, 5), "a test split of its own is used"


def test_topics_come_from_the_columns(tmp_path):
    dolly = TASKS["dolly"](
        **SIZES | {"test_size": 5}, source=written(tmp_path / "d", FILES["dolly"])
    )
    assert dolly.classes == ("brainstorming", "open_qa")
    assert {len(example.turns) for example in dolly.train} == {1}
    asked = {example.turns[0][1] for example in [*dolly.train, *dolly.test]}
    assert "Say 2.\n\nBe brief." in asked
    assert "Say 3." in asked
    math = TASKS["math"](**SIZES | {"test_size": 5}, source=written(tmp_path / "m", FILES["math"]))
    assert math.classes == ("Algebra", "Geometry")


def test_glue_pairs_and_its_validation_split(tmp_path):
    rows = [
        {"sentence1": f"It rains {n}.", "sentence2": "It is wet.", "label": n % 2, "idx": n}
        for n in range(40)
    ]
    source = written(tmp_path / "rte", rows)
    written(tmp_path / "rte", rows[:7], "validation")
    task = TASKS["glue"](test_size=100, shared_per_class=2, subset="rte", source=source)
    assert (len(task.train), len(task.shared), len(task.test)) == (36, 4, 7)
    assert task.classes == ("entailment", "not_entailment")
    assert all(example.second == "It is wet." for example in task.train)
    with pytest.raises(TaskError, match="unknown subset 'stsb'; known: cola, sst2"):
        TASKS["glue"](test_size=1, shared_per_class=0, subset="stsb")


@pytest.fixture
def pairs(tmp_path):
    """Settings of GLUE pairs with a trained classifier, on a BERT of 20 thousand weights."""
    rows = [{"sentence1": f"a {n}", "sentence2": "bc"[n % 2], "label": n % 2} for n in range(40)]
    shape = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 16, "vocab_size": 300}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape | layers))
    return miniature(
        task="glue",
        task_options={"subset": "mrpc", "source": written(tmp_path / "mrpc", rows)},
        config=str(tmp_path),
        head="trained",
        loss="plain",
        shared_per_class=0,
        test_size=8,
    )


def test_a_trained_head_learns_pairs(pairs):
    """GLUE's setting: the classifier is trained with the factors."""
    made = Federation.build(pairs)
    settings = pairs
    start = made.model.fresh(8, 0)
    heads = [key for key in start.extras if "classifier" in key]
    assert heads, "the head travels with the adapter"
    trainer = LocalTrainer(made.model, settings)
    client = made.clients[0]
    update = client.train(made.model, trainer, made.train, start, 1, settings)
    assert all(not torch.equal(update.adapter.extras[key], start.extras[key]) for key in heads)
    trained, untrained = made.judge(update.adapter), made.judge(start)
    assert trained.loss != untrained.loss
    with made.model.carrying(update.adapter):
        batch = made.test.batch([0, 1])
        labels = batch.pop("labels")
        hooked = made.model.network(**batch).logits
    made.model.take(update.adapter)
    torch.testing.assert_close(made.model.network(**batch).logits, hooked, rtol=1e-4, atol=1e-5)
    assert labels.shape == (2,)


@pytest.mark.parametrize(
    ("rule", "after"),
    [
        ("fedit", None),
        ("florist", "merge"),
        ("flexlora", "merge"),
        ("flora", None),
        ("fedex", None),
        ("fedsa", None),
    ],
)
def test_heads_travel_with_every_rule(pairs, tmp_path, rule, after):
    """Averaged, also where the factors are merged and start afresh; FedSA's stay at home."""
    made = Federation.build(settings_like(pairs, after=after))
    server = Server(flk.rules()[rule], made.model, made.clients, made.settings)
    engine = LocalEngine(made, LocalTrainer(made.model, made.settings))
    updates = engine.train(server, 1, lambda: None)
    record = server.finish(1, updates, made.judge)
    sizes = torch.tensor([update.examples for update in updates], dtype=torch.float64)
    starts = [server.start(client, 2) for client in made.clients]
    heads = [key for key in starts[0].extras if "classifier" in key]
    assert heads
    for key in heads:
        trained = torch.stack([update.adapter.extras[key].double() for update in updates], -1)
        mean = (trained @ (sizes / sizes.sum())).float()
        for place, start in enumerate(starts):
            expected = trained[..., place].float() if rule == "fedsa" else mean
            torch.testing.assert_close(start.extras[key], expected, rtol=1e-6, atol=1e-7)
    if rule != "fedsa":
        made.model.restore()
        assert made.judge(server.final()).loss == pytest.approx(record.loss, rel=1e-4)


def test_conventions_of_columns(tmp_path):
    asked = [{"messages": [{"role": "system", "content": "Short."}, *MESSAGES]}] * 20
    task = TASKS["instructions"](
        test_size=5, shared_per_class=0, source=written(tmp_path / "a", asked)
    )
    assert task.train[0].turns == (("system", "Short."), ("user", "Name a colour."))
    assert task.train[0].completion == "Blue."
    split = [{"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}] * 20
    same = TASKS["instructions"](
        test_size=5, shared_per_class=0, source=written(tmp_path / "b", split)
    )
    assert same.train[0].turns == (("user", "Name a colour."),)
    plain = [{"prompt": "The sky is", "completion": " blue."}] * 20
    texts = TASKS["instructions"](
        test_size=5, shared_per_class=0, source=written(tmp_path / "c", plain)
    )
    assert (texts.train[0].text, texts.train[0].completion) == ("The sky is", " blue.")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": MESSAGES[:1]}], "ends with the user's; expected an assistant's turn"),
        ([{"text": "alone"}], "has the columns text; expected messages, or prompt and"),
    ],
)
def test_other_columns_are_errors(tmp_path, rows, message):
    with pytest.raises(TaskError, match=message):
        TASKS["instructions"](test_size=1, shared_per_class=0, source=written(tmp_path / "x", rows))


def test_a_missing_column_and_a_missing_data_set_are_errors(tmp_path):
    source = written(tmp_path / "x", FILES["math"])
    with pytest.raises(TaskError, match="has no column 'question'; its columns: level, problem"):
        TASKS["gsm8k"](test_size=1, shared_per_class=0, source=source)
    with pytest.raises(TaskError, match="data set 'no/such-set' cannot be read"):
        TASKS["gsm8k"](test_size=1, shared_per_class=0, source="no/such-set")
    with pytest.raises(TaskError, match="needs the option source"):
        TASKS["instructions"](test_size=1, shared_per_class=0)


def test_programs_run_against_their_tests():
    example = Example("def double(x):\n", 0, answer="assert double(2) == 4")
    assert passes(example, "    return 2 * x\n")
    assert not passes(example, "    return x\n")
    assert not passes(example, "    return (\n")
    assert not passes(example, "    bytearray(1 << 32)\n    return 2 * x\n"), "memory is limited"


def test_programs_are_run_only_on_request(tmp_path):
    source = written(tmp_path / "p", FILES["programs"])
    sizes = {"test_size": 5, "shared_per_class": 0}
    assert TASKS["programs"](**sizes, source=source).right is None
    assert TASKS["programs"](**sizes, source=source, run_code=True).right is passes
    human = {
        "prompt": 'def one():\n    """One."""\n',
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    }
    tests = written(tmp_path / "h", [human] * 9, "test")
    task = TASKS["programs"](**sizes, source=source, test_source=tests, run_code=True)
    assert (len(task.train), len(task.test)) == (40, 5)
    assert passes(task.test[0], task.test[0].completion)


# ---- tokens and losses --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer(["Name a colour. Blue. The sky is blue. 12 + 30 = 42"] * 3, 300)


def test_a_trained_tokenizer_gives_every_text_back(tokenizer):
    for text in ("The sky is blue.", "1234 + 5 = 1239", "naïve Größe 東京 \N{SNOWMAN}\n\ttab"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("123")["input_ids"]) == 4, "a digit is a token"
    again = trained_tokenizer(["Name a colour. Blue. The sky is blue. 12 + 30 = 42"] * 3, 300)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_only_the_completion_counts(tokenizer):
    examples = [
        Example("The sky is", 0, completion=" blue."),
        Example("", 0, completion="Blue.", turns=(("user", "Name a colour."),)),
    ]
    tokens = Completions(examples, tokenizer, 64)
    batch = tokens.batch([0, 1])
    for row, expected in zip(batch["labels"], (" blue.</s>", "Blue.\n</s>"), strict=True):
        assert tokenizer.decode(row[row != IGNORED]) == expected
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    prompts = tokens.to_complete([0, 1])
    assert prompts["attention_mask"][:, -1].all(), "padded on the left"
    assert tokenizer.decode(prompts["input_ids"][1]) == "<s>user:\nName a colour.\nassistant:\n"


def test_tokens_are_those_of_trl(tokenizer, tmp_path):
    """The same ids and the same masks as TRL's SFTTrainer makes of the same rows."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "vocab_size": len(tokenizer)}
    for row, example in (
        (
            {"prompt": "The sky is", "completion": " blue."},
            Example("The sky is", 0, completion=" blue."),
        ),
        (
            {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
            Example("", 0, completion="Blue.", turns=(("user", "Name a colour."),)),
        ),
    ):
        trainer = trl.SFTTrainer(
            LlamaForCausalLM(LlamaConfig(**shape, **heads)),
            trl.SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        expected = next(iter(trainer.get_train_dataloader()))
        found = Completions([example], tokenizer, 64).batch([0])
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()
        assert found["labels"].tolist() == expected["labels"].tolist()


def test_the_loss_is_the_completions_mean_cross_entropy(federation):
    """judge() and the Trainer against transformers' own loss, one example at a time."""
    model, tokens = federation.model, federation.test
    total, count = 0.0, 0
    with torch.inference_mode(), model.carrying():
        for position in range(len(tokens)):
            batch = tokens.batch([position])
            counted = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model.network(**batch).loss) * counted
            count += counted
    score = judge(model, federation.task, tokens, max_new_tokens=1)
    assert score.loss == pytest.approx(total / count, rel=1e-5)
    assert score.loss == pytest.approx(math.log(model.network.config.vocab_size), rel=0.1)
    trainer = LocalTrainer(model, federation.settings)
    parameters = model.take(model.fresh(8, 0))
    loss, _ = trainer.fit(parameters, tokens, [list(range(len(tokens)))], rate=1e-9, seed=0)
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_training_moves_a_language_model(federation):
    made, settings = federation, federation.settings
    trainer = LocalTrainer(made.model, settings)
    update = made.clients[0].train(
        made.model, trainer, made.train, made.model.fresh(8, 0, 1), 1, settings
    )
    assert all(factors.b.any() for factors in update.adapter.factors.values())
    assert made.judge(update.adapter).loss < made.judge().loss


def test_generation_stops_at_the_answer(federation, monkeypatch):
    """A model that writes the right answer is right, whatever stands in the same batch."""
    model, task, tokens = federation.model, federation.task, federation.test
    pairs = zip(tokens.prompts, tokens.examples, strict=True)
    answers = {tuple(prompt.tolist()): example.completion for prompt, example in pairs}

    def generate(input_ids, attention_mask, max_new_tokens, **_):
        written = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            text = answers[tuple(row[mask.bool()].tolist())]
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [*ids, model.tokenizer.eos_token_id][:max_new_tokens]
            written.append(row.tolist() + ids + [tokens.padding] * (max_new_tokens - len(ids)))
        return torch.tensor(written)

    monkeypatch.setattr(model.network, "generate", generate, raising=False)
    assert judge(model, task, tokens, max_new_tokens=40).accuracy == 1.0
    assert judge(model, task, tokens, max_new_tokens=3).accuracy == 0.0


def test_the_balanced_loss_adds_the_clients_frequencies():
    made = Federation.build(miniature())
    trainer = LocalTrainer(made.model, made.settings)
    frequencies = made.clients[0].log_frequencies(made.train, 8)
    parameters = made.model.take(made.model.fresh(8, 0))
    batch = made.train.batch([0, 1, 2])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = made.model.network(**batch).logits
    for added, expected in ((frequencies, logits + frequencies), (None, logits)):
        loss, _ = trainer.fit(
            parameters, made.train, [[0, 1, 2]], rate=1e-12, seed=0, frequencies=added
        )
        assert loss == pytest.approx(float(cross_entropy(expected, labels)), rel=1e-5)


def test_a_gpu_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SettingsError, match="device cuda, but torch finds no GPU"):
        Federation.build(language(device="cuda"))


def test_checkpointing_and_bfloat16_train_the_same_way():
    """Gradient checkpointing changes no bit; a bfloat16 base keeps float32 adapters."""
    trained = []
    for changes in ({}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}):
        made = Federation.build(language(**changes))
        start = made.model.fresh(8, 0, 1)
        trainer = LocalTrainer(made.model, made.settings)
        client = made.clients[0]
        trained.append(client.train(made.model, trainer, made.train, start, 1, made.settings))
    plain, checkpointed, half = (update.adapter.factors for update in trained)
    for name, factors in plain.items():
        assert torch.equal(factors.b, checkpointed[name].b)
        assert half[name].b.dtype == torch.float32
        assert half[name].b.any()
