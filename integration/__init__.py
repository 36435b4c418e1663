"""Federated fine-tuning, end to end: every aggregation rule on one real task, in minutes.

Runs from a checkout (`python -m integration compare --preset quickstart --out runs/quickstart`)
and is no part of the installed package.

What a run is
    settings.py     a preset with the command line's changes on top; flags.py makes the flags
    seeds.py        every draw is decided by (seed, round, client)
    tasks/          what is learned: examples, their split, what counts as right
    loading.py      the base model: pretrained, or random of a named shape (configs/)
    tokenizer.py    a tokenizer trained at run time, for models without one
    pretrain.py     a small Llama from scratch, to start from

One round
    federation.py   task, model, splits and clients, which all rules share
    partition.py    which client holds which examples, and which take part in a round
    tokens.py       a split in the model's tokens, as padded batches
    model.py        one base in memory, LoRA adapters that are switched; class_means.py is a head
    trainer.py      transformers' Trainer, kept for all clients
    client.py       local training: adapter in, update out
    engine.py       how a round's clients come to train: here, or on Flower (flower/)
    server.py       one rule: updates in, a record and every client's next start out
    judge.py        accuracy and loss of a model on a split

What is left of it
    rounds.py       one rule through its rounds; state.py keeps each on the disk, for --resume
    packing.py      adapters as plain tensors; total.py sums several into one
    compare.py      all rules and seeds through the same rounds
    records.py      settings.json, metrics.jsonl, the adapters; files.py writes whole files
    summary.py      summary.json, what every rule comes to; noise.py has intervals over seeds
    table.py        the table at the end
    report.py       report.html of one or several runs: series.py reads them, charts.py and
                    module_charts.py draw, with what panels.py has
    tracking.py     the same rounds for TensorBoard and Weights & Biases

Before it
    presets/        papers' settings with their sources; published.py has their data's sizes
    plan.py         --dry-run: what a run would hold and move, without weights or data
    tiny.py         --tiny: the same run in miniature
"""

import os

# Read by huggingface_hub when it is imported: models come from the disk, never from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
