"""A small Llama, trained from scratch, so that fine-tuning starts from something that can read.

It learns from generated word problems and from the standard library's sources and documentation,
all made where it runs; nothing is downloaded. The texts that a hash puts among the first fifth are
left out: test splits are taken from there (`tasks.task.split`), so no test has been seen.

What is left is an ordinary transformers folder: `--model FOLDER` uses it.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from integration.model.loading import quiet, shape
from integration.model.progress import StepBar
from integration.model.tokenizer import trained_tokenizer
from integration.settings import SettingsError
from integration.settings.fields import setting
from integration.tasks import Example
from integration.tasks.arithmetic import SMALLEST, problems, sums
from integration.tasks.stdlib_chapters import strings
from integration.tasks.stdlib_code import definitions
from integration.tasks.task import hashed

HELD_OUT = 51
"""Of 256: texts whose hash begins with a smaller byte are left out of the training."""

DATA_SEED = 1_000
"""The word problems are drawn with another seed than a task's."""


@dataclass(frozen=True)
class Pretraining:
    """What a pretraining depends on; the defaults are meant for a GPU."""

    shape: str = setting(
        "A name in integration/configs; llama-30m on a GPU, else llama-tiny", "llama-30m"
    )
    steps: int = setting("Optimizer steps", 2000)
    batch_size: int = setting("Sequences in a step", 64)
    length: int = setting("Tokens of a sequence", 256)
    """Texts are packed without padding."""
    learning_rate: float = setting("At its highest", 1e-3)
    problems: int = setting("Different word problems", 100_000)
    level: int = setting("Operations of one, at most", 3)
    largest: int = setting("First number of one, at most", 40)
    code: float = setting("Share of the library's texts", 0.3)
    sums: float = setting("Share of bare sums", 0.0)
    """`14 + 5 = 19`, without a story."""
    seed: int = setting("Decides all randomness", 0)


RECIPES = {
    "llama-30m": Pretraining(),
    # 8 minutes of CPU time (one thread of an AMD EPYC). It then knows 0.9 of the sums by heart and
    # solves 0.23 of a test split's one-operation problems: of most stories it misreads the second
    # number, so there is something left to learn.
    "llama-tiny": Pretraining(
        "llama-tiny",
        steps=3000,
        batch_size=8,
        length=64,
        learning_rate=3e-3,
        problems=5000,
        level=1,
        largest=20,
        code=0.05,
        sums=0.4,
    ),
}
"""Shape -> what is known to work for it; other shapes take llama-30m's."""


def recipe(shape: str | None, **changes: Any) -> Pretraining:
    """A shape's recipe with the changes that are not None; the shape that suits the machine when it
    is None: llama-30m on a GPU, llama-tiny on a CPU.
    """
    if shape is None:
        shape = "llama-30m" if torch.cuda.is_available() else "llama-tiny"
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(RECIPES.get(shape, RECIPES["llama-30m"]), shape=shape, **changes)


def pretrain(settings: Pretraining, out: Path, console: Console) -> float:
    """Train the model and write it into `out`; returns its loss at the end, per token.

    Raises SettingsError for an unknown shape or sizes that cannot work.
    """
    for name in ("steps", "batch_size", "length", "problems", "level"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"{name} must be at least 1, found {getattr(settings, name)}")
    for name in ("code", "sums"):
        if not 0 <= getattr(settings, name) <= 1:
            raise SettingsError(f"{name} must be between 0 and 1, found {getattr(settings, name)}")
    if settings.code + settings.sums > 1:
        raise SettingsError(
            f"code and sums must be at most 1 together, found {settings.code} and {settings.sums}"
        )
    if settings.largest < SMALLEST:
        raise SettingsError(f"largest must be at least {SMALLEST}, found {settings.largest}")
    config = shape(settings.shape)
    arithmetic = _texts(problems(settings.level, settings.largest, settings.problems, DATA_SEED))
    library = _texts(definitions(2000)) + _kept(list(strings()))
    tokenizer = trained_tokenizer([*arithmetic[:20_000], *library], int(config.vocab_size))
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    needed = settings.steps * settings.batch_size
    shares = ((library, settings.code), (sums(settings.largest), settings.sums))
    counts = [(texts, round(share * needed)) for texts, share in shares]
    counts.append((arithmetic, needed - sum(count for _, count in counts)))
    sequences = [
        sequence
        for texts, count in counts
        for sequence in _packed(texts, tokenizer, settings.length, count, settings.seed)
    ]
    random.Random(settings.seed).shuffle(sequences)
    set_seed(settings.seed)
    gpu = torch.cuda.is_available()
    with quiet(), torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{settings.shape}: {size / 1e6:.1f} million parameters, {len(tokenizer)} tokens, "
        f"{needed * settings.length / 1e6:.1f} million tokens of training"
    )
    loss = _train(model, sequences, settings, gpu, console)
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    console.print(f"loss {loss:.3f}  {out}")
    return loss


def _train(
    model: Any, sequences: list[Tensor], settings: Pretraining, gpu: bool, console: Console
) -> float:
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there: it saves and logs nothing
        use_cpu=not gpu,
        bf16=gpu,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        weight_decay=0.01,
        adam_beta2=0.95,
        save_strategy="no",
        logging_steps=max(1, settings.steps // 20),
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
    )
    trainer = Trainer(model, arguments, train_dataset=_Sequences(sequences))
    trainer.remove_callback(PrinterCallback)
    with StepBar("pretraining", settings.steps, console) as bar:
        trainer.add_callback(bar.callback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[-1])


class _Sequences(Dataset[dict[str, Tensor]]):
    def __init__(self, sequences: list[Tensor]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self._sequences[place], "labels": self._sequences[place]}


def _texts(examples: list[Example]) -> list[str]:
    return _kept([example.text + (example.completion or "") for example in examples])


def _kept(texts: list[str]) -> list[str]:
    """Without the texts that test splits are taken from."""
    return [text for text in texts if hashed(text)[0] >= HELD_OUT]


def _packed(texts: list[str], tokenizer: Any, length: int, count: int, seed: int) -> list[Tensor]:
    """`count` sequences of `length` tokens: passes over the texts in orders of their own, each
    text between its begin and end tokens, cut where a sequence is full.
    """
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    draw = random.Random(seed)
    stream: list[int] = []
    while len(stream) < count * length:
        for place in draw.sample(range(len(encoded)), len(encoded)):
            stream += encoded[place]
    return list(torch.tensor(stream[: count * length]).view(count, length).unbind())
