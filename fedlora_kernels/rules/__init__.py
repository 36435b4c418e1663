"""The aggregation rules: one file, one frozen dataclass each, whose fields are its options.

    flk.aggregate(clients, rule="florist", energy=0.9)
    flk.aggregate(clients, rule=flk.rules.FLoRIST(energy=0.9))

This package reads its own folder: ``rules/<name>.py`` is the rule of that name. torch is imported
when a rule computes, not before.
"""

from typing import TYPE_CHECKING, Any

from fedlora_kernels._options import Registry
from fedlora_kernels.rules._rule import Option, Rule, option

registry = Registry(Rule, __name__, __path__, order=lambda kind: kind.published or kind.paper)
"""the rules by name, in the order in which they were published"""

globals().update({kind.__name__: kind for kind in registry.kinds.values()})

__all__ = ["Option", "Rule", "find", "make", "names", "option", "preferred", "registry"]
__all__ += [kind.__name__ for kind in registry.kinds.values()]

names, find, make = registry.names, registry.find, registry.make


if TYPE_CHECKING:  # what the folder holds is known when it is read

    def __getattr__(name: str) -> Any: ...


def preferred() -> str:
    """The rule that the command line takes where none is named."""
    return next(name for name, kind in registry.kinds.items() if kind.preferred)
