"""Shapes: the linear layers of real models and the ranks of real federations.

A weight is m x n = out x in. Grouped-query attention makes k_proj and v_proj narrow, the MLP makes
the longest sides.
"""

from dataclasses import dataclass, replace

import torch

MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "TinyLlama-1.1B": {
        "q_proj": (2048, 2048),
        "v_proj": (256, 2048),
        "up_proj": (5632, 2048),
        "down_proj": (2048, 5632),
    },
    "Llama-3.2-1B": {
        "q_proj": (2048, 2048),
        "v_proj": (512, 2048),
        "up_proj": (8192, 2048),
        "down_proj": (2048, 8192),
    },
    "Llama-2-7B": {
        "q_proj": (4096, 4096),
        "v_proj": (4096, 4096),
        "up_proj": (11008, 4096),
        "down_proj": (4096, 11008),
    },
    "Llama-3-8B": {
        "q_proj": (4096, 4096),
        "v_proj": (1024, 4096),
        "up_proj": (14336, 4096),
        "down_proj": (4096, 14336),
    },
    "RoBERTa-large": {
        "query": (1024, 1024),
        "value": (1024, 1024),
        "intermediate": (4096, 1024),
        "output": (1024, 4096),
    },
    "all-MiniLM-L6-v2": {
        "query": (384, 384),
        "value": (384, 384),
    },
}
"""model -> module -> (m, n), from the models' published configurations."""

LAYERS = {
    "TinyLlama-1.1B": 22,
    "Llama-3.2-1B": 16,
    "Llama-2-7B": 32,
    "Llama-3-8B": 32,
    "RoBERTa-large": 24,
    "all-MiniLM-L6-v2": 6,
}
"""How many modules of each kind a model has."""

FLORIST_RANKS = (64, 32, 16, 16, 8, 8, 4, 4)
"""The eight heterogeneous clients of FLoRIST (arXiv 2506.09199, section 5)."""

NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True)
class Case:
    """L modules of one shape from K clients, and how their factors are drawn."""

    model: str
    module: str
    ranks: tuple[int, ...]
    modules: int
    """L: as many layers as are measured together"""
    dtype: torch.dtype = torch.float32
    family: str = "shared_start"
    seed: int = 0
    size: tuple[int, int] | None = None
    """(m, n) where it is not a model's"""
    beside: tuple[str, ...] = ()
    """more kinds of modules in the same round, as many layers of each"""

    @property
    def parts(self) -> "tuple[Case, ...]":
        """One case per kind of module, with factors of their own."""
        kinds = (self.module, *self.beside)
        return tuple(
            replace(self, module=kind, beside=(), seed=self.seed + index)
            for index, kind in enumerate(kinds)
        )

    @property
    def kinds(self) -> str:
        """q_proj + v_proj"""
        return " + ".join((self.module, *self.beside))

    @property
    def m(self) -> int:
        """Rows of the weight."""
        return (self.size or MODELS[self.model][self.module])[0]

    @property
    def n(self) -> int:
        """Columns of the weight."""
        return (self.size or MODELS[self.model][self.module])[1]

    @property
    def clients(self) -> int:
        """K."""
        return len(self.ranks)

    @property
    def stacked_rank(self) -> int:
        """R."""
        return sum(self.ranks)

    @property
    def rank_text(self) -> str:
        """8 x 16, or the ranks themselves where they differ."""
        if len(set(self.ranks)) == 1:
            return f"{self.clients} x {self.ranks[0]}"
        return ",".join(str(rank) for rank in self.ranks)

    def __str__(self) -> str:
        sizes = dict.fromkeys(f"{part.m}x{part.n}" for part in self.parts)
        text = (
            f"{self.model} {self.kinds} {self.modules} x {' + '.join(sizes)}, "
            f"{self.rank_text}, {NAMES[self.dtype]}"
        )
        return text if self.family == "shared_start" else f"{text}, {self.family}"


def equal(clients: int, rank: int) -> tuple[int, ...]:
    """K clients of one rank."""
    return (rank,) * clients
