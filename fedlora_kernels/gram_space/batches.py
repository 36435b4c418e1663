"""stack: the clients' factors as batches of modules of one shape.

    B = [B_1 | ... | B_K]    [L,m,R]        A = [A_1 ; ... ; A_K]    [L,R,n]

The factors stay where they are: a batch holds the clients' tensors, the operators' ``*_list`` forms
read them there, and a stack is copied together only for who asks for one. Modules are batched
together when their sizes, the clients that have them and those clients' ranks agree, so a
homogeneous federation is one or a few batches however many layers the model has; a batch ends where
its R x R Gram matrices would outgrow GRAM_BYTES, so memory does not grow with the number of layers.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.peft_format import label
from fedlora_kernels.backends.lists import moved
from fedlora_kernels.backends.lists import stack as stacked

ABSENT = ("zero", "renormalize")

GRAM_BYTES = 1 << 27
"""What the matrices G_B of one batch may take: 128 MiB, 1024 modules at R = 128 and 64 at R = 512.

Some ten such arrays live while a batch is worked on; one module is a batch however large it is.
"""

GPU_SHARE = 64
"""On a GPU they may take this part of its memory where that is more: 1.25 GiB of 80 GiB are 640
modules at R = 512. Its kernels give a module one block of threads, so a batch that keeps all
multiprocessors busy has several times as many modules."""

WIDE_RANK = 512
"""From this stacked rank on :func:`is_wide` looks at the module's size: below, matrices of R x R
take milliseconds, and many modules are worked on in one call."""


def is_wide(stacked_rank: int, size: tuple[int, int]) -> bool:
    """Whether the dense update is less work than matrices of R x R: see gram_space/wide.py.

    With d = min(m, n), 2 d^2 R + d^3 multiplications against 2 d R^2 and a factorization of R^3.
    """
    return stacked_rank >= WIDE_RANK and 4 * stacked_rank >= 3 * min(size)


def modules_at_once(
    stacked_rank: int,
    size: tuple[int, int],
    device: torch.device,
    gram_bytes: int | None = None,
    factor_bytes: int = 0,
) -> int:
    """How many modules one batch holds: see :func:`stack` for gram_bytes; wide ones are alone."""
    if is_wide(stacked_rank, size):
        return 1
    largest = max(1, 8 * stacked_rank**2)
    if gram_bytes is None:
        return max(1, gram_bytes_on(device) // largest)
    return max(1, gram_bytes // max(largest, factor_bytes // 4))


class Signature(NamedTuple):
    """What the modules of one batch have in common."""

    size: tuple[int, int]
    clients: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def cost(self) -> float:
        """Operations of one module, roughly: docs/scale.md has the table."""
        stacked_rank, (m, n) = sum(self.ranks), self.size
        if is_wide(stacked_rank, self.size):
            return 2.0 * m * n * stacked_rank + min(m, n) ** 2 * max(m, n)
        return float(stacked_rank**2 * (m + n) + stacked_rank**3)


Share = Callable[[Mapping[str, float]], Collection[str]]
"""From the cost of every module, those that this process works on."""


@dataclass(frozen=True)
class Batch:
    """L modules of one shape from K clients; the factors themselves are read on demand."""

    modules: tuple[str, ...]
    """L module names"""
    clients: tuple[int, ...]
    """indices of the K clients that have these modules"""
    federation: int
    """how many adapters the round has, those without these modules included"""
    joined: int
    """how many of them, the last ones, a rule with memory added to the clients"""
    names: tuple[str | None, ...]
    """the K clients' own names"""
    ranks: tuple[int, ...]
    """r_k"""
    size: tuple[int, int]
    """(m, n)"""
    dtype: torch.dtype
    """the dtype that holds every client's numbers"""
    device: torch.device
    """where the work is done"""
    shares: Tensor
    """the clients' shares of all weights of the round, [K] float64"""
    weights: Tensor
    """w_k [K] float64: the shares themselves, or scaled up to sum to 1 (absent="renormalize")"""
    scalings: Tensor
    """s_lk [L,K] float64"""
    pairs: tuple[Factors, ...]
    """the clients' factors, module-major: pairs[l*K + k]"""
    versions: tuple[int, ...]
    """how often each client's tensors had been written to when the batch was made"""

    @property
    def wide(self) -> bool:
        """Whether the one module of this batch is worked on as a dense update."""
        return is_wide(sum(self.ranks), self.size)

    @property
    def labels(self) -> tuple[str, ...]:
        """The K clients as messages name them, and what was carried from the last round."""
        carried = self.federation - self.joined
        return tuple(
            "the carried adapter" if k >= carried else label(k, name)
            for k, name in zip(self.clients, self.names, strict=True)
        )

    @cached_property
    def list_b(self) -> list[Tensor]:
        """The factors where they lie, or copies on the device in the dtype, which :meth:`forget`
        lets go of: list_b[l*K + k] is [m,r_k].
        """
        return self._moved([pair.b for pair in self.pairs])

    @cached_property
    def list_a(self) -> list[Tensor]:
        """list_a[l*K + k] is [r_k,n]."""
        return self._moved([pair.a for pair in self.pairs])

    @property
    def first_a(self) -> list[Tensor]:
        """The first client's A of every module, in no memory that other clients' copies share."""
        return self._moved([pair.a for pair in self.pairs[:: len(self.clients)]])

    def forget(self) -> None:
        """Let go of copies on the device; they are made anew for who asks again."""
        for name in ("list_b", "list_a"):
            self.__dict__.pop(name, None)

    @property
    def b(self) -> Tensor:
        """The stack [L,m,R]: a copy, for what cannot read the factors where they lie."""
        return stacked(self.list_b, len(self.modules), rows=False)

    @property
    def a(self) -> Tensor:
        """The stack [L,R,n]: a copy."""
        return stacked(self.list_a, len(self.modules), rows=True)

    @property
    def client_ranks(self) -> tuple[int, ...]:
        """r_k of the clients alone, without what a rule with memory joined to them."""
        first = self.federation - self.joined
        return tuple(r for k, r in zip(self.clients, self.ranks, strict=True) if k < first)

    @property
    def renormalized(self) -> bool:
        """Whether clients without these modules count as if they were not there."""
        return self.weights is not self.shares

    @cached_property
    def one_scaling(self) -> bool:
        """Whether all clients have one scaling in every module, and not 0."""
        values = {pair.scaling for pair in self.pairs}
        return len(values) == 1 and values != {0.0}

    @cached_property
    def scale(self) -> Tensor:
        """The diagonal of D, w_k s_k once per rank: [L,R] float64."""
        return (self.weights * self.scalings)[:, self.owner]

    @cached_property
    def owner(self) -> Tensor:
        """Which client each stacked rank belongs to: [R] int64."""
        owners = [k for k, rank in enumerate(self.ranks) for _ in range(rank)]
        return torch.tensor(owners, device=self.device)

    def where(self, index: int) -> str:
        """The client and the module of pairs[index], as messages name them."""
        module, client = divmod(index, len(self.clients))
        return f"{self.labels[client]}, module {self.modules[module]}"

    def refuse_changes(self) -> None:
        """Refuse tensors that were written to since the batch was made.

        Raises:
            AdapterError: names the first client and module whose tensor changed.
        """
        found = tuple([pair.version for pair in self.pairs])
        if found != self.versions:
            first = next(
                i for i, (x, y) in enumerate(zip(found, self.versions, strict=True)) if x != y
            )
            raise AdapterError(
                f"{self.where(first)}: a tensor was changed in place after the round had been "
                "made; read result.report before, or aggregate copies"
            )

    @property
    def seen_finite(self) -> bool:
        """Whether all entries were seen to be finite when the adapters were read."""
        return self.versions == tuple([pair.finite_at for pair in self.pairs])

    def refuse_non_finite(self) -> None:
        """Refuse NaN and Inf, entry by entry: for when a result has shown that there is one.

        Raises:
            AdapterError: names the first client and module.
        """
        for index, pair in enumerate(self.pairs):
            for side, tensor in (("B", pair.b), ("A", pair.a)):
                if not bool(tensor.isfinite().all()):
                    raise AdapterError(f"{self.where(index)}: {side} holds NaN or Inf")

    def _moved(self, tensors: list[Tensor]) -> list[Tensor]:
        """In the batch's dtype on its device."""
        if self._in_place:
            return tensors
        return moved(tensors, self.device, self.dtype)

    @cached_property
    def _in_place(self) -> bool:
        """Whether all factors lie on the device in the dtype already; most do."""
        there = (self.dtype, self.dtype, self.device, self.device)
        return all(pair.layout[3:] == there for pair in self.pairs)


def stack(
    adapters: Sequence[Adapter],
    weights: Tensor,
    *,
    absent: str = "zero",
    device: torch.device | str | None = None,
    joined: int = 0,
    gram_bytes: int | None = None,
    share: Share = set,
) -> list[Batch]:
    """Batches of the modules of all clients.

    Args:
        adapters: the K clients.
        weights: [K] float64, summing to 1.
        absent: a client without a module contributed a zero update ("zero"), or the others'
            weights are scaled up to sum to 1 for that module ("renormalize").
        device: where the work is done; where the adapters are when None.
        joined: how many of the adapters, the last ones, are not clients.
        gram_bytes: what the matrices G_B of one batch of several modules may take, and a quarter of
            the factors that come of it; when None, the matrices may take what
            :func:`gram_bytes_on` says.
        share: which of the modules; all when not given. Sizes are looked at for all of them.

    Raises:
        AdapterError: clients disagree about a module's size, and the message names both; or the
            square of a scaling is no float64.
    """
    if absent not in ABSENT:
        raise ValueError(f"absent must be one of {', '.join(ABSENT)}, found {absent!r}")
    signatures = {
        module: _signature(adapters, module)
        for module in sorted({name for adapter in adapters for name in adapter.factors})
    }
    chosen = share({module: signature.cost for module, signature in signatures.items()})
    groups: dict[Signature, list[str]] = {}
    for module, signature in signatures.items():
        if module in chosen:
            groups.setdefault(signature, []).append(module)
    batches = []
    for signature, modules in groups.items():
        first = adapters[signature.clients[0]].factors[modules[0]]
        where = first.layout.device_b if device is None else torch.device(device)
        for part in _parts(modules, signature, gram_bytes, where):
            batches.append(_batch(adapters, signature, part, weights, absent, where, joined))
    return batches


def gram_bytes_on(device: torch.device) -> int:
    """What the matrices G_B of one batch may take on a device, if nobody says."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return GRAM_BYTES
    return share_of(torch.cuda.get_device_properties(device).total_memory)


def share_of(memory: int) -> int:
    """The same for a GPU with so many bytes."""
    return max(GRAM_BYTES, memory // GPU_SHARE)


def _parts(
    modules: Sequence[str], signature: Signature, gram_bytes: int | None, device: torch.device
) -> Iterator[Sequence[str]]:
    """The modules in runs that fit gram_bytes, as equal as can be; wide modules one by one."""
    stacked_rank = sum(signature.ranks)
    factors = stacked_rank * sum(signature.size) * signature.dtype.itemsize
    fit = modules_at_once(stacked_rank, signature.size, device, gram_bytes, factors)
    count = -(-len(modules) // fit)
    for part in range(count):
        begin, end = (len(modules) * index // count for index in (part, part + 1))
        yield modules[begin:end]


def _signature(adapters: Sequence[Adapter], module: str) -> Signature:
    """A module's signature; checks that the clients agree on its size."""
    present = [k for k, adapter in enumerate(adapters) if module in adapter.factors]
    layouts = [adapters[k].factors[module].layout for k in present]
    first = layouts[0]
    ranks = tuple([layout.rank for layout in layouts])
    dtype = first.dtype_b
    if layouts.count(first) < len(layouts) or first.dtype_a is not dtype:
        for k, layout in zip(present, layouts, strict=True):
            if (layout.rows, layout.columns) != (first.rows, first.columns):
                raise AdapterError(
                    f"{label(k, adapters[k].name)}, module {module}: the update is {layout.rows} x "
                    f"{layout.columns}, expected {first.rows} x {first.columns} as in "
                    f"{label(present[0], adapters[present[0]].name)}"
                )
            both = torch.promote_types(layout.dtype_b, layout.dtype_a)
            dtype = torch.promote_types(dtype, both)
    return Signature((first.rows, first.columns), tuple(present), ranks, dtype)


def _batch(
    adapters: Sequence[Adapter],
    signature: Signature,
    modules: Sequence[str],
    weights: Tensor,
    absent: str,
    where: torch.device,
    joined: int,
) -> Batch:
    size, present, ranks, dtype = signature
    clients = [adapters[k].factors for k in present]
    pairs = [factors[module] for module in modules for factors in clients]
    shares = weights if len(present) == len(adapters) else weights[list(present)]
    shares = present_weights = shares.to(where)
    count = sum(k < len(adapters) - joined for k in present)
    if absent == "renormalize" and bool(shares[:count].sum() > 0):
        scaled_up = shares[:count] / shares[:count].sum()
        present_weights = torch.cat([scaled_up, shares[count:]])
    scalings = torch.tensor([pair.scaling for pair in pairs], dtype=torch.float64)
    made = Batch(
        modules=tuple(modules),
        clients=present,
        federation=len(adapters),
        joined=joined,
        names=tuple(adapters[k].name for k in present),
        ranks=ranks,
        size=size,
        dtype=dtype,
        device=where,
        shares=shares,
        weights=present_weights,
        scalings=scalings.view(len(modules), len(present)).to(where),
        pairs=tuple(pairs),
        versions=tuple([pair.version for pair in pairs]),
    )
    squares = scalings.square()
    if not bool(squares.sum().isfinite()):
        index = int((~squares.isfinite()).nonzero()[0])
        raise AdapterError(
            f"{made.where(index)}: scaling * B A is too large: its square overflows float64"
        )
    return made
