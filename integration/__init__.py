"""Federated fine-tuning, end to end: every aggregation rule on one real task, in minutes.

Runs from a checkout (`python -m integration compare --preset quickstart --out runs/quickstart`)
and is no part of the installed package.

    settings.py     a preset with the command line's changes on top
    tasks/          labelled texts and their split into train, shared and test
    partition.py    which client holds which training examples
    tokens.py       the task, tokenised once, as padded batches
    pretrained.py   where a model's weights lie
    model.py        one encoder in memory, LoRA adapters that are switched, a frozen head
    client.py       local training: adapter in, adapter out
    server.py       one rule: clients' adapters in, what every client starts from next out
    compare.py      all rules through the same rounds
    records.py      settings.json, metrics.jsonl, summary.json
    table.py        the table at the end
    report.py       report.html from those files, with the figures of charts.py
"""

import os

# Read by huggingface_hub when it is imported: models come from the disk, never from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
