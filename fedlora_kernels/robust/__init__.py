"""The robust rules: weights that bound what some of the clients can do to any rule's result.

    flk.aggregate(clients, rule="florist", robust="krum")
    flk.aggregate(clients, rule="florist", robust=flk.robust.Krum(attackers=2))

This package reads its own folder: ``robust/<name>.py`` is the robust rule of that name.
"""

from typing import TYPE_CHECKING, Any

from fedlora_kernels._options import Registry
from fedlora_kernels.robust._robust import ClientWeight, Robust, Weighing

registry = Registry(Robust, __name__, __path__, order=lambda kind: (kind.published, kind.name))
"""the robust rules by name, in the order in which they were published"""

globals().update({kind.__name__: kind for kind in registry.kinds.values()})

__all__ = ["ClientWeight", "Robust", "Weighing", "find", "make", "names", "registry"]
__all__ += [kind.__name__ for kind in registry.kinds.values()]

names, find, make = registry.names, registry.find, registry.make


if TYPE_CHECKING:  # what the folder holds is known when it is read

    def __getattr__(name: str) -> Any: ...
