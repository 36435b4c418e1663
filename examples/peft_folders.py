"""Aggregate the PEFT folders of several clients: python examples/peft_folders.py OUT CLIENT..."""

import sys

import fedlora_kernels as flk

out, *folders = sys.argv[1:]
clients = [flk.Adapter.load(folder) for folder in folders]
result = flk.aggregate(clients, rule="florist", energy=0.9)
result.adapter.save(out)
for module, row in result.report.items():
    print(f"{module}: rank {row.rank}, relative error {row.relative_error:.3f}")
