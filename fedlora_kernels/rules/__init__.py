"""The aggregation rules, one file each; this is their registry."""

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
