"""Peers: what a user would run instead, written as published code writes it.

Module by module through ``torch.linalg`` in the factors' own dtype, on the clients' tensors. Every
function returns one pair (B_g [m,p], A_g [p,n]) per module with all scalings inside.
"""

from collections.abc import Sequence
from functools import reduce
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlora_kernels.bench.correctness import Pair
from fedlora_kernels.bench.inputs import Stacks

Array = npt.NDArray[np.floating[Any]]

THREE_SVDS = "FLoRIST, arXiv 2506.09199, algorithm 1 (released code: torch.linalg.svd three times)"
QR_CORE = "NVIDIA FLARE HLoRA aggregator: QR of both stacks, SVD of the core"
DENSE_SVD = "FlexLoRA, arXiv 2402.11505: SVD of the dense update"
LOWRANK = "torch.svd_lowrank (Halko et al., arXiv 0909.4061) on the dense update"
PEFT_SVD = "peft add_weighted_adapter(combination_type='svd')"
PEFT_CAT = "peft add_weighted_adapter(combination_type='cat')"
FLOWER = "Flower flwr.server.strategy.aggregate: numpy sums, as FedIT (arXiv 2305.05644) runs it"
ADAM = "FLoRA-NA, arXiv 2509.26399: p and q by gradient descent on the dense objective"


def three_svds(stacks: Stacks, energy: float, max_rank: int | None) -> list[Pair]:
    """B = U_B S_B V_B^T, A = U_A S_A V_A^T, core S_B V_B^T U_A S_A = U S V^T, cut at p.

    B_g = U_B U_p S_p, A_g = V_p^T V_A^T; weights and scalings are on the A side.
    """
    pairs = []
    for module in range(stacks.case.modules):
        b, a = _stacked(stacks, module)
        left_b, values_b, right_b = torch.linalg.svd(b, full_matrices=False)
        left_a, values_a, right_a = torch.linalg.svd(a, full_matrices=False)
        core = values_b[:, None] * (right_b @ left_a) * values_a
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        p = _rank(values, energy, max_rank)
        pairs.append((left_b @ (left[:, :p] * values[:p]), right[:p] @ right_a))
    return pairs


def qr_core(stacks: Stacks, energy: float, max_rank: int | None) -> list[Pair]:
    """B = Q_B R_B, (D A)^T = Q_A R_A, core R_B R_A^T = U S V^T, cut at p."""
    return [
        qr_factors(*_stacked(stacks, module), energy, max_rank)
        for module in range(stacks.case.modules)
    ]


def qr_factors(b: Tensor, a: Tensor, energy: float, max_rank: int | None) -> Pair:
    """The same of one module's stacks B and D A."""
    basis_b, upper_b = torch.linalg.qr(b)
    basis_a, upper_a = torch.linalg.qr(a.mT)
    left, values, right = torch.linalg.svd(upper_b @ upper_a.mT, full_matrices=False)
    p = _rank(values, energy, max_rank)
    return basis_b @ (left[:, :p] * values[:p]), right[:p] @ basis_a.mT


def dense_svd(stacks: Stacks, energy: float, max_rank: int | None) -> list[Pair]:
    """dW = sum_k w_k s_k B_k A_k = U S V^T, cut at p."""
    pairs = []
    for module in range(stacks.case.modules):
        left, values, right = torch.linalg.svd(_dense(stacks, module), full_matrices=False)
        p = _rank(values, energy, max_rank)
        pairs.append((left[:, :p] * values[:p], right[:p]))
    return pairs


def svd_lowrank(stacks: Stacks, rank: int) -> list[Pair]:
    """A randomised SVD of the dense update at a fixed rank, with torch's two power iterations."""
    pairs = []
    for module in range(stacks.case.modules):
        left, values, right = torch.svd_lowrank(_dense(stacks, module), q=rank)
        pairs.append((left * values, right.mT))
    return pairs


def flower_average(
    clients: Sequence[Sequence[Array]], examples: Sequence[float]
) -> list[npt.NDArray[Any]]:
    """sum_k w_k x_k for each of a client's arrays: multiply all, add pairwise, divide once."""
    weighted = [
        [array * number for array in arrays]
        for arrays, number in zip(clients, examples, strict=True)
    ]
    total = sum(examples)
    return [reduce(np.add, layer) / total for layer in zip(*weighted, strict=True)]


def numpy_selection(sigma: Array, energy: float, max_rank: int) -> list[int]:
    """Ranks module by module from numpy cumulative sums, as released code selects them."""
    ranks = []
    for values in sigma:
        cumulative = np.cumsum(values**2)
        reached = np.searchsorted(cumulative, energy * cumulative[-1])
        ranks.append(min(int(reached) + 1, max_rank))
    return ranks


def two_roots(gram_b: Tensor, gram_a: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Left coefficients and singular values per module from two eigh and one SVD of the core."""
    found = []
    for b, a, diagonal in zip(gram_b, gram_a, scale, strict=True):
        values_b, vectors_b = torch.linalg.eigh(b)
        values_a, vectors_a = torch.linalg.eigh(a)
        root_b = values_b.clamp_min(0).sqrt()[:, None] * vectors_b.mT
        root_a = values_a.clamp_min(0).sqrt()[:, None] * vectors_a.mT
        _, sigma, right = torch.linalg.svd((root_b * diagonal) @ root_a.mT)
        found.append((diagonal[:, None] * (root_a.mT @ right.mT), sigma))
    return found


def product_eigenvalues(gram_b: Tensor, gram_a: Tensor, scale: Tensor) -> list[Tensor]:
    """sigma^2 per module as the eigenvalues of G_B D G_A D, which is not symmetric."""
    return [
        torch.linalg.eigvals(b @ (diagonal[:, None] * a * diagonal)).real.sort(descending=True)[0]
        for b, a, diagonal in zip(gram_b, gram_a, scale, strict=True)
    ]


def adam(stacks: Stacks, rate: float, steps: int) -> tuple[Tensor, Tensor]:
    """p, q [L,K] after ``steps`` of Adam on ||dW - (sum q_u s_u B_u)(sum p_v A_v)||^2 / ||dW||^2.

    Starts at p = q = w, in the factors' dtype, one module after the other.
    """
    found_p, found_q = [], []
    for module in range(stacks.case.modules):
        target = _dense(stacks, module)
        blocks_b = torch.stack(stacks.client_b[module]).flatten(1)
        blocks_a = torch.stack(stacks.client_a[module]).flatten(1)
        blocks_b = blocks_b * stacks.scalings[module, :, None].to(blocks_b.dtype)
        shape_b, shape_a = stacks.client_b[module][0].shape, stacks.client_a[module][0].shape
        size = target.square().sum()
        weights = stacks.weights.to(target.dtype)
        p, q = weights.clone().requires_grad_(), weights.clone().requires_grad_()
        optimiser = torch.optim.Adam([p, q], lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            product = (q @ blocks_b).view(shape_b) @ (p @ blocks_a).view(shape_a)
            loss = (target - product).square().sum() / size
            loss.backward()
            optimiser.step()
        found_p.append(p.detach().double())
        found_q.append(q.detach().double())
    return torch.stack(found_p), torch.stack(found_q)


def has_peft() -> bool:
    """Whether the real PEFT can be measured beside us (the extra ``bench`` installs it)."""
    return find_spec("peft") is not None


class PeftModel:
    """A model of L linear layers that holds all clients' adapters, as PEFT merges them.

    Building it is not timed; ``add_weighted_adapter`` is.
    """

    MERGED = "merged"

    def __init__(self, stacks: Stacks) -> None:
        from peft import LoraConfig, get_peft_model

        case = stacks.case
        layers = [
            torch.nn.utils.skip_init(
                torch.nn.Linear, case.n, case.m, bias=False, device=stacks.b.device
            )
            for _ in range(case.modules)
        ]
        base = torch.nn.Module()
        base.layers = torch.nn.ModuleList(layers)
        self.names = [f"client{k}" for k in range(case.clients)]
        self.weights = stacks.weights.tolist()
        self.model: Any = None
        for k, (name, rank) in enumerate(zip(self.names, case.ranks, strict=True)):
            alpha = float(stacks.scalings[0, k]) * rank
            config = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=[str(i) for i in range(len(layers))]
            )
            if self.model is None:
                self.model = get_peft_model(base, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
        self.layers = self.model.base_model.model.layers
        for module, layer in enumerate(self.layers):
            for k, name in enumerate(self.names):
                layer.lora_B[name].weight.data = stacks.client_b[module][k].float()
                layer.lora_A[name].weight.data = stacks.client_a[module][k].float()

    def forget(self) -> None:
        """Remove the last result: PEFT returns at once where the name exists."""
        if self.MERGED in self.model.peft_config:
            self.model.delete_adapter(self.MERGED)

    def merge(self, combination: str, rank: int | None = None) -> list[Pair]:
        """``add_weighted_adapter`` with PEFT's defaults; ``rank`` is svd_rank."""
        self.model.base_model.add_weighted_adapter(
            self.names,
            self.weights,
            self.MERGED,
            combination_type=combination,
            svd_rank=rank,
        )
        return [
            (
                layer.lora_B[self.MERGED].weight.data * layer.scaling[self.MERGED],
                layer.lora_A[self.MERGED].weight.data,
            )
            for layer in self.layers
        ]


def _stacked(stacks: Stacks, module: int) -> Pair:
    """[B_1 | ... | B_K] and D [A_1 ; ... ; A_K] of one module."""
    scaled = stacks.scale[module, :, None].to(stacks.a.dtype) * stacks.a[module]
    return stacks.b[module], scaled


def _dense(stacks: Stacks, module: int) -> Tensor:
    """sum_k w_k s_k B_k A_k, client by client, in the factors' dtype."""
    factors = (stacks.weights * stacks.scalings[module]).tolist()
    clients = zip(stacks.client_b[module], stacks.client_a[module], factors, strict=True)
    return torch.stack([factor * (b @ a) for b, a, factor in clients]).sum(dim=0)


def _rank(values: Tensor, energy: float, max_rank: int | None) -> int:
    """The smallest p whose squared singular values hold the share ``energy``."""
    cumulative = values.square().cumsum(0)
    p = int(torch.searchsorted(cumulative, energy * cumulative[-1])) + 1
    return min(p, len(values), max_rank or len(values))
