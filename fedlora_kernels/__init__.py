"""Correct, fast aggregation of LoRA adapters for federated fine-tuning servers.

    import fedlora_kernels as flk

    clients = [flk.Adapter.load(path) for path in paths]
    result = flk.aggregate(clients, rule="florist", energy=0.9, weights=[120, 80, 300])
    result.adapter.save("global/")

Importing the package registers the operators ``torch.ops.fedlora.*`` where torch is imported
already; otherwise the first use of a name that needs torch does, or ``import fedlora_kernels.ops``.
Without torch the import still succeeds; the names that need torch then raise an ImportError that
says so.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora_kernels import backends, ops, robust, rules
    from fedlora_kernels._aggregate import aggregate
    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels._delivery import Delivery
    from fedlora_kernels._inspect import Inspection, inspect
    from fedlora_kernels._merge import Merged, merge
    from fedlora_kernels._round import Round
    from fedlora_kernels._solvers import Solvers, solvers
    from fedlora_kernels._stream import Stream
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.adapters.error import AdapterError
    from fedlora_kernels.adapters.factors import Factors
    from fedlora_kernels.backends import Backend, backend
    from fedlora_kernels.gram_space.report import ModuleReport, Report
    from fedlora_kernels.robust import Robust, Weighing
    from fedlora_kernels.rules import Rule

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterError",
    "Aggregation",
    "Backend",
    "Delivery",
    "Factors",
    "Inspection",
    "Merged",
    "ModuleReport",
    "Report",
    "Robust",
    "Round",
    "Rule",
    "Solvers",
    "Stream",
    "Weighing",
    "aggregate",
    "backend",
    "backends",
    "inspect",
    "merge",
    "ops",
    "robust",
    "rules",
    "solvers",
]

# Public name -> the module that has it; a module's own name stands for the module.
_WHERE = {
    "Adapter": "adapters.adapter",
    "AdapterError": "adapters.error",
    "Aggregation": "_aggregation",
    "Backend": "backends",
    "Delivery": "_delivery",
    "Factors": "adapters.factors",
    "Inspection": "_inspect",
    "Merged": "_merge",
    "ModuleReport": "gram_space.report",
    "Report": "gram_space.report",
    "Robust": "robust",
    "Round": "_round",
    "Rule": "rules",
    "Solvers": "_solvers",
    "Stream": "_stream",
    "Weighing": "robust",
    "aggregate": "_aggregate",
    "backend": "backends",
    "backends": "backends",
    "inspect": "_inspect",
    "merge": "_merge",
    "ops": "ops",
    "robust": "robust",
    "rules": "rules",
    "solvers": "_solvers",
}


def __getattr__(name: str) -> object:
    """A public name, imported when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_WHERE[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = f"{__name__}.{name} needs torch, which is not installed"
        raise ImportError(message) from error
    value: object = module if name == _WHERE[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


if sys.modules.get("torch") is not None:
    import_module(f"{__name__}.ops")
