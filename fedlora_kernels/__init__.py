"""Correct, fast aggregation of LoRA adapters for federated fine-tuning servers.

    import fedlora_kernels as flk

    clients = [flk.Adapter.load(path) for path in paths]
    result = flk.aggregate(clients, rule="florist", energy=0.9, weights=[120, 80, 300])
    result.adapter.save("global/")

Importing the package registers the operators ``torch.ops.fedlora.*``. Without torch the import
still succeeds; the names that need torch then raise an ImportError that says so.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fedlora_kernels.backend import Backend, backend, backends

if TYPE_CHECKING:
    from fedlora_kernels.adapter import Adapter, AdapterError, Factors
    from fedlora_kernels.aggregate import Aggregation, aggregate
    from fedlora_kernels.report import ModuleReport, Report
    from fedlora_kernels.rules import Rule, rules

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterError",
    "Aggregation",
    "Backend",
    "Factors",
    "ModuleReport",
    "Report",
    "Rule",
    "aggregate",
    "backend",
    "backends",
    "rules",
]

_HOMES = {
    "Adapter": "adapter",
    "AdapterError": "adapter",
    "Factors": "adapter",
    "Aggregation": "aggregate",
    "aggregate": "aggregate",
    "ModuleReport": "report",
    "Report": "report",
    "Rule": "rules",
    "rules": "rules",
}

if find_spec("torch") is not None:
    import fedlora_kernels.ops  # registers torch.ops.fedlora
    from fedlora_kernels.adapter import Adapter, AdapterError, Factors
    from fedlora_kernels.aggregate import Aggregation, aggregate
    from fedlora_kernels.report import ModuleReport, Report
    from fedlora_kernels.rules import Rule, rules


def __getattr__(name: str) -> object:
    """Names that need torch, asked for where torch is missing."""
    if name in _HOMES:
        raise ImportError(f"fedlora_kernels.{name} needs torch, which is not installed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
