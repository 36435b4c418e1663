"""Processes: a round whose modules are shared out over the processes of a torch.distributed group.

    processes = Processes(group)
    processes.share(costs)                 the modules that this process works on
    with processes.alike(): ...            an error of one process becomes the error of all
    processes.everywhere(value)            what every process has, in the order of their ranks

Without a group there is one process, which has everything and exchanges nothing.
"""

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fedlora_kernels.adapters.factors import Factors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Processes:
    """The processes of a group, as one of them sees them.

    Args:
        group: gloo for factors on CPUs, NCCL for factors on GPUs; None for one process.
    """

    def __init__(self, group: "ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank()
        """which of them this is; 0 has the result"""
        self.size = 1 if group is None else group.size()

    @property
    def first(self) -> bool:
        """Whether this is the process that has the result."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.group is None

    def share(self, costs: Mapping[str, float]) -> set[str]:
        """This process's modules: neighbors in the order of the names, which is that of the files,
        since a system reads more of a file than it is asked for. The costs of all modules, in this
        order, are one line, cut into equal parts; a module belongs where its middle is. So no
        process has more than its part and one module. All come to the same shares.

        Args:
            costs: of all modules.
        """
        part = sum(costs.values()) / self.size
        mine: set[str] = set()
        begin = 0.0
        for module, cost in sorted(costs.items()):
            if min(self.size - 1, int((begin + cost / 2) / part)) == self.rank:
                mine.add(module)
            begin += cost
        return mine

    @contextmanager
    def alike(self) -> Iterator[None]:
        """A block that ends with an error in all processes if it does in one of them: the error of
        the lowest rank that has one. The block itself must exchange nothing.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.alone:
                raise
            own = error
        if self.alone:
            return
        for rank, found in enumerate(self.everywhere(_sendable(own))):
            if found is not None:
                raise own if own is not None and rank == self.rank else found

    def everywhere(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks.

        Raises:
            ConnectionError: a process was lost.
        """
        import torch.distributed as dist

        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        """The value that process 0 has.

        Raises:
            ConnectionError: a process was lost.
        """
        import torch.distributed as dist

        if self.alone:
            return value
        values: list[Any] = [value]
        with self._together():
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        given: T = values[0]
        return given

    def gathered(self, made: Mapping[str, Factors]) -> Iterator[tuple[str, Factors]]:
        """The factors that other processes made, in process 0; nothing in the others. They travel
        one by one, with nothing but their numbers and scalings.

        Raises:
            ConnectionError: a process was lost.
        """
        import torch.distributed as dist

        shapes = {
            name: (pair.b.shape, pair.a.shape, pair.b.dtype, pair.scaling)
            for name, pair in made.items()
        }
        for source, described in enumerate(self.everywhere(shapes)):
            if source == 0 or self.rank not in (0, source):
                continue
            for name, (of_b, of_a, dtype, scaling) in described.items():
                if self.first:
                    b, a = (
                        torch.empty(shape, dtype=dtype, device=self._device)
                        for shape in (of_b, of_a)
                    )
                else:
                    b, a = (
                        side.to(self._device).contiguous() for side in (made[name].b, made[name].a)
                    )
                with self._together():
                    for side in (b, a):
                        whole = side.view(-1).view(torch.uint8)
                        if self.first:
                            dist.recv(whole, group=self.group, group_src=source)
                        else:
                            dist.send(whole, group=self.group, group_dst=0)
                if self.first:
                    yield name, Factors(b, a, scaling)

    @property
    def _device(self) -> torch.device:
        """Where the group's tensors must lie."""
        import torch.distributed as dist

        if "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """An exchange; torch's many errors about a lost process become one."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConnectionError(
                f"process {self.rank} of {self.size}: another process of the group ended, or did "
                f"not answer within the group's timeout: {reason}"
            ) from error


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or its text where the error itself cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def launched(device: torch.device) -> "Iterator[ProcessGroup | None]":
    """The group of the processes that torchrun started; None where it did not start several.

    Args:
        device: where the work is done: NCCL for CUDA, else gloo.
    """
    import torch.distributed as dist

    if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
