"""Correct, fast aggregation of LoRA adapters for federated fine-tuning servers.

    import fedlora_kernels as flk

    clients = [flk.Adapter.load(path) for path in paths]
    result = flk.aggregate(clients, rule="florist", energy=0.9, weights=[120, 80, 300])
    result.adapter.save("global/")

Importing the package registers the operators ``torch.ops.fedlora.*``. Without torch the import
still succeeds; the names that need torch then raise an ImportError that says so.
"""

from typing import TYPE_CHECKING

from fedlora_kernels import rules
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.backend import Backend, backend, backends
from fedlora_kernels.rules import Rule

try:
    import torch as _torch  # noqa: F401 - only asked for
except ImportError:
    _HAS_TORCH = False
else:
    _HAS_TORCH = True

if TYPE_CHECKING or _HAS_TORCH:
    from fedlora_kernels import ops  # registers torch.ops.fedlora
    from fedlora_kernels._aggregate import aggregate
    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels._delivery import Delivery
    from fedlora_kernels._inspect import Inspection, inspect
    from fedlora_kernels._round import Round
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.adapters.factors import Factors
    from fedlora_kernels.gram_space.report import ModuleReport, Report

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterError",
    "Aggregation",
    "Backend",
    "Delivery",
    "Factors",
    "Inspection",
    "ModuleReport",
    "Report",
    "Round",
    "Rule",
    "aggregate",
    "backend",
    "backends",
    "inspect",
    "ops",
    "rules",
]


def __getattr__(name: str) -> object:
    """Names that need torch, asked for where torch is missing."""
    if name in __all__:
        raise ImportError(f"fedlora_kernels.{name} needs torch, which is not installed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
