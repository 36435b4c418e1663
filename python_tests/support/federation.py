"""Federations: clients whose factors are known beside the adapters that the library sees.

Expected values are computed from ``Federation.drawn``, the tensors and scalings as they were drawn,
in dense float64; nothing of the library is read for them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from assertions import EPS, EXACT_PRODUCT, PRODUCT_ROUNDINGS, assert_within
from matrices import Batch, normal
from safetensors.torch import save_file

import fedlora_kernels as flk

SIZES = {"layers.0.attn.q": (24, 17), "layers.0.down": (13, 40), "layers.1.attn.q": (24, 17)}
"""Three modules of two sizes, m != n, one wide and one tall."""

BASE = "a-base-model"
WORKING_DTYPES = (torch.float32, torch.bfloat16)

AVERAGING_RULES = (
    "fedit",
    "ffa",
    "fedsa",
    "flora_na",
    "fedex",
    "lora_fair",
    "rolora",
    "lora_a2",
    "florg",
    "fedmomentum",
)
"""The rules that need equal ranks."""

FIXED_A = ("ffa", "rolora", "lora_a2", "fedsvd")
"""The rules whose clients here hold one A."""

BY_HOLDERS = ("raflora", "rbla")
"""The rules that weigh a rank among the clients that have it, so that an absent client's weight
goes to the others.
"""

PRODUCT_RULES: dict[str, dict[str, Any]] = {
    "flora": {},
    "flexlora": {"rank": 1_000_000},
    "florist": {"energy": 1.0},
    "fedex": {},
}
"""The rules that give the ideal update itself, with the options that they need for it."""

UNAVERAGED = ("flora", "flexlora", "florist")
"""The rules that never multiply one client's B with another's A."""

AVERAGE_ROUNDINGS = 1.0
"""Two factors rounded once each, half an eps each: eps ||B||_F ||A||_F together at worst."""

GRAM_TERMS = 32.0
"""c of c R eps, what is left of a squared norm that was summed from Gram matrices."""


@dataclass(frozen=True)
class Drawn:
    """One client's factors of one module."""

    b: torch.Tensor
    a: torch.Tensor
    scaling: float

    def update(self) -> torch.Tensor:
        """Dense float64."""
        return self.scaling * (self.b.double() @ self.a.double())


Terms = tuple[list[torch.Tensor], list[torch.Tensor], list[float], list[float]]


@dataclass(frozen=True)
class Federation:
    """K clients: what they drew, the adapters made of it, and their weights."""

    drawn: tuple[dict[str, Drawn], ...]
    adapters: tuple[flk.Adapter, ...]
    weights: tuple[float, ...]

    @property
    def modules(self) -> list[str]:
        return sorted({module for client in self.drawn for module in client})

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.drawn[0].values())).b.dtype

    def aggregate(self, rule: str, **options: Any) -> flk.Aggregation:
        return flk.aggregate(list(self.adapters), rule=rule, weights=self.weights, **options)

    def of(self, module: str, renormalize: bool = False) -> Terms:
        """B_k, A_k, s_k and w_k (shares of all weights) of the clients that have the module."""
        present = [k for k, client in enumerate(self.drawn) if module in client]
        counted = present if renormalize else range(len(self.drawn))
        total = sum(self.weights[k] for k in counted)
        mine = [self.drawn[k][module] for k in present]
        return (
            [item.b for item in mine],
            [item.a for item in mine],
            [item.scaling for item in mine],
            [self.weights[k] / total for k in present],
        )

    def ideal(self, module: str, renormalize: bool = False) -> torch.Tensor:
        """sum_k w_k s_k B_k A_k, dense float64."""
        terms = zip(*self.of(module, renormalize), strict=True)
        return torch.stack([w * s * (b.double() @ a.double()) for b, a, s, w in terms]).sum(0)

    def means(self, module: str, renormalize: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """sum_k w_k s_k B_k and sum_k w_k A_k / sum_k w_k: absent clients have B = 0 and no A."""
        bs, as_, scalings, weights = self.of(module, renormalize)
        b = torch.stack([w * s * b.double() for b, s, w in zip(bs, scalings, weights, strict=True)])
        a = torch.stack([w * a.double() for a, w in zip(as_, weights, strict=True)])
        total = sum(weights)
        return b.sum(0), a.sum(0) / (total if total else 1.0)

    def magnitude(self, module: str) -> float:
        """sum_k w_k s_k ||B_k|| ||A_k||: what roundings of a product are relative to."""
        terms = zip(*self.of(module), strict=True)
        return sum(abs(w * s) * norm(b.double()) * norm(a.double()) for b, a, s, w in terms)

    def spread(self, module: str) -> float:
        """The same with mean ||A|| added to ||A_k||: an average multiplies every B with every A.

        Only for rules that average: with badly scaled clients it exceeds the update by far.
        """
        bs, as_, scalings, weights = self.of(module)
        sizes = [norm(a.double()) for a in as_]
        mean = sum(w * size for w, size in zip(weights, sizes, strict=True)) / (sum(weights) or 1.0)
        terms = zip(bs, sizes, scalings, weights, strict=True)
        return sum(abs(w * s) * norm(b.double()) * (size + mean) for b, size, s, w in terms)

    def scale(self, module: str, rule: str) -> float:
        """What a rule's roundings are relative to."""
        return self.magnitude(module) if rule in UNAVERAGED else self.spread(module)

    def replaced(self, k: int, module: str, b: torch.Tensor, a: torch.Tensor) -> "Federation":
        """The same federation with other factors in client k's module."""
        drawn = list(self.drawn)
        old = drawn[k][module]
        drawn[k] = {**drawn[k], module: Drawn(b.to(old.b), a.to(old.a), old.scaling)}
        return federation(drawn, self.weights)


def norm(x: torch.Tensor) -> float:
    """Frobenius."""
    return float(torch.linalg.matrix_norm(x))


def config(
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    *,
    rslora: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """adapter_config.json of LoRA modules with these ranks and scalings."""
    alphas = {
        module: scalings[module] * (math.sqrt(rank) if rslora else rank)
        for module, rank in ranks.items()
    }
    first = next(iter(ranks))
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE,
        "task_type": "CAUSAL_LM",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {m: rank for m, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {m: alpha for m, alpha in alphas.items() if alpha != alphas[first]},
        "use_rslora": rslora,
        "target_modules": sorted(ranks),
        "init_lora_weights": True,
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
    }
    return {**fields, **changes}


def state(client: Mapping[str, Drawn]) -> dict[str, torch.Tensor]:
    """A client's tensors under PEFT's keys."""
    tensors = {}
    for module, item in client.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = item.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = item.b
    return tensors


def client_config(
    client: Mapping[str, Drawn], *, rslora: bool = False, **changes: Any
) -> dict[str, Any]:
    """The config that goes with :func:`state`."""
    ranks = {module: item.a.shape[0] for module, item in client.items()}
    scalings = {module: item.scaling for module, item in client.items()}
    return config(ranks, scalings, rslora=rslora, **changes)


def federation(
    drawn: Sequence[Mapping[str, Drawn]],
    weights: Sequence[float] | None = None,
    *,
    rslora: bool = False,
    extras: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> Federation:
    """Clients that hold exactly what was drawn."""
    beside = extras or [{} for _ in drawn]
    adapters = tuple(
        flk.Adapter.from_state_dict(
            {**state(client), **extra}, client_config(client, rslora=rslora), name=f"site-{k}"
        )
        for k, (client, extra) in enumerate(zip(drawn, beside, strict=True))
    )
    clients = tuple(dict(client) for client in drawn)
    return Federation(clients, adapters, tuple(weights or [1.0] * len(drawn)))


Ranks = int | Mapping[str, int]


def draw(
    *,
    ranks: Sequence[Ranks] = (4, 4, 4),
    alphas: Sequence[float] = (4, 8, 16),
    weights: Sequence[float] = (50, 20, 30),
    sizes: Mapping[str, tuple[int, int]] = SIZES,
    dtype: torch.dtype = torch.float32,
    rslora: bool = False,
    common_a: bool = False,
    absent: Mapping[int, Sequence[str]] | None = None,
    zero: Sequence[int] = (),
    seed: int = 0,
) -> Federation:
    """Gaussian clients: K ranks (or one per module), alphas and weights.

    Args:
        ranks: r_k, or a mapping from module to rank.
        alphas: s_k = alpha_k / r, or alpha_k / sqrt(r) with ``rslora``.
        weights: of any sum.
        sizes: module -> (m, n).
        dtype: of the factors.
        rslora: scalings by the square root of the rank.
        common_a: all clients have client 0's A.
        absent: client -> modules that it lacks.
        zero: clients whose B is zero.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    clients: list[dict[str, Drawn]] = []
    for k, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        client = {}
        for module, (m, n) in sizes.items():
            r = rank[module] if isinstance(rank, Mapping) else rank
            b, a = normal(generator, m, r), normal(generator, r, n)
            if common_a and k > 0:
                a = clients[0][module].a
            if k in zero:
                b = torch.zeros_like(b)
            scaling = alpha / (math.sqrt(r) if rslora else r)
            client[module] = Drawn(b.to(dtype), a.to(dtype), scaling)
        clients.append(client)
    for k, modules in (absent or {}).items():
        for module in modules:
            del clients[k][module]
    return federation(clients, weights, rslora=rslora)


EQUAL_RANK_CASES: dict[str, dict[str, Any]] = {
    "mixed_scalings": {},
    "equal_scalings": {"alphas": (8, 8, 8)},
    "rslora": {"rslora": True, "alphas": (8, 8, 8)},
    "rslora_mixed_scalings": {"rslora": True, "alphas": (4, 8, 16)},
    "odd_rank": {"ranks": (3, 3, 3), "alphas": (5, 5, 7)},
    "wide_stack": {"ranks": (9,) * 5, "alphas": (9, 18, 36, 9, 9), "weights": (5, 4, 3, 2, 1)},
    "absent_modules": {"absent": {1: ["layers.0.down"], 2: ["layers.0.down", "layers.1.attn.q"]}},
    "zero_client": {"zero": (1,)},
    "zero_weight": {"weights": (3, 0, 1)},
    "all_zero_round": {"zero": (0, 1, 2)},
    "one_client": {"ranks": (4,), "alphas": (8,), "weights": (7,)},
}
"""Keyword arguments of :func:`draw` for the rules that need equal ranks."""

MIXED_RANKS = (
    {"layers.0.attn.q": 8, "layers.0.down": 3, "layers.1.attn.q": 5},
    4,
    {"layers.0.attn.q": 1, "layers.0.down": 6, "layers.1.attn.q": 2},
)

CASES: dict[str, dict[str, Any]] = {
    **EQUAL_RANK_CASES,
    "mixed_ranks": {"ranks": MIXED_RANKS, "alphas": (8, 8, 4)},
    "mixed_ranks_rslora": {"ranks": MIXED_RANKS, "alphas": (8, 8, 4), "rslora": True},
    "mixed_ranks_absent": {"ranks": MIXED_RANKS, "absent": {0: ["layers.0.down"]}},
    "wide_mixed_stack": {"ranks": (16, 8, 4, 2), "alphas": (16,) * 4, "weights": (1, 2, 3, 4)},
}
"""The same for the rules that take any ranks."""


def of_batch(batch: Batch) -> Federation:
    """A batch of a matrix family as clients with the modules m0, m1, ..."""
    bs, as_ = batch.b.split(batch.ranks, dim=2), batch.a.split(batch.ranks, dim=1)
    drawn = [
        {
            f"m{index}": Drawn(bs[k][index], as_[k][index], float(batch.scalings[index, k]))
            for index in range(batch.modules)
        }
        for k in range(batch.clients)
    ]
    return federation(drawn, batch.weights.tolist())


def with_common(round_: Federation, side: str) -> Federation:
    """The same clients with the first client's A or B in all that have the module."""
    drawn = []
    for client in round_.drawn:
        changed = {}
        for module, item in client.items():
            first = next(c[module] for c in round_.drawn if module in c)
            b, a = (item.b, first.a) if side == "a" else (first.b, item.a)
            changed[module] = Drawn(b, a, item.scaling)
        drawn.append(changed)
    return federation(drawn, round_.weights)


def update(adapter: flk.Adapter, module: str) -> torch.Tensor:
    """What an adapter adds to a module: scaling B A, dense float64."""
    factors = adapter.factors[module]
    return factors.scaling * (factors.b.double() @ factors.a.double())


def whole_update(result: flk.Aggregation, module: str) -> torch.Tensor:
    """The global adapter's update, and the residual's where there is one."""
    total = update(result.adapter, module)
    return total if result.residual is None else total + update(result.residual, module)


def product_bound(
    round_: Federation, module: str, dtype: torch.dtype, rule: str = "flora"
) -> float:
    """What the ideal update may differ by after a rule's factors were rounded to a dtype."""
    return (EXACT_PRODUCT + PRODUCT_ROUNDINGS * EPS[dtype]) * round_.scale(module, rule)


def assert_average(result: flk.Adapter, module: str, b: torch.Tensor, a: torch.Tensor) -> None:
    """An adapter's update equals B A up to the rounding of both factors to its dtype."""
    dtype = result.factors[module].b.dtype
    bound = (EXACT_PRODUCT + AVERAGE_ROUNDINGS * EPS[dtype]) * norm(b) * norm(a)
    found = update(result, module)
    assert_within(torch.linalg.matrix_norm(found - b @ a), bound, f"{module}: update")


def assert_ideal(result: flk.Aggregation, round_: Federation, renormalize: bool = False) -> None:
    """Every module's whole update equals dW up to the rounding of the factors."""
    for module in round_.modules:
        error = torch.linalg.matrix_norm(
            whole_update(result, module) - round_.ideal(module, renormalize)
        )
        dtype = result.adapter.factors[module].b.dtype
        total = sum(round_.of(module)[3]) if renormalize else 1.0
        bound = product_bound(round_, module, dtype, result.rule.name) / (total if total else 1.0)
        assert_within(error, bound, f"{module}: update")


def assert_report(
    result: flk.Aggregation, round_: Federation, updates: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Every row of the report equals what the dense updates say.

    Args:
        result: with its report.
        round_: the clients.
        updates: module -> dense update to compare with dW, the whole update when None.
    """
    for module, row in result.report.items():
        ideal = round_.ideal(module)
        size, scale = norm(ideal), round_.scale(module, result.rule.name)
        found = whole_update(result, module) if updates is None else updates[module]
        error = norm(ideal - found)
        stacked_rank = sum(b.shape[1] for b in round_.of(module)[0])
        noise = math.sqrt(GRAM_TERMS * stacked_rank * EPS[torch.float64]) * scale
        dtype = result.adapter.factors[module].b.dtype
        bound = noise + PRODUCT_ROUNDINGS * EPS[dtype] * (scale + norm(found))
        assert abs(row.norm - size) <= noise, f"{module}: norm {row.norm}, dense {size}"
        if row.norm == 0:
            assert (row.relative_error, row.svd_floor) == (0, 0), f"{module}: {row}"
        if size <= noise:  # canceled updates: test_report says what their rows must be
            continue
        assert abs(row.relative_error * size - error) <= bound, (
            f"{module}: reported error {row.relative_error}, dense {error / size}"
        )
        tail = float(torch.linalg.svdvals(ideal)[row.rank :].square().sum().sqrt())
        assert abs(row.svd_floor * size - tail) <= noise, (
            f"{module}: reported floor {row.svd_floor}, dense {tail / size}"
        )
        assert row.energy == 1 - row.relative_error**2


def write(folder: Path, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]) -> Path:
    """A PEFT adapter folder, written without the library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: x.contiguous() for key, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(dict(fields)))
    return folder


def write_client(folder: Path, client: Mapping[str, Drawn], **changes: Any) -> Path:
    """One client's folder."""
    return write(folder, state(client), client_config(client, **changes))
