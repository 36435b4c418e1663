"""The operators that read or write factors, as Triton kernels.

    gram, gram_list, combine, combine_list, weighted_sum, weighted_sum_list

For NVIDIA GPUs without the compiled library and for the GPUs of other vendors. The operators on
R x R matrices (spectrum, select_rank, client_products, surrogate) and those made of stages
(stacked_svd, flora_na) are composed of torch operators here; their stages are these kernels, by
``torch.ops.fedlora``.

``TRITON_INTERPRET=1`` runs the kernels' own source in numpy on a CPU: slow, and how they are tested
where there is no GPU.
"""

from typing import TYPE_CHECKING

from fedlora_kernels.backends.base import Backend
from fedlora_kernels.backends.triton.runtime import dispatch_keys, interpreted, release, serves

if TYPE_CHECKING:
    from fedlora_kernels.ops.operator import Operators

__all__ = ["Triton", "interpreted", "release", "serves"]


class Triton(Backend):
    """The kernels on the GPUs that torch has, or interpreted on the CPU, only where forced."""

    name = "triton"

    def __init__(self) -> None:
        self.only_forced = interpreted()
        self.leaves_cpu = not self.only_forced

    def look(self) -> tuple[bool, str]:
        """Whether Triton is there with a GPU or its interpreter."""
        return serves()

    def handles(self, device: str) -> bool:
        """Whether the kernels run there: on torch's GPUs, or interpreted on the CPU."""
        return device != "cpu" or not self.leaves_cpu

    def activate(self, operators: "Operators") -> None:
        """Put the kernels behind ``torch.ops.fedlora`` for this process's devices."""
        super().activate(operators)

        from fedlora_kernels.backends.triton import combine, gram, weighted_sum
        from fedlora_kernels.backends.triton.compiled import open_up
        from fedlora_kernels.backends.triton.device import on_device

        for stage in (gram, combine, weighted_sum):
            for name, launch in stage.OPERATORS.items():
                for key in dispatch_keys():
                    operators[name].implement(on_device(launch), key)
                if not interpreted() and not name.endswith("_list"):
                    open_up(name, launch, stage.KERNELS)
