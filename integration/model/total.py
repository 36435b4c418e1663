"""Several adapters on one base as a single adapter: the sum of their updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import fedlora_kernels as flk
from fedlora_kernels import ops
from fedlora_kernels.adapters import peft_format


def total(adapters: Sequence[flk.Adapter]) -> flk.Adapter:
    """sum_i s_i B_i A_i = [s_1 B_1 | s_2 B_2 | ...] [A_1 ; A_2 ; ...], of scaling 1.

    A stack wider than min(m, n) is written in that rank, by its singular values. One adapter is
    returned as it is; the tensors beside the factors are the last one's.
    """
    if len(adapters) == 1:
        return adapters[0]
    factors: dict[str, flk.Factors] = {}
    for module in sorted({name for adapter in adapters for name in adapter.factors}):
        parts = [adapter.factors[module] for adapter in adapters if module in adapter.factors]
        b = torch.cat([(part.scaling * part.b.double()).to(part.b) for part in parts], dim=1)
        a = torch.cat([part.a for part in parts], dim=0)
        most = min(b.shape[0], a.shape[1])
        if a.shape[0] > most:
            scale = torch.ones(1, a.shape[0], dtype=torch.float64, device=a.device)
            wide_b, wide_a, _, _ = ops.stacked_svd(b[None], a[None], scale, 1.0, most)
            b, a = wide_b[0].to(b), wide_a[0].to(a)
        factors[module] = flk.Factors(b, a, 1.0, parts[-1].kind)
    config = peft_format.result_config(
        adapters[-1].config,
        {name: item.rank for name, item in factors.items()},
        dict.fromkeys(factors, 1.0),
        rslora=False,
        targets=list(factors),
    )
    return flk.Adapter(factors, config, extras=adapters[-1].extras)
