"""Every rule in a group, compared with one process by process 0; and the errors of bad input.

Prints JSON: what differs by rule, and the message of every error by what was wrong.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from federation import FIXED_A
from group import joined
from vera import vera_clients

import fedlora_kernels as flk
from fedlora_kernels.gram_space import batches

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((rule, {}) for rule in flk.rules.names()),
    ("florist", {"rank_budget": 40, "energies": (0.5, 0.9, 0.99)}),
    ("florist", {"uniform_rank": True, "dtype": torch.bfloat16, "precision": "fast"}),
    ("flexlora", {"rank": 6, "absent": "renormalize"}),
    ("fedex", {"residual_rank": 3}),
    ("fedmomentum", {"momentum": 0.5}),
    ("flora_na", {"shared": True}),
    ("flora_na", {"around": "last"}),
    ("hetlora", {"per_module": True}),
    ("hetlora", {"example_weighted": True}),
    ("lora_a2", {"budget": 2}),
)

Clients = Sequence[flk.Adapter | str | Path]


def said(result: flk.Aggregation) -> dict[str, Any]:
    """All of a result."""
    parts = [result.adapter, result.residual, result.kept]
    means = (result.report.relative_error, result.report.svd_floor, result.report.mean_rank)
    return {
        "tensors": [None if part is None else part.state_dict() for part in parts],
        "configs": [None if part is None else part.config for part in parts],
        "report": repr((result.report.as_dict(), means)),
        "curve": [asdict(point) for point in result.curve],
        "client": result.client_adapter(1).state_dict(),
    }


def same(one: Any, other: Any) -> bool:
    """To the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def compared(group: Any, clients: Clients, rule: str, **options: Any) -> tuple[list[str], Any]:
    """What of the group's result differs from that of one process; and what that one carries."""
    first = group.rank() == 0
    expected = flk.aggregate(clients, rule=rule, **options) if first else None
    result = flk.aggregate(clients, rule=rule, group=group, **options)
    if expected is None:
        try:
            return [f"{result.adapter} is here, too"], None
        except RuntimeError as error:
            return [] if "is in process 0" in str(error) else [str(error)], None
    mine, theirs = said(result), said(expected)
    return [key for key in theirs if not same(mine[key], theirs[key])], expected.carried


def message(call: Callable[[], Any]) -> str:
    """What an error says."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def rules(group: Any, folder: Path, options_of_all: Mapping[str, Any]) -> dict[str, list[str]]:
    """What differs, by rule and options; a second round follows where something is carried."""
    differ = {}
    for rule, options in CASES:
        kind = "common" if rule in FIXED_A else "own"
        folders = sorted((folder / kind).iterdir())
        wrong, carried = compared(group, folders, rule, **options_of_all, **options)
        carries = torch.tensor([carried is not None])
        torch.distributed.broadcast(carries, 0)
        if carries:
            clients = [flk.Adapter.load(path) for path in folders]
            again, _ = compared(group, clients, rule, carried=carried, **options_of_all, **options)
            wrong += again
        differ[f"{rule} {options}"] = wrong
    return differ


def main() -> None:
    group, folder = joined()
    differ = rules(group, folder, {"weights": (50, 20, 30)})
    odd = rules(group, folder / "odd", {"weights": (50, 20, 30)})
    differ |= {f"odd ranks: {case}": wrong for case, wrong in odd.items()}
    limited = {"memory_limit": 1, "scratch": str(folder), "weights": (1, 0, 2)}
    own = sorted((folder / "own").iterdir())
    differ["a memory limit"], _ = compared(group, own, "florist", energy=1.0, **limited)
    differ["absent modules"], _ = compared(
        group, sorted((folder / "absent").iterdir()), "hetlora", absent="renormalize"
    )
    differ["one module"], _ = compared(group, sorted((folder / "one").iterdir()), "florist")
    differ["vectors"], _ = compared(group, vera_clients(), "fedsa")
    batches.WIDE_RANK = 8
    differ["wide"], _ = compared(group, own, "florist")

    def refused(name: str, rule: str, **options: Any) -> str:
        clients = sorted((folder / name).iterdir())
        return message(lambda: flk.aggregate(clients, rule=rule, group=group, **options))

    errors = {
        "nan": refused("nan", "florist"),
        "nan averaged": refused("nan", "fedit"),
        "a head of nan": refused("head", "fedit"),
        "a missing file": refused("missing", "fedit"),
        "another A": refused("own", "ffa"),
        "neither is common": refused("own", "rolora"),
        "sizes": refused("sizes", "florist"),
        "budget": refused("own", "florist", rank_budget=1),
        "option": refused("own", "florist", color="red"),
        "overflow": refused("large", "fedit", dtype=torch.float16),
        "one process has a problem": message(
            lambda: flk.aggregate(
                own if group.rank() != 1 else [*own[:2], folder / "nobody"],
                rule="fedit",
                group=group,
            )
        ),
    }
    print(json.dumps({"differ": differ, "errors": errors}))


if __name__ == "__main__":
    main()
