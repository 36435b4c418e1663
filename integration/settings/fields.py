"""One run's settings.

Every field that is a number, a word or a list of them is also a flag of the command line (its
`help` is the flag's); tables can be set in a preset only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fedlora_kernels import rules

ENERGY_RULES = [kind for kind in map(rules.find, rules.names()) if "energy" in kind.options()]
"""The rules whose option `energy` the flag of that name sets."""


class SettingsError(ValueError):
    """A setting that cannot work; the message is one line and says what would."""


def setting(text: str, default: Any = dataclasses.MISSING, words: tuple[str, ...] = ()) -> Any:
    """A field with its help text, and the words that it may be."""
    return field(default=default, metadata=about(text, words))


def about(text: str, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a field's metadata hold: the help of its flag, and the words that it may be."""
    return {"help": f"{text}.", "words": words}


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on; equal settings give equal results, bit for bit."""

    # ---- task and model
    task: str = setting("Name of the task")
    model: str = setting("A model's name, hub id or folder")
    max_tokens: int = setting("Tokens of one text; the rest of a longer text is cut off")
    test_size: int = setting("Examples in the test split")
    # ---- federation
    rules: tuple[str, ...] = setting("Rules, separated by commas")
    clients: int = setting("Number of clients")
    rounds: int = setting("Rounds of every rule")
    batch_size: int = setting("Examples in one optimizer step")
    learning_rate: float = setting("Learning rate of the first round")
    ranks: tuple[int, ...] = setting("One LoRA rank for all, or one per client: 8,8,4,4")
    lora_scaling: float = setting("alpha / r, the same for every client")
    target_modules: tuple[str, ...] = setting("Modules that get an adapter")

    steps: int | None = setting("Optimizer steps per client and round", None)
    epochs: int | None = setting("Passes over a client's data per round, instead of steps", None)
    micro_batch_size: int | None = setting(
        "Examples of a step that are in memory at one time, to save memory; by default all", None
    )
    learning_rates: tuple[float, ...] = setting(
        "Each rule's learning rate is chosen from these, by its loss on the validation split", ()
    )
    validation_size: int = setting("Training examples of the validation split", 0)
    tuning_seeds: int = setting("Number of the run's first seeds that choose each rate", 1)
    schedule: str = setting(
        "Learning rate over the rounds", "linear", ("linear", "cosine", "constant")
    )
    optimizer_state: str = setting(
        "Whether a client keeps its AdamW moments from round to round", "reset", ("reset", "keep")
    )
    weight_decay: float = setting("AdamW's weight decay", 0.0)
    max_grad_norm: float = setting("Gradients are clipped to this norm; 0 does not clip", 0.0)

    partition: str = setting(
        "How the examples are dealt to the clients",
        "dirichlet",
        ("dirichlet", "iid", "by-label", "by-topic"),
    )
    alpha: float = setting(
        "Concentration of the Dirichlet partition; small is uneven (not LoRA's alpha)", 0.5
    )
    participation: float = setting("Share of the clients that take part in a round", 1.0)

    method: str = setting("What the clients train", "lora", ("lora", "rslora", "vera"))
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata=about("Module -> its rank in every client")
    )
    freeze: str = setting(
        "Which factor stays fixed on the clients: what the rule asks for, or A and B in turn",
        "rule",
        ("rule", "alternate"),
    )
    after: str | None = setting(
        "What the next round starts from: the global adapter (continue), or the base model with "
        "the adapter merged in (merge); by default what each rule asks for",
        None,
    )
    options: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata=about("Rule -> options of its aggregation")
    )

    # ---- the task's and the model's details
    task_options: dict[str, Any] = field(
        default_factory=dict, metadata=about("Options of the task")
    )
    train_size: int | None = setting("The largest number of training examples", None)
    data: str | None = setting(
        "Folder with a folder for every data set, such as gsm8k/train.jsonl; by default the hub",
        None,
    )
    head: str = setting(
        "Classification head: fixed class means of a small labeled split that all clients share, "
        "or trained by the clients",
        "means",
        ("means", "trained"),
    )
    shared_per_class: int = setting("Examples per class in the split that all clients share", 50)
    logit_scale: float = setting(
        "With --head means: the factor from cosine similarities to logits", 20.0
    )
    loss: str = setting(
        "Loss of classification; balanced adds the log of the client's class shares to the logits",
        "balanced",
        ("balanced", "plain"),
    )
    answers: int | None = setting(
        "Test examples that are answered by generation; by default all", None
    )
    max_new_tokens: int = setting("Tokens that a generated answer may have", 64)
    init: str = setting("Where the base weights come from", "pretrained", ("pretrained", "random"))
    config: str | None = setting("Shape of a random model: a name, or a config.json", None)
    device: str = setting("Where to train", "auto", ("auto", "cpu", "cuda"))
    dtype: str = setting(
        "Dtype of the base weights; auto is bfloat16 on a GPU, else float32; fastest is measured "
        "on a CPU when the run begins",
        "auto",
        ("auto", "fastest", "float32", "bfloat16"),
    )
    gradient_checkpointing: bool = setting("Compute activations twice to save memory", False)

    # ---- evaluation
    evaluate_every: int = setting(
        "Evaluate after each such number of rounds, and after the last", 1
    )
    client_test_size: int = setting("Test examples drawn in each client's own proportions", 0)
    track: str = setting(
        "Where the metrics of rounds are sent, beside metrics.jsonl",
        "nothing",
        ("nothing", "tensorboard", "wandb"),
    )
    seed: int = setting("Seed of all random numbers", 0)
    seeds: int = setting("Number of seeds that every rule is run with: seed, seed + 1, ...", 1)

    @property
    def heterogeneous(self) -> bool:
        """Whether the clients' ranks differ."""
        return len(set(self.ranks)) > 1
