"""The operators inside a compiled torch function, for any number of layers.

python examples/torch_compile.py
"""

import torch

import fedlora_kernels.ops as ops


@torch.compile(fullgraph=True, dynamic=True)
def florist(
    b: torch.Tensor, a: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The combined update of every layer, and its rank."""
    b_g, a_g, _, ranks = ops.stacked_svd(b, a, scale, 0.9)
    return b_g @ a_g, ranks


generator = torch.Generator().manual_seed(0)
for layers in (2, 5):
    # Two clients of rank 8, side by side: b [layers, m, 16] and a [layers, 16, n].
    b = torch.randn(layers, 64, 16, generator=generator)
    a = torch.randn(layers, 16, 48, generator=generator)
    scale = torch.full((layers, 16), 0.5)
    update, ranks = florist(b, a, scale)
    ideal = (b * scale[:, None, :]) @ a
    error = (update - ideal).norm(dim=(1, 2)) / ideal.norm(dim=(1, 2))
    print(f"{layers} layers: ranks {ranks.tolist()}, largest relative error {error.max():.4f}")
