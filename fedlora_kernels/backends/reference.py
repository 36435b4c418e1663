"""``reference``: the specification itself behind the operators, to compare other backends with."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from fedlora_kernels.backends.base import Backend
from fedlora_kernels.backends.solver import Problem, Step

if TYPE_CHECKING:
    from fedlora_kernels.ops.operator import Operators


class Reference(Backend):
    """The operators' specifications, dense and in float64; list forms stack first."""

    name = "reference"
    only_forced = True

    def look(self) -> tuple[bool, str]:
        """It needs torch and nothing else."""
        if find_spec("torch") is None:
            return False, "torch is not installed"
        return True, "float64 torch, the specification; slow"

    def solvers(self, problem: Problem, device: str) -> tuple[Step, ...]:
        """The SVD of the dense update, whatever the problem."""
        return (Step("torch.linalg.svd of the dense update", (1, None), "the only one"),)

    def activate(self, operators: "Operators") -> None:
        """Register the specification for every device."""
        for operator in operators.values():
            specified = operator.reference or operator.composed
            operator.implement(specified, "CompositeExplicitAutograd")
