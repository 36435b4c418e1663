"""The compiled backends: libraries that register kernels for one of torch's dispatch keys.

Other devices, and tracing, have the composed operators and the fakes.
"""

from fedlora_kernels.backends import libraries
from fedlora_kernels.backends.base import Backend
from fedlora_kernels.backends.solver import Problem, Step


class Compiled(Backend):
    """The kernels of a compiled library.

    Args:
        name: the backend's.
        library: the library's; the file is ``lib<library>.so``.
        what: what to say where it can be used.
        needs_gpu: whether its kernels run on an NVIDIA GPU; tensors on the CPU are then left to
            ``cpu``.
        only_forced: see :class:`Backend`.
    """

    def __init__(
        self,
        name: str,
        library: str,
        what: str,
        *,
        needs_gpu: bool = False,
        only_forced: bool = False,
    ) -> None:
        self.name = name
        self.library = library
        self.what = what
        self.needs_gpu = self.leaves_cpu = needs_gpu
        self.only_forced = only_forced

    def look(self) -> tuple[bool, str]:
        """Whether the library is there with what it needs; only :meth:`load` opens it."""
        if why := libraries.missing(self.library):
            return False, why
        if self.needs_gpu:
            import torch

            if not torch.cuda.is_available():
                return False, "torch finds no NVIDIA GPU"
        return True, self.what

    def handles(self, device: str) -> bool:
        """Whether the kernels run there."""
        return device == ("cuda" if self.needs_gpu else "cpu")

    def solvers(self, problem: Problem, device: str) -> tuple[Step, ...]:
        """What the library answers, for the GPU that is named."""
        if not self.needs_gpu:
            return libraries.solvers(self.library, problem)
        import torch

        with torch.cuda.device(device):
            return libraries.solvers(self.library, problem)

    def load(self) -> None:
        """Open the library, which registers its kernels.

        Raises:
            ImportError: torch cannot be imported.
            OSError: the dynamic linker refuses the library.
        """
        try:
            libraries.load(self.library)
        except (ImportError, OSError) as error:
            reason = error.__cause__ or error
            raise OSError(f"lib{self.library}.so does not load: {reason}") from error
