"""Sizes and label shares of public data sets, for plans made where the data are not.

Every entry names where its totals are printed. Labels are in the order of the task's classes; one
label stands for a data set without topics. How a total divides into labels was counted in GLUE's
own files for cola, sst2, mrpc and rte. The shares of qqp, mnli and qnli, and those of Dolly's
categories where nothing is said, add up to the printed totals but were not checked one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from integration.settings import Settings, SettingsError


@dataclass(frozen=True)
class Published:
    """A data set's splits."""

    train: tuple[int, ...]
    """Training examples of every label."""
    test: int
    """Examples of its test split; 0 where it has none and the test is cut from the training."""
    source: str


HUB = "https://huggingface.co/datasets/"
CARDS = "https://github.com/huggingface/datasets, datasets/"
"""Where the cards of the older data sets were kept before they moved to the hub."""

PUBLISHED = {
    # open_qa, general_qa, classification, closed_qa, brainstorming, information_extraction,
    # summarization, creative_writing. Those of classification, summarization and creative_writing
    # are also printed by lionelchg's data sets of one category each (dolly_classification, ...).
    "dolly": Published(
        (3742, 2191, 2136, 1773, 1766, 1506, 1188, 709),
        0,
        HUB + "agie-ai/databricks-databricks-dolly-15k (a copy of databricks/databricks-dolly-15k)",
    ),
    # The same number of examples and of bytes as vicgalle/alpaca-gpt4.
    "alpaca_gpt4": Published((52002,), 0, HUB + "flwrlabs/alpaca-gpt4"),
    # Printed in thousands: 70k rows.
    "instructions WizardLM/WizardLM_evol_instruct_70k": Published(
        (70000,), 0, HUB + "WizardLMTeam/WizardLM_evol_instruct_70k"
    ),
    "gsm8k": Published((7473,), 1319, CARDS + "gsm8k/README.md"),
    # The 7,500 and 5,000 of MATH in one split, in thousands: 12.5k rows.
    "math": Published((12500,), 0, HUB + "qwedsacf/competition_math"),
    "programs": Published((374,), 500, CARDS + "mbpp/README.md"),
    "glue cola": Published((2528, 6023), 1043, CARDS + "glue/dataset_infos.json"),
    "glue sst2": Published((29780, 37569), 872, CARDS + "glue/dataset_infos.json"),
    # GLUE's own file of mrpc has one example of the second label less.
    "glue mrpc": Published((1194, 2474), 408, CARDS + "glue/dataset_infos.json"),
    "glue qqp": Published((229468, 134378), 40430, CARDS + "glue/dataset_infos.json"),
    "glue mnli": Published((130899, 130900, 130903), 9815, CARDS + "glue/dataset_infos.json"),
    "glue qnli": Published((52366, 52377), 5463, CARDS + "glue/dataset_infos.json"),
    "glue rte": Published((1249, 1241), 277, CARDS + "glue/dataset_infos.json"),
}
"""Task, with its subset or source where that decides it -> the data set."""


def published(settings: Settings) -> Published:
    """The data set of the settings' task. Raises SettingsError where none is known."""
    options = settings.task_options
    detail = {"glue": options.get("subset", "sst2"), "instructions": options.get("source", "")}
    name = f"{settings.task} {detail.get(settings.task, '')}".strip()
    if name not in PUBLISHED:
        raise SettingsError(
            f"no size of {name!r} is known here; known: {', '.join(PUBLISHED)}; other data are "
            "planned from files (task_options.source)"
        )
    return PUBLISHED[name]
