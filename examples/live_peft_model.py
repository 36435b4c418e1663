"""Combine the adapters of a live PEFT model, and put an aggregate in the place of one of them."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fedlora_kernels as flk
from fedlora_kernels.interop.peft import add_weighted_adapter, hotswap

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
model = get_peft_model(base, LoraConfig(r=8, target_modules=["0", "2"]), "berlin")
model.add_adapter("rome", LoraConfig(r=4, use_rslora=True, target_modules=["0", "2"]))
for name, parameter in model.named_parameters():  # as if both had been trained
    if "lora_B" in name:
        nn.init.normal_(parameter, std=0.1)

add_weighted_adapter(model, ["berlin", "rome"], [0.7, -0.2], "mixed", combination_type="svd")
model.set_adapter("mixed")
print("mixed:", model(torch.ones(1, 64)).norm().item())

clients = [flk.Adapter.from_model(model, name, name=name) for name in ("berlin", "rome")]
hotswap(model, flk.aggregate(clients, rule="florist", max_rank=8).adapter, "berlin")
model.set_adapter("berlin")
print("aggregate:", model(torch.ones(1, 64)).norm().item())
