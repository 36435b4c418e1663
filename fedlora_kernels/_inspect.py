"""Inspection: what clients' adapters hold, and how alike they are, from their Gram matrices.

    found = inspect(clients, weights=[120, 80, 300])
    found.modules["model.layers.0.self_attn.q_proj"].sigma      spectrum of the ideal aggregate
    found.similarity                                            cosines between clients' updates
    found.outliers                                              who is far from the others

The ideal aggregate is dW = sum_k w_k s_k B_k A_k.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedlora_kernels import ops
from fedlora_kernels.adapters import agreement, peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.kinds import dora
from fedlora_kernels.gram_space.batches import stack
from fedlora_kernels.gram_space.grams import Grams
from fedlora_kernels.gram_space.updates import Updates, products
from fedlora_kernels.gram_space.wide import grams_of
from fedlora_kernels.ops._spectrum import negligible

ENERGIES = (0.8, 0.9, 0.95, 0.99)

FAR = 2.0
"""A client is flagged from this many times the median distance to the geometric median on."""


@dataclass(frozen=True)
class ClientFacts:
    """One client's adapter."""

    name: str
    """the folder as typed"""
    kind: str
    """LoRA, rsLoRA, DoRA or VeRA"""
    base_model: str | None
    modules: int
    ranks: tuple[int, ...]
    """the different ranks of its modules, ascending"""
    scalings: tuple[float, ...]
    """the different scalings, ascending"""
    dtypes: tuple[str, ...]
    bytes: int
    """all tensors, those beside the factors included"""
    extras: int
    """tensors beside the factors (heads, biases)"""
    weight: float
    """w_k, all weights summing to 1"""
    norm: float
    """sqrt(sum over modules of ||s_k B_k A_k||_F^2); NaN where there are no factors"""


@dataclass(frozen=True)
class Standing:
    """Where one client's update lies among the others, over all modules."""

    norm: float
    """||dW_k||"""
    cosine: float
    """of dW_k to the ideal aggregate; NaN where either is zero"""
    distance: float
    """||dW_k - z||, z the geometric median of the clients by their weights"""
    flagged: bool
    """whether there are three clients or more, and the distance is more than FAR times the median
    of all distances; a reason to look at the client, and no proof"""


@dataclass(frozen=True)
class ModuleSpectrum:
    """The ideal aggregate of one module."""

    size: tuple[int, int]
    """(m, n)"""
    stacked_rank: int
    """R = sum_k r_k over the clients that have the module"""
    norm: float
    """||dW||_F"""
    sigma: tuple[float, ...]
    """singular values, descending; those that count as zero are left out"""
    ranks: Mapping[float, int]
    """energy -> the smallest rank that keeps it"""

    @property
    def numerical_rank(self) -> int:
        """How many singular values do not count as zero: sigma_i^2 > R eps sigma_1^2."""
        return len(self.sigma)


@dataclass(frozen=True)
class Projection:
    """The modules of one kind (q_proj, say) through all layers."""

    name: str
    modules: tuple[ModuleSpectrum, ...]

    @property
    def norm(self) -> float:
        """Mean of ||dW||_F."""
        return sum(module.norm for module in self.modules) / len(self.modules)

    @property
    def sigma(self) -> tuple[float, ...]:
        """The root mean square of the modules' i-th singular values."""
        longest = max(module.numerical_rank for module in self.modules)
        squares = [0.0] * longest
        for module in self.modules:
            for index, value in enumerate(module.sigma):
                squares[index] += value * value
        return tuple(math.sqrt(square / len(self.modules)) for square in squares)

    @property
    def energy(self) -> tuple[float, ...]:
        """Share of the modules' summed ||dW||^2 in the leading p components, for p = 1, 2, ..."""
        sigma = self.sigma
        squares = [(value / sigma[0]) ** 2 for value in sigma]  # tiny updates would underflow
        total, running, shares = sum(squares), 0.0, []
        for square in squares:
            running += square
            shares.append(running / total)
        return tuple(shares)


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found."""

    clients: tuple[ClientFacts, ...]
    energies: tuple[float, ...]
    modules: Mapping[str, ModuleSpectrum]
    similarity: tuple[tuple[float, ...], ...]
    """``<dW_j, dW_k> / (||dW_j|| ||dW_k||)`` of the clients' own updates over all modules, [K,K];
    NaN where a client's update is zero"""
    outliers: tuple[Standing, ...]
    """of every client; empty where no client's update is known"""
    notes: tuple[str, ...]
    """what the reader should know, such as configs that rules refuse to aggregate"""

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        """The modules by kind, in the model's order."""
        groups: dict[str, list[ModuleSpectrum]] = {}
        for module, name in projection_names(self.modules).items():
            groups.setdefault(name, []).append(self.modules[module])
        return tuple(Projection(name, tuple(modules)) for name, modules in groups.items())


def inspect(
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[float] | None = None,
    energies: Sequence[float] = ENERGIES,
) -> Inspection:
    """Spectra of the ideal aggregate and similarities of the clients.

    Args:
        adapters: one or more adapters; ranks may differ, modules may be absent.
        weights: the clients' weights, scaled to sum to 1; equal when None.
        energies: the shares of ||dW||^2 to find ranks for, in (0, 1].

    Raises:
        AdapterError: there are no adapters, the weights do not fit them, or they disagree about a
            module's size.
        ValueError: an energy is outside (0, 1].
    """
    shares = agreement.normalized(weights, adapters)
    return inspection(adapters, shares, map(grams_of, stack(adapters, shares)), energies)


def inspection(
    adapters: Sequence[Adapter],
    shares: torch.Tensor,
    every: Iterable[Grams],
    energies: Sequence[float],
) -> Inspection:
    """The same from Gram matrices that a round has, its weights [K] summing to 1."""
    modules: dict[str, ModuleSpectrum] = {}

    def read() -> Iterator[Grams]:
        for grams in every:
            modules.update(_spectra(grams, energies))
            yield grams

    labels = [peft_format.label(k, adapter.name) for k, adapter in enumerate(adapters)]
    updates = Updates.summed([products(read(), len(adapters))], labels)
    return Inspection(
        clients=tuple(map(_facts, adapters, shares.tolist(), updates.norms.tolist())),
        energies=tuple(energies),
        modules={name: modules[name] for name in sorted(modules, key=agreement.natural)},
        similarity=_cosines(updates.products, updates.norms),
        outliers=_outliers(updates, shares) if modules else (),
        notes=tuple(_notes(adapters)),
    )


def projection_names(modules: Iterable[str]) -> dict[str, str]:
    """Module -> the kind of layer it is: the end of its name that tells the kinds apart.

    "model.layers.3.self_attn.q_proj" is a "q_proj"; in a BERT "encoder.layer.3.output.dense" and
    "encoder.layer.3.attention.output.dense" stay two kinds, "output.dense" and
    "attention.output.dense".
    """
    kinds = {module: _kind(module) for module in modules}
    short = {kind: _last(kind) for kind in kinds.values()}
    times = Counter(short.values())
    return {
        module: short[kind] if times[short[kind]] == 1 else kind for module, kind in kinds.items()
    }


def _kind(module: str) -> str:
    """What follows the number of the layer, else the whole name."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    kind = ".".join(parts[numbers[-1] + 1 :]) if numbers else module
    return module if kind.isdigit() else kind


def _last(kind: str) -> str:
    last = kind.rpartition(".")[2]
    return kind if last.isdigit() else last


def _spectra(grams: Grams, energies: Sequence[float]) -> dict[str, ModuleSpectrum]:
    found = grams.spectrum
    sigma = found.sigma
    needed = [
        ops.select_rank(sigma, found.total_energy, energy, grams.full_rank).tolist()
        for energy in energies
    ]
    norms = grams.energy.sqrt().tolist()
    squares = sigma.square()  # some backends return what they found below the threshold, too
    counted = (squares > negligible(sigma.shape[1]) * squares[:, :1]).sum(-1).tolist()
    return {
        module: ModuleSpectrum(
            size=grams.size,
            stacked_rank=sum(grams.ranks),
            norm=norms[index],
            sigma=tuple(sigma[index, : counted[index]].tolist()),
            ranks={energy: ranks[index] for energy, ranks in zip(energies, needed, strict=True)},
        )
        for index, module in enumerate(grams.modules)
    }


def _cosines(products: torch.Tensor, norms: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    scale = norms[:, None] * norms[None, :]
    cosines = (products / scale.where(scale > 0, torch.nan)).clamp(-1, 1)
    return tuple(tuple(row) for row in cosines.tolist())


def _outliers(updates: Updates, shares: torch.Tensor) -> tuple[Standing, ...]:
    distances = updates.distances(_center(updates, shares))
    far = distances > FAR * distances[shares > 0].median()
    rows = zip(
        updates.norms.tolist(),
        updates.cosines(shares).tolist(),
        distances.tolist(),
        (far & (len(updates) > 2)).tolist(),
        strict=True,
    )
    return tuple(Standing(*row) for row in rows)


def _center(updates: Updates, shares: torch.Tensor) -> torch.Tensor:
    """The weights of the geometric median, to which a client of weight 0 adds nothing."""
    taking_part = shares.nonzero().flatten()
    mix = torch.zeros_like(shares)
    mix[taking_part] = updates.of(taking_part.tolist()).geometric_median(shares[taking_part])
    return mix


def _facts(adapter: Adapter, weight: float, norm: float) -> ClientFacts:
    tensors = adapter.state_dict()
    vectors = [vector for pair in adapter.vera.values() for vector in pair]
    own = vectors or [t for f in adapter.factors.values() for t in (f.b, f.a)]
    kind = "rsLoRA" if adapter.config.get("use_rslora") else "LoRA"
    if dora.used([adapter]):
        kind = "DoRA"
    return ClientFacts(
        name=adapter.name or "unnamed",
        kind="VeRA" if adapter.vera else kind,
        base_model=adapter.config.get("base_model_name_or_path"),
        modules=len(adapter.vera or adapter.factors),
        ranks=tuple(sorted(set(adapter.ranks.values()))),
        scalings=tuple(sorted({factors.scaling for factors in adapter.factors.values()})),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in own})),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        extras=len(adapter.extras),
        weight=weight,
        norm=norm if adapter.factors else math.nan,
    )


def _notes(adapters: Sequence[Adapter]) -> Iterable[str]:
    """Each remark once, with the clients that it is about."""
    lacking = agreement.absent(adapters)
    about: dict[str, list[str]] = {}
    for index, adapter in enumerate(adapters):
        for remark in _remarks(adapter, adapters[0], lacking.get(index, [])):
            about.setdefault(remark, []).append(peft_format.label(index, adapter.name))
    return (f"{peft_format.listed(who)}: {remark}" for remark, who in about.items())


def _remarks(adapter: Adapter, first: Adapter, absent: Sequence[str]) -> Iterable[str]:
    problem = peft_format.disagreement(first.config, adapter.config)
    if problem is not None:
        yield f"{problem} as in {peft_format.label(0, first.name)}; no rule aggregates these"
    if adapter.vera and not adapter.factors:
        yield "VeRA without its saved projections: vectors only, no spectrum"
    elif adapter.vera:
        yield "VeRA: every module is taken to be as wide as the saved projection"
    if dora.used([adapter]):
        yield "DoRA: spectra, norms and cosines are those of s B A, before the weight is rescaled"
    if absent:
        yield f"{len(absent)} modules are absent: {peft_format.listed(absent)}"
