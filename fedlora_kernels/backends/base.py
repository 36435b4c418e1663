"""What a backend is: its name, what it needs, and which operators it implements."""

from functools import cached_property
from typing import TYPE_CHECKING

from fedlora_kernels.backends.solver import Problem, Step, composed_solvers

if TYPE_CHECKING:
    from fedlora_kernels.ops.operator import Operators


class Backend:
    """One implementation of the operators.

    A subclass says in :meth:`look` whether it can be used, and in :meth:`activate` which operators
    it implements for which of torch's dispatch keys. Its module must be importable without torch.
    """

    name: str
    """as ``FEDLORA_BACKEND`` and :func:`fedlora_kernels.backend` have it"""
    only_forced = False
    """whether the backend is chosen by ``FEDLORA_BACKEND`` alone, never by itself"""
    leaves_cpu = False
    """whether the backend leaves tensors on the CPU to the compiled backend ``cpu``"""

    def look(self) -> tuple[bool, str]:
        """Whether this process can use the backend, and why or why not; nothing is loaded."""
        raise NotImplementedError

    def load(self) -> None:
        """Load what the backend needs beyond Python modules.

        Raises:
            ImportError: a module is missing.
            OSError: a library cannot be loaded.
        """

    def activate(self, operators: "Operators") -> None:
        """Put the implementations behind ``torch.ops.fedlora``: those from torch operators, for
        every device that the backend has no kernels for.
        """
        for operator in operators.values():
            operator.implement(operator.composed, "CompositeExplicitAutograd")

    def handles(self, device: str) -> bool:
        """Whether tensors on torch's device "cpu", "cuda" and so on are this backend's own."""
        return True

    def solvers(self, problem: Problem, device: str) -> tuple[Step, ...]:
        """What finds a module's singular values on a device such as "cuda:0", in order."""
        return composed_solvers(problem)

    @property
    def serves(self) -> bool:
        """Whether this process can use the backend."""
        return self._verdict[0]

    @property
    def reason(self) -> str:
        """Why this process can or cannot use the backend."""
        return self._verdict[1]

    def start(self) -> bool:
        """Load the backend if it can be used; whether that worked (:attr:`reason` says why)."""
        if self.serves:
            try:
                self.load()
            except (ImportError, OSError) as error:
                self._verdict = False, str(error)
        return self.serves

    @cached_property
    def _verdict(self) -> tuple[bool, str]:
        return self.look()
