"""``composed``: every operator from torch operators, on any device, without a compiler."""

from importlib.util import find_spec

from fedlora_kernels.backends.base import Backend


class Composed(Backend):
    """The operators' own implementations from torch operators."""

    name = "composed"

    def look(self) -> tuple[bool, str]:
        """It needs torch and nothing else."""
        if find_spec("torch") is None:
            return False, "torch is not installed"
        return True, "torch operators, on any device"
