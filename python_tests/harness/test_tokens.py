"""Tokens, losses and scores of a model: what counts, and that evaluate and Trainer agree on it."""

import math

import pytest
import torch
from miniature import MESSAGES, language, miniature
from torch.nn.functional import cross_entropy

from integration.model.tokenizer import trained_tokenizer
from integration.model.tokens import IGNORED, Completions
from integration.model.trainer import LocalTrainer
from integration.rounds.evaluate import evaluate
from integration.rounds.federation import Federation
from integration.settings import SettingsError
from integration.tasks import Example


@pytest.fixture(scope="module")
def federation():
    return Federation.build(language())


# ---- tokens and losses --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer(["Name a color. Blue. The sky is blue. 12 + 30 = 42"] * 3, 300)


def test_a_trained_tokenizer_gives_every_text_back(tokenizer):
    for text in ("The sky is blue.", "1234 + 5 = 1239", "naïve Größe 東京 \N{SNOWMAN}\n\ttab"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("123")["input_ids"]) == 4, "a digit is a token"
    again = trained_tokenizer(["Name a color. Blue. The sky is blue. 12 + 30 = 42"] * 3, 300)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_only_the_completion_counts(tokenizer):
    examples = [
        Example("The sky is", 0, completion=" blue."),
        Example("", 0, completion="Blue.", turns=(("user", "Name a color."),)),
    ]
    tokens = Completions(examples, tokenizer, 64)
    batch = tokens.batch([0, 1])
    for row, expected in zip(batch["labels"], (" blue.</s>", "Blue.\n</s>"), strict=True):
        assert tokenizer.decode(row[row != IGNORED]) == expected
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    prompts = tokens.to_complete([0, 1])
    assert prompts["attention_mask"][:, -1].all(), "padded on the left"
    assert tokenizer.decode(prompts["input_ids"][1]) == "<s>user:\nName a color.\nassistant:\n"


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
            Example("", 0, completion="Blue.", turns=(("user", "Name a color."),)),
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
    """evaluate() and the Trainer against transformers' own loss, one example at a time."""
    model, tokens = federation.model, federation.test
    total, count = 0.0, 0
    with torch.inference_mode(), model.carrying():
        for position in range(len(tokens)):
            batch = tokens.batch([position])
            counted = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model.network(**batch).loss) * counted
            count += counted
    score = evaluate(model, federation.task, tokens, max_new_tokens=1)
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
    assert made.evaluate(update.adapter).loss < made.evaluate().loss


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
    assert evaluate(model, task, tokens, max_new_tokens=40).accuracy == 1.0
    assert evaluate(model, task, tokens, max_new_tokens=3).accuracy == 0.0


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
