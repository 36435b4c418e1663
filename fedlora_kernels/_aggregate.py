"""aggregate: the clients' adapters in, the global adapter out.

load -> stack -> gram -> rule (spectrum + rank | surrogate | nothing) -> report -> combine

One batch of modules after the other, so that the Gram matrices of one batch are held at a time.
"""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import clients, folder, peft_format
from fedlora_kernels.adapter import WRITTEN, Adapter
from fedlora_kernels.factors import AdapterError, Factors
from fedlora_kernels.grams import Grams
from fedlora_kernels.report import CurvePoint, Report, Swept, curve, report, swept
from fedlora_kernels.rules import Rule, rules
from fedlora_kernels.rules.solution import Coefficients, Mixture
from fedlora_kernels.stack import Batch, stack


@dataclass(frozen=True)
class Aggregation:
    """The result of one aggregation."""

    rule: Rule
    adapter: Adapter
    """the global adapter (FedSA: the shared A, with B = 0)"""
    residual: Adapter | None
    """what the clients merge into the base beside the adapter (FedEx)"""
    report: Report
    """module -> rank, energy, relative_error, svd_floor"""
    curve: list[CurvePoint]
    """FLoRIST's rank against error, one point per entry of ``energies``"""
    clients: Sequence[Adapter] = field(repr=False)
    """the adapters that were aggregated"""
    heads: str = "average"
    """whether the tensors beside the factors were averaged, or stay with their clients"""

    @property
    def shared(self) -> dict[str, Tensor]:
        """The state that travels back to every client."""
        return _sent(self.adapter, self.rule, self.heads)

    def client_adapter(self, k: int) -> Adapter:
        """What client k receives, ready to run.

        FlexLoRA and HetLoRA: the leading r_k components in the client's own scaling. FedSA: the
        shared A with the client's own B and head. The other rules: the global adapter.

        Raises:
            AdapterError: the client's dtype cannot hold the update at the client's own scaling.
        """
        client = self.clients[k]
        extras = self.adapter.extras if self.heads == "average" else client.extras
        if self.rule.receives == "global":
            if self.heads == "average":
                return self.adapter
            config = {**self.adapter.config, **_head(client.config)}
            return Adapter(self.adapter.factors, config, extras=extras)
        if client.vera:
            vera = {name: (b, self.adapter.vera[name][1]) for name, (b, _) in client.vera.items()}
            fixed = {key: client.extras[key] for key in clients.PROJECTIONS if key in client.extras}
            return Adapter({}, client.config, vera=vera, extras={**extras, **fixed})
        adapt = _with_own_b if self.rule.personal else _leading
        factors = {
            module: adapt(self.adapter.factors[module], own)
            for module, own in client.factors.items()
        }
        for module, item in factors.items():
            if not bool(item.b.isfinite().all()):
                raise AdapterError(
                    f"{peft_format.label(k, client.name)}, module {module}: the update overflows "
                    f"{item.b.dtype} at scaling {item.scaling:g}"
                )
        return Adapter(factors, client.config, extras=extras)

    @property
    def bytes_up(self) -> list[int]:
        """Bytes that client k sent."""
        return [_bytes(_sent(client, self.rule, self.heads)) for client in self.clients]

    @property
    def bytes_down(self) -> list[int]:
        """Bytes that client k receives, a residual included."""
        extra = 0 if self.residual is None else self.residual.bytes
        return [
            extra + _bytes(_sent(self.client_adapter(k), self.rule, self.heads))
            for k in range(len(self.clients))
        ]

    def save(self, path: str | Path) -> None:
        """Write the global adapter as a PEFT folder, with report.json beside it, residual/ for
        FedEx and clients/K/ where clients receive different adapters; all in one step.

        Raises:
            FileExistsError: the path is a file, or a non-empty folder that is no adapter.
        """
        with folder.replaced(Path(path), WRITTEN) as made:
            self.adapter.write(made)
            described = {"rule": self.rule.name, "modules": self.report.as_dict()}
            text = json.dumps(described, indent=2)
            (made / "report.json").write_text(text + "\n", encoding="utf-8")
            if self.residual is not None:
                (made / "residual").mkdir()
                self.residual.write(made / "residual")
            if self.rule.receives != "global" or self.heads == "local":
                for k in range(len(self.clients)):
                    (made / "clients" / str(k)).mkdir(parents=True)
                    self.client_adapter(k).write(made / "clients" / str(k))


def aggregate(
    adapters: Sequence[Adapter],
    *,
    rule: str,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    absent: str = "zero",
    precision: str = "exact",
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
    heads: str | None = None,
    **options: Any,
) -> Aggregation:
    """Combine the clients' adapters into one.

    Args:
        adapters: the K clients of this round.
        rule: a name from :func:`rules`.
        weights: the clients' weights (numbers of examples, say), scaled to sum to 1; equal when
            None.
        device: where the work is done; where the adapters are when None.
        absent: what a client without a module counts as: "zero", a zero update, or
            "renormalise", as if it were not there.
        precision: "exact" (float64 accumulation) or "fast" (float32 with promotion).
        uniform_rank: pad every module with zeros to one rank, for servers that ignore PEFT's
            rank_pattern.
        dtype: of the result's factors; the clients' own when None.
        heads: what becomes of the tensors beside the factors (modules_to_save, biases): "average",
            or "local" (they stay with their clients); None is "local" for fedsa, else "average".
        **options: the rule's options, see ``rules()[rule].options``.

    Returns:
        The global adapter with its report; the input adapters are not changed.

    Raises:
        AdapterError: what the clients sent cannot be aggregated by this rule, and the message
            names the client and the module; or the result's dtype cannot hold the result.
        ValueError: the rule is unknown, or an option is out of range.
        TypeError: the rule has no such option.
    """
    chosen = _rule(rule)
    chosen.check_options(options)
    heads = heads or ("local" if chosen.personal else "average")
    if heads not in ("average", "local"):
        raise ValueError(f"heads must be average or local, found {heads!r}")
    clients.check(adapters, chosen)
    shares = clients.normalised(weights, adapters)
    made = _Made(clients.unreported(adapters))
    batches = stack(adapters, shares, absent=absent, device=device)
    together = any(options.get(name) is not None for name in chosen.joint)
    for group in [batches] if together else [[batch] for batch in batches]:
        made.take(group, chosen, precision, dtype, options)

    embeddings = _embeddings(adapters)
    factors = _finished(made.factors, embeddings, uniform_rank)
    extras = clients.average_extras(adapters, shares) if heads == "average" else {}
    adapter = _global_adapter(chosen, adapters, factors, made.averaged, extras, shares)
    residual = None
    if made.residuals:
        rest = _finished(made.residuals, embeddings, uniform_rank)
        residual = Adapter(rest, peft_format.headless(_config(adapters, rest, rslora=False)))
    return Aggregation(
        chosen, adapter, residual, _sorted(made.rows), curve(made.swept), list(adapters), heads
    )


@dataclass
class _Made:
    """What is kept of the batches that are done: no Gram matrix, no coefficient."""

    rows: Report
    factors: dict[str, Factors] = field(default_factory=dict)
    residuals: dict[str, Factors] = field(default_factory=dict)
    swept: list[dict[float, Swept]] = field(default_factory=list)
    averaged: bool = True
    """whether all factors are averages of the clients' factors"""

    def take(
        self,
        batches: Sequence[Batch],
        rule: Rule,
        precision: str,
        dtype: torch.dtype | None,
        options: Mapping[str, Any],
    ) -> None:
        """Gram matrices, the rule's coefficients, report and factors of these batches."""
        grams = [Grams.of(batch, precision) for batch in batches]
        for batch_grams in grams:
            batch_grams.check()
        solutions = rule.solve(grams, **options)
        for batch, batch_grams, solution in zip(batches, grams, solutions, strict=True):
            self.rows.update(report(batch_grams, solution))
            self.swept.append(swept(batch_grams, solution))
            self.factors.update(_factors(batch, solution.adapter, dtype))
            self.averaged &= isinstance(solution.adapter, Mixture)
            if solution.residual is not None:
                self.residuals.update(_factors(batch, solution.residual, dtype))


def _rule(name: str) -> Rule:
    known = rules()
    if name not in known:
        raise ValueError(f"unknown rule {name!r}; expected one of {', '.join(known)}")
    return known[name]


def _refuse_overflow(modules: Sequence[str], factor: Tensor) -> None:
    """A finite sum has finite terms; only where the sum is not, look at each module."""
    if bool(factor.sum().isfinite()):
        return
    bad = ~factor.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise AdapterError(
            f"module {modules[int(bad.nonzero()[0])]}: the aggregate overflows {factor.dtype}; ask "
            "for a wider dtype"
        )


def _factors(
    batch: Batch, part: Coefficients, dtype: torch.dtype | None
) -> Iterator[tuple[str, Factors]]:
    """combine | weighted_sum over the batch, each module cut to its own rank (at least 1)."""
    b_g, a_g = part.factors(batch if dtype is None else batch.widened(dtype))
    b_g, a_g = b_g.to(dtype or b_g.dtype), a_g.to(dtype or a_g.dtype)
    for factor in (b_g, a_g):
        _refuse_overflow(batch.modules, factor)
    numbers = zip(batch.modules, part.ranks.tolist(), part.scaling.tolist(), strict=True)
    for index, (module, rank, scaling) in enumerate(numbers):
        width = max(1, rank)
        b, a = b_g[index, :, :width].contiguous(), a_g[index, :width].contiguous()
        yield module, Factors(b, a, scaling)


def _embeddings(adapters: Sequence[Adapter]) -> set[str]:
    return {
        module
        for adapter in adapters
        for module, factors in adapter.factors.items()
        if factors.embedding
    }


def _finished(
    made: Mapping[str, Factors], embeddings: Set[str], uniform_rank: bool
) -> dict[str, Factors]:
    """By name, embeddings marked, and padded to one rank where that was asked for."""
    widest = max((item.rank for item in made.values()), default=1)
    finished = {}
    for module, item in sorted(made.items()):
        b, a = item.b, item.a
        if uniform_rank:
            b = torch.nn.functional.pad(b, (0, widest - item.rank))
            a = torch.nn.functional.pad(a, (0, 0, 0, widest - item.rank))
        finished[module] = Factors(b, a, item.scaling, module in embeddings)
    return finished


def _global_adapter(
    rule: Rule,
    adapters: Sequence[Adapter],
    factors: dict[str, Factors],
    averaged: bool,
    extras: dict[str, Tensor],
    shares: Tensor,
) -> Adapter:
    if adapters[0].vera:
        vera = {}
        for module, (lambda_b, lambda_d) in adapters[0].vera.items():
            mean = torch.stack([adapter.vera[module][1].double() for adapter in adapters])
            mean_d = (shares.to(mean) @ mean).to(lambda_d.dtype)
            vera[module] = (torch.zeros_like(lambda_b), mean_d)
        first = adapters[0]
        fixed = {key: first.extras[key] for key in clients.PROJECTIONS if key in first.extras}
        config = first.config if extras else peft_format.headless(first.config)
        return Adapter({}, config, vera=vera, extras={**extras, **fixed})
    flags = {bool(adapter.config.get("use_rslora")) for adapter in adapters}
    config = _config(adapters, factors, rslora=averaged and flags == {True})
    if rule.personal:  # B stays with the clients
        factors = {
            module: replace(item, b=torch.zeros_like(item.b)) for module, item in factors.items()
        }
    if adapters[0].extras and not extras:  # and so do the heads
        config = peft_format.headless(config)
    return Adapter(factors, config, extras=extras)


def _config(
    adapters: Sequence[Adapter], factors: Mapping[str, Factors], *, rslora: bool
) -> peft_format.Config:
    return peft_format.result_config(
        adapters[0].config,
        {module: item.rank for module, item in factors.items()},
        {module: item.scaling for module, item in factors.items()},
        rslora,
    )


def _with_own_b(shared: Factors, own: Factors) -> Factors:
    return replace(own, a=shared.a.to(own.a))


def _leading(shared: Factors, own: Factors) -> Factors:
    """The first r_k components in the client's scaling, zero-padded where there are fewer."""
    rank = min(own.rank, shared.rank)
    b, a = torch.zeros_like(own.b), torch.zeros_like(own.a)
    if own.scaling != 0:  # a client of scaling 0 cannot carry an update
        b[:, :rank] = shared.b[:, :rank] * (shared.scaling / own.scaling)
        a[:rank] = shared.a[:rank]
    return replace(own, b=b, a=a)


def _head(config: peft_format.Config) -> peft_format.Config:
    """The fields of a config that belong to its head."""
    return {field: config.get(field) for field in ("modules_to_save", "task_type")}


def _sent(adapter: Adapter, rule: Rule, heads: str) -> dict[str, Tensor]:
    """The tensors of an adapter that travel under a rule."""
    kept = {
        "both": (".weight", "_A", "_B", "_b", "_d"),
        "a": (".lora_A.weight", ".lora_embedding_A", ".vera_lambda_d"),
        "b": (".lora_B.weight", ".lora_embedding_B", ".vera_lambda_b"),
    }[rule.sends]
    return {
        key: tensor
        for key, tensor in adapter.state_dict().items()
        if (
            heads == "average" and key not in clients.PROJECTIONS
            if key in adapter.extras
            else key.endswith(kept)
        )
    }


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _sorted(rows: Report) -> Report:
    return Report(sorted(rows.items()))
