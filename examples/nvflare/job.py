"""An NVFlare job of two sites of different ranks, simulated: python examples/nvflare/job.py OUT."""

import os
import sys
from pathlib import Path

from nvflare.app_opt.pt.recipes import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv

from fedlora_kernels.interop.nvflare import LoraAggregator

out = Path(sys.argv[1]).absolute()
os.chdir(Path(__file__).parent)
recipe = FedAvgRecipe(
    name="lora",
    model={"class_path": "task.InitialAdapter", "args": {}},
    min_clients=2,
    num_rounds=2,
    train_script="client.py",
    aggregator=LoraAggregator(rule="florist", rule_options={"energy": 0.9}),
    server_expected_format=ExchangeFormat.PYTORCH,
)
run = recipe.execute(SimEnv(num_clients=2, workspace_root=str(out)))
print("written to", run.get_result())
