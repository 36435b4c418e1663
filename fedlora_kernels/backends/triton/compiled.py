"""How torch.compile sees the kernels: as Triton kernels that it schedules, not as closed operators.

``torch.library.triton_op`` does this for operators that it declares itself. Ours are declared once,
for all backends, so the same three steps are taken here. Lists stay closed operators: a traced
graph has no addresses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from fedlora_kernels.backends.triton.runtime import interpreted


def traceable(kernel: Any) -> Any:
    """The kernel as it is launched: what tracing records, or itself where it is interpreted, which
    torch before 2.13 does not wrap.
    """
    return kernel if interpreted() else wrap_triton(kernel)


def open_up(name: str, launch: Callable[..., Any], kernels: list[Any]) -> None:
    """Let tracing replace ``fedlora::<name>`` on a GPU by what ``launch`` calls.

    A torch without these internals keeps the operator closed, which is right and a little slower.
    """
    try:
        from torch._library.triton import triton_ops_to_kernels
        from torch._subclasses.functional_tensor import FunctionalTensorMode
        from torch.export._trace import custom_triton_ops_decomposition_disabled
    except ImportError:
        return

    def decompose(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        on_gpu = isinstance(args[0], Tensor) and args[0].device.type != "cpu"
        if not on_gpu or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return launch(*args, **kwargs)

    torch.library.register_torch_dispatch(f"fedlora::{name}", FunctionalTensorMode, decompose)
    # The source of these becomes part of the key under which compiled graphs are cached.
    triton_ops_to_kernels[f"fedlora::{name}"] = kernels
