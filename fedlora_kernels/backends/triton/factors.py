"""Where the ranks of stacked factors lie: in one tensor, or in the clients' own tensors.

Every kernel reads tiles [depth, ranks] of a factor. In a stack a rank is a stride away from the
next. In a list each rank has an address of its own, so the kernels get a table: the address of each
rank's first element and the stride along the depth. Reading through it spares the copy that a stack
costs, which is one more read and one more write of everything the clients sent.

Addresses must not be frozen into a CUDA graph, so under capture lists are stacked first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora_kernels.backends.lists import stack
from fedlora_kernels.backends.triton import device

# A load of 16 bytes is the widest; rows that all start at a multiple of it can be read by such.
WIDEST = 16


@dataclass(frozen=True)
class Factors:
    """L modules of stacked factors: what a kernel reads them through.

    Attributes:
        source: the stack; of a list the first tensor, which says the type.
        table: of a list, int64 [2, L, R]: addresses and depth strides of all ranks; else source.
        modules: L.
        ranks: R.
        depth: d, the long dimension.
        strides: of module, rank and depth in a stack; in a list only the depth's counts, which is
            1 where all clients' is.
        listed: whether there is a table.
        unit: whether all depth strides of a table are 1.
        aligned: whether a table's ranks can be read 16 bytes at a time: along the depth where that
            is unit and all ranks start at multiples of 16 bytes, else across ranks where they come
            in runs of 16 bytes.
        keep: tensors that must live until the launch.
    """

    source: Tensor
    table: Tensor
    modules: int
    ranks: int
    depth: int
    strides: tuple[int, int, int]
    listed: bool = False
    unit: bool = False
    aligned: bool = False
    keep: tuple[Tensor, ...] = ()


def stacked(x: Tensor, rows: bool) -> Factors:
    """The factors of one tensor, [L,R,d] when ``rows``, else [L,d,R]."""
    x = device.legible(x)
    rank, depth = (1, 2) if rows else (2, 1)
    strides = (x.stride(0), x.stride(rank), x.stride(depth))
    return Factors(x, x, x.shape[0], x.shape[rank], x.shape[depth], strides)


def listed(tensors: Sequence[Tensor], modules: int, rows: bool) -> Factors:
    """The factors of clients' tensors, module-major, [r_k,d] when ``rows``, else [d,r_k].

    Raises:
        RuntimeError: the tensors lie on more than one device.
    """
    check_together(tensors)
    if captured(tensors[0]):
        return stacked(stack(tensors, modules, rows), rows)
    tensors = tuple(device.legible(tensor) for tensor in tensors)
    first = tensors[0]
    rank, depth = (0, 1) if rows else (1, 0)
    clients = len(tensors) // modules
    # What a client says once, [3, L, K]: address, bytes from rank to rank, stride along the depth.
    size = first.element_size()
    said = torch.tensor(
        [(t.data_ptr(), t.stride(rank) * size, t.stride(depth)) for t in tensors],
        dtype=torch.int64,
    )
    said = said.view(modules, clients, 3).movedim(2, 0)
    counts = torch.tensor([tensor.shape[rank] for tensor in tensors[:clients]])
    client = torch.repeat_interleave(counts)
    within = torch.arange(len(client)) - (counts.cumsum(0) - counts)[client]
    addresses, steps, strides = said[:, :, client]
    addresses = addresses + within * steps
    unit = bool((strides == 1).all())
    run = WIDEST // size
    if unit:
        aligned = not bool((addresses % WIDEST).any())
    else:
        whole = (counts % run == 0).all() & (steps == size).all()
        aligned = bool(whole & (said[0] % WIDEST == 0).all() & (strides % run == 0).all())
    return Factors(
        first,
        upload(torch.stack([addresses, strides]), first.device),
        modules,
        len(client),
        first.shape[depth],
        (0, 0, 1),
        listed=True,
        unit=unit,
        aligned=aligned,
        keep=tensors,
    )


def check_together(tensors: Sequence[Tensor]) -> None:
    """All tensors on one device: a kernel would follow an address of another one's memory.

    Raises:
        RuntimeError: they are not.
    """
    for index, tensor in enumerate(tensors):
        if tensor.device != tensors[0].device:
            raise RuntimeError(
                f"tensor {index} of a list must be on {tensors[0].device}, found {tensor.device}"
            )


def captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which must hold no addresses."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(table: Tensor, target: torch.device) -> Tensor:
    """A table on the device, without waiting for what the device is doing."""
    if target.type == "cpu":
        return table
    return table.pin_memory().to(target, non_blocking=True)


@triton.jit
def rank_starts(
    source,
    table,
    ranks,
    count,
    module,
    stride_module,
    stride_rank,
    LISTED: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """[1, len(ranks)] pointers to the first elements of a module's ranks, ``count`` in all."""
    if LISTED:
        addresses = tl.load(table + module * count + ranks, mask=ranks < count, other=0)
        starts = addresses.to(source.dtype)
        if ALIGNED:
            starts = tl.multiple_of(starts, 16)
            if not UNIT:
                starts = tl.max_contiguous(
                    starts, 128 // source.dtype.element_ty.primitive_bitwidth
                )
    else:
        starts = source + module * stride_module + ranks.to(tl.int64) * stride_rank
    return starts[None, :]


@triton.jit
def rank_steps(
    source,
    table,
    ranks,
    count,
    module,
    modules,
    stride_depth,
    LISTED: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The stride along the depth, [1, len(ranks)]; the second half of a table holds it."""
    if LISTED and not UNIT:
        strides = table + (modules + module) * count
        steps = tl.load(strides + ranks, mask=ranks < count, other=0)
        if ALIGNED:
            run: tl.constexpr = 128 // source.dtype.element_ty.primitive_bitwidth
            steps = tl.max_constancy(tl.multiple_of(steps, run), run)
        steps = steps[None, :]
    else:
        steps = stride_depth
    return steps
