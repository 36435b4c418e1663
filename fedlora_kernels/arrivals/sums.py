"""Sums: all that is kept of the clients of a rule that only averages.

    sum_k w_k s_k B_k    sum_k w_k A_k    sum_k w_k    float64, per module, what travels

A client without a module adds nothing. Clients of smaller rank, where the rule takes them, count as
padded with zeros. The mean is one adapter of weight 1, of which the rule makes the result: the mean
of means is the mean of all.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels.adapters import agreement, extras, peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.finite import all_finite
from fedlora_kernels.adapters.kinds import table
from fedlora_kernels.adapters.kinds.kind import Kind
from fedlora_kernels.arrivals import durable
from fedlora_kernels.rules import Rule

TABLE = "table.json"
B, A, BIAS, MAGNITUDE, BESIDE = "B ", "A ", "bias ", "magnitude ", "beside "
"""what the names of tensors start with; a module's name or a tensor's own key follows"""


@dataclass(frozen=True)
class Row:
    """What is known of one module beside its sums."""

    rows: int
    columns: int
    rank: int
    dtype: str
    """that holds every client's numbers"""
    scaling: float
    """of the first client that has the module"""
    common: bool
    """whether all clients have this scaling, and the rule keeps it"""
    weight: float
    """of the clients that have the module, in units of 2^unit"""
    kind: Kind
    bias: bool
    """whether some client has a lora_bias"""
    magnitude: bool
    """whether the clients have DoRA"""


@dataclass(frozen=True)
class Sums:
    """The sums of K clients, in a folder of their own."""

    folder: Path | None = None
    modules: Mapping[str, Row] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    """the dtypes of the tensors of :meth:`Adapter.averaged`"""
    config: Mapping[str, Any] = field(default_factory=dict)
    """the first client's"""
    known: Mapping[str, Any] = field(default_factory=dict)
    """of the config's fields that may be None, what some client says"""
    rslora: bool = True
    """whether all clients have it"""
    alike: bool = True
    """whether all clients have the same modules and name them in the same way"""
    unit: int | None = None
    """weights are counted in units of this power of two, so that their products stay in range"""
    weight: float = 0.0
    """of all clients, in these units"""

    @classmethod
    def read(cls, folder: Path) -> "Sums":
        """The sums that :meth:`plus` wrote; they stay on the disk."""
        fields = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        fields["modules"] = {
            module: Row(**{**row, "kind": table.restored(row["kind"])})
            for module, row in fields["modules"].items()
        }
        return cls(folder, **fields)

    def tensors(self) -> Mapping[str, Tensor]:
        """The sums by name, mapped."""
        return {} if self.folder is None else durable.read_tensors(self.folder)

    def plus(
        self,
        client: Adapter,
        weight: float,
        rule: Rule,
        folder: Path,
        room: int,
        who: str,
        *,
        heads: str,
    ) -> "Sums":
        """These sums and one client more, durable in a folder of their own.

        Args:
            client: it belongs to those before, see :meth:`before`.
            weight: w_k.
            rule: it says which factors travel, and whether ranks may differ.
            folder: to be made.
            room: how many bytes may be held at once, or one module's.
            who: the client, for messages.
            heads: whether what is beside the factors is averaged, see :meth:`Round.aggregate`.

        Raises:
            AdapterError: a sum overflows float64; names the client and the module.
        """
        unit = math.frexp(weight)[1] if self.unit is None and weight > 0 else self.unit
        share = weight if unit is None else _scaled(weight, -unit, who)
        factors, averaged = client.trained, client.averaged(heads)
        known = {key: value for key, value in client.config.items() if value is not None}
        fresh = not self.config
        old = self.tensors()
        made = replace(
            self,
            folder=folder,
            modules=_rows(self.modules, factors, share, rule),
            beside={
                key: _promoted(self.beside.get(key), tensor.dtype)
                for key, tensor in averaged.items()
                if fresh or not extras.frozen(key) or _same(old.get(BESIDE + key), tensor)
            },
            config=client.config if fresh else self.config,
            known={**known, **self.known},
            rslora=self.rslora and bool(client.config.get("use_rslora")),
            alike=fresh
            or (
                self.alike
                and factors.keys() == self.modules.keys()
                and peft_format.same_targets([dict(self.config), client.config], factors)
            ),
            unit=unit,
            weight=self.weight + share,
        )
        with durable.made(folder) as place:
            sums = made._sums(old, factors, averaged, share, rule, who)
            durable.write_tensors(place, sums, room)
            fields = {key: value for key, value in vars(made).items() if key != "folder"}
            fields["modules"] = {
                module: {**asdict(row), "kind": table.plain(row.kind)}
                for module, row in made.modules.items()
            }
            (place / TABLE).write_text(json.dumps(fields), encoding="utf-8")
        return made

    def _sums(
        self,
        old: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
        averaged: Mapping[str, Tensor],
        share: float,
        rule: Rule,
        who: str,
    ) -> Iterator[tuple[str, Tensor]]:
        for module, row in self.modules.items():
            pair = factors.get(module)
            if pair is None:
                sides = (B + module, A + module, BIAS + module, MAGNITUDE + module)
                yield from ((name, old[name]) for name in sides if name in old)
                continue
            where = f"{who}, module {module}"
            if rule.sends != "a":
                shape, term = (row.rows, row.rank), share * pair.scaling
                yield B + module, _sum(old.get(B + module), pair.b, term, shape, where)
            if row.bias:
                own = pair.b.new_zeros(row.rows) if pair.bias is None else pair.bias
                term = share * pair.scaling
                yield BIAS + module, _sum(old.get(BIAS + module), own, term, own.shape, where)
            if pair.magnitude is not None:
                name, own = MAGNITUDE + module, pair.magnitude
                yield name, _sum(old.get(name), own, share, own.shape, where)
            if rule.sends == "b":  # one A in all clients, which is no sum
                yield A + module, old.get(A + module, _own(pair.a))
            else:
                shape = (row.rank, row.columns)
                yield A + module, _sum(old.get(A + module), pair.a, share, shape, where)
        for key in self.beside:
            tensor = averaged[key]
            if _averaged(key, tensor):
                where = f"{who}, tensor {key}"
                total = _sum(old.get(BESIDE + key), tensor, share, tensor.shape, where)
            else:  # frozen, or a counter, of which the largest counts
                total = old.get(BESIDE + key, _own(tensor))
                if not extras.frozen(key):
                    total = torch.maximum(total, tensor)
            yield BESIDE + key, total

    def before(self, rule: Rule) -> Adapter | None:
        """The clients so far as one adapter, for what must hold between them and a new one: kinds,
        configs, shapes, scalings, and A where all clients have one.
        """
        if not self.config:
            return None
        old, zero = self.tensors(), torch.zeros(())
        factors = {}
        for module, row in self.modules.items():
            b = zero.expand(row.rows, row.rank)
            a = old[A + module] if rule.sends == "b" else zero.expand(row.rank, row.columns)
            magnitude = zero.expand(row.rows) if row.magnitude else None
            factors[module] = Factors(b, a, row.scaling, row.kind, magnitude=magnitude)
        beside = {
            key: zero.expand(old[BESIDE + key].shape)
            if _averaged(key, old[BESIDE + key])
            else old[BESIDE + key]
            for key in self.beside
        }
        config = peft_format.completed(dict(self.config), self.known)
        return Adapter.of_averaged(factors, config, beside)

    def mean(self, rule: Rule, absent: str, dtype: torch.dtype | None) -> Adapter:
        """The clients' mean as one adapter, in the dtype that was asked for or in the clients'.

        Raises:
            AdapterError: there are no clients, all weights are zero, or the dtype cannot hold a
                mean.
        """
        agreement.normalized([self.weight] if self.config else None, self._anyone())
        old, factors = self.tensors(), {}
        for module, row in self.modules.items():
            kind = dtype or _dtype(row.dtype)
            scaling = row.scaling if row.common and row.scaling != 0 else 1.0
            present = row.weight or 1.0
            all_of_them = row.weight if absent == "renormalize" and row.weight else self.weight
            a = old[A + module]
            if rule.sends != "b":
                a = a / present
            if rule.sends == "a":
                b = torch.zeros(row.rows, row.rank, dtype=kind)
            else:
                b = old[B + module] / all_of_them / scaling
            pair = (_rounded(b, kind, module), _rounded(a, kind, module))
            bias = None
            if row.bias:
                bias = _rounded(old[BIAS + module] / all_of_them / scaling, kind, module)
            magnitude = None
            if row.magnitude and row.weight > 0:
                magnitude = _rounded(old[MAGNITUDE + module] / present, kind, module)
            factors[module] = Factors(*pair, scaling, row.kind, bias, magnitude)
        config = {**self.config, "use_rslora": self.rslora}
        if not self.alike:  # then the modules are listed
            config["target_modules"] = None
        return Adapter.of_averaged(factors, config, self._means(old))

    def _anyone(self) -> tuple[Adapter, ...]:
        return (Adapter({}, dict(self.config)),) if self.config else ()

    def _means(self, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means of the tensors that are averaged as they are; what has no mean is the first
        client's.
        """
        means = {}
        for key, dtype in self.beside.items():
            total = old[BESIDE + key]
            mean = total / self.weight if _averaged(key, total) else total
            means[key] = _rounded(mean, _dtype(dtype), key)
        return means


def _rows(
    old: Mapping[str, Row], factors: Mapping[str, Factors], share: float, rule: Rule
) -> dict[str, Row]:
    rows = dict(old)
    for module, pair in factors.items():
        layout = pair.layout
        before = rows.get(module)
        both = torch.promote_types(layout.dtype_b, layout.dtype_a)
        # A rule for clients of different ranks folds every scaling into B.
        common = not rule.heterogeneous and (before is None or before.common)
        rows[module] = Row(
            rows=layout.rows,
            columns=layout.columns,
            rank=max(layout.rank, before.rank if before else 0),
            dtype=_promoted(before.dtype if before else None, both),
            scaling=before.scaling if before else pair.scaling,
            common=common and (before is None or before.scaling == pair.scaling),
            weight=share + (before.weight if before else 0.0),
            kind=pair.kind,
            bias=pair.bias is not None or (before is not None and before.bias),
            magnitude=pair.magnitude is not None,
        )
    return dict(sorted(rows.items()))


def _own(tensor: Tensor) -> Tensor:
    """A copy: safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _averaged(key: str, tensor: Tensor) -> bool:
    return not extras.frozen(key) and tensor.is_floating_point()


def _same(known: Tensor | None, tensor: Tensor) -> bool:
    return known is not None and torch.equal(known, tensor.to(known.device))


def _sum(
    old: Tensor | None, term: Tensor, factor: float, shape: tuple[int, ...], where: str
) -> Tensor:
    """old + factor * term, float64, both padded with zeros to the shape."""
    total = torch.zeros(shape, dtype=torch.float64)
    if old is not None:
        total[tuple(map(slice, old.shape))] = old
    total[tuple(map(slice, term.shape))].add_(term.detach().cpu().double(), alpha=factor)
    if not all_finite(total):
        raise AdapterError(f"{where}: the sum of the weighted numbers overflows float64")
    return total


def _rounded(mean: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """In the result's dtype, which must hold it."""
    made = mean.to(dtype, copy=True)
    if not all_finite(made):
        raise AdapterError(
            f"module {where}: the aggregate overflows {dtype}; give a wider dtype= (--dtype)"
        )
    return made


def _scaled(weight: float, power: int, who: str) -> float:
    try:
        return math.ldexp(weight, power)
    except OverflowError:
        raise AdapterError(
            f"{who}: weight {weight} is too large beside those of the clients before, which are in "
            f"units of 2^{-power}; scale the weights so that none overflows"
        ) from None


def _promoted(known: str | None, dtype: torch.dtype) -> str:
    """The name of a dtype that holds both."""
    both = dtype if known is None else torch.promote_types(_dtype(known), dtype)
    return str(both).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
