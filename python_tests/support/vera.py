"""Three clients that trained VeRA: W += diag(lambda_b) B diag(lambda_d) A, B and A frozen."""

from typing import Any

import torch

import fedlora_kernels as flk

VERA_A, VERA_B = "base_model.vera_A", "base_model.vera_B"
M, N, RANK = 11, 19, 5


def vera_state(k: int, projections: bool = True) -> dict[str, torch.Tensor]:
    common = torch.Generator().manual_seed(77)
    own = torch.Generator().manual_seed(k)
    tensors = {}
    for module in ("layers.0.q", "layers.1.q"):
        tensors[f"base_model.model.{module}.vera_lambda_b"] = torch.randn(M, generator=own)
        tensors[f"base_model.model.{module}.vera_lambda_d"] = torch.randn(RANK, generator=own)
    if projections:
        tensors[VERA_A] = torch.randn(RANK, N, generator=common)
        tensors[VERA_B] = torch.randn(M, RANK, generator=common)
    return tensors


def vera_config(**changes: Any) -> dict[str, Any]:
    fields = {
        "peft_type": "VERA",
        "base_model_name_or_path": "a-base-model",
        "r": RANK,
        "target_modules": ["q"],
        "projection_prng_key": 3,
        "save_projection": True,
    }
    return {**fields, **changes}


def vera_clients(projections: bool = True) -> list[flk.Adapter]:
    config = vera_config(save_projection=projections)
    return [
        flk.Adapter.from_state_dict(vera_state(k, projections), config, name=f"site-{k}")
        for k in range(3)
    ]
