"""Federated fine-tuning, end to end: every aggregation rule on one real task, in minutes.

Runs from a checkout (`python -m integration compare --preset quickstart --out runs/quickstart`)
and is no part of the installed package.

    settings/     what a run depends on: presets, the command line's flags, seeds
    tasks/        what is learned: one file per task
    model/        one base in memory, LoRA adapters that are switched, their training
    rounds/       one round: partition, local training, aggregation, evaluation, what is kept
    report/       summary.json, the table, report.html, pages of the docs
    flower/       the same rounds on Flower

    __main__.py   the command line
    compare.py    all rules and seeds through the same rounds
    tuning.py     each rule's learning rate, chosen on a validation split
    plan.py       --dry-run: what a run would hold and move, without weights or data
    tiny.py       --tiny: the same run in miniature
    lm_eval.py    the language model evaluation harness on what a run has left
    files.py      files that appear whole, and JSON that every parser reads

    presets/      papers' settings with their sources
    configs/      named shapes of random models
    results/      committed runs, by device and preset

A room imports from the rooms above it only, and flower/ also from compare.py.
"""

import os

# Read by huggingface_hub when it is imported: models come from the disk, never from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
