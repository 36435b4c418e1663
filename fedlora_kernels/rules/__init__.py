"""The aggregation rules, one file each; this is their registry."""

import sys
from types import ModuleType

from fedlora_kernels.rules import (
    fedex,
    fedit,
    fedsa,
    ffa,
    flexlora,
    flora,
    flora_na,
    florist,
    hetlora,
)
from fedlora_kernels.rules.rule import Rule

__all__ = ["Rule", "rules"]

_RULES = {
    module.RULE.name: module.RULE
    for module in (fedit, ffa, fedsa, flora, flexlora, florist, flora_na, hetlora, fedex)
}


def rules() -> dict[str, Rule]:
    """All rules by name, in the order of the README's table."""
    return dict(_RULES)


class _Registry(ModuleType):
    """This package, called as the function that it is beside."""

    def __call__(self) -> dict[str, Rule]:
        return rules()


sys.modules[__name__].__class__ = _Registry
