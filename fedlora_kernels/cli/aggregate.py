"""`fedlora aggregate`: the clients' adapter folders in, the global adapter's folder out."""

import dataclasses
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from fedlora_kernels import robust as robust_rules
from fedlora_kernels import rules
from fedlora_kernels.adapters import folder
from fedlora_kernels.cli import screen
from fedlora_kernels.cli.program import BadInput, bad_input, require_torch, require_writable
from fedlora_kernels.cli.rule_options import NUMBERS, ROBUST, RULES, RuleCommand, flag, numbers

if TYPE_CHECKING:
    import torch

    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels._processes import Processes
    from fedlora_kernels.gram_space.report import CurvePoint, ModuleReport, Report

# More modules than this are summed up by projection unless --modules asks for all.
_ROWS = 16

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _names(chosen: Iterable[type[rules.Rule]]) -> str:
    return ", ".join(rule.name for rule in chosen)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _bytes(text: str) -> int:
    """2GB, 500MB, 64kB or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKmMgG]?[bB])?", text)
    unit = "" if found is None else (found[2] or "B")
    size = 0 if found is None else int(float(found[1]) * _UNITS[unit[:-1].upper() + "B"])
    if size < 1:
        raise click.BadParameter(f"{text!r} is not a size such as 2GB or 500MB")
    return size


@click.command(cls=RuleCommand)
@click.argument("clients", nargs=-1, required=True, metavar="CLIENT...")
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    help="Folder for the global adapter; an adapter there is replaced.",
)
@click.option(
    "--rule",
    default=rules.preferred(),
    metavar="NAME",
    help="Aggregation rule, see `fedlora rules`.",
)
@click.option(
    "--weights",
    type=numbers,
    metavar=NUMBERS,
    help="The clients' weights, such as their numbers of examples, in the order of the clients.  "
    "[default: equal weights]",
)
@click.option(
    "--robust",
    metavar="NAME",
    help="Weigh the clients by a robust rule first, so that a few cannot spoil the result: "
    f"{', '.join(robust_rules.names())}.",
)
@click.option("--device", help="Where to compute: cpu, cuda, cuda:1, ...")
@click.option(
    "--absent",
    type=click.Choice(["zero", "renormalize"]),
    default="zero",
    help="A client that lacks a module: its update counts as zero there, or its weight goes to the "
    "other clients.",
)
@click.option(
    "--precision",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    help="exact: add up in float64; fast: add up short sums in float32, then these in float64.",
)
@click.option(
    "--uniform-rank",
    is_flag=True,
    help="One rank and one alpha for all modules, for inference servers that ignore rank_pattern "
    "and alpha_pattern.",
)
@click.option(
    "--dtype", type=click.Choice(_DTYPES), help="Dtype of the result.  [default: the clients']"
)
@click.option(
    "--heads",
    type=click.Choice(["average", "local"]),
    help="Tensors beside the factors, such as classification heads: average them, or leave each "
    "client its own.  [default: local under "
    f"{_names(rule for rule in map(rules.find, rules.names()) if rule.personal)}, else average]",
)
@click.option(
    "--same-base",
    is_flag=True,
    help="Do not check that the clients' configs name the same base model.",
)
@click.option(
    "--magnitudes",
    type=click.Choice(["average"]),
    help="Admit DoRA: the rule aggregates the directions, and the magnitudes are averaged.  "
    "[default: refuse DoRA]",
)
@click.option(
    "--pickled",
    is_flag=True,
    help="Read adapter_model.bin where a client has no safetensors; no code of the file runs.",
)
@click.option(
    "--memory-limit",
    type=_bytes,
    metavar="SIZE",
    help="Memory for the modules that are processed at one time, such as 2GB or 500MB. Modules are "
    "processed in groups, and each group's result is put on disk.  [default: no limit]",
)
@click.option("--modules", is_flag=True, help="List every module, however many there are.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
@click.pass_context
def aggregate(
    context: click.Context,
    clients: Sequence[str],
    out: str,
    rule: str,
    weights: Sequence[float] | None,
    robust: str | None,
    device: str | None,
    absent: str,
    precision: str,
    uniform_rank: bool,
    dtype: str | None,
    heads: str | None,
    same_base: bool,
    magnitudes: str | None,
    pickled: bool,
    memory_limit: int | None,
    modules: bool,
    as_json: bool,
) -> None:
    """Combine the clients' adapters into one.

    Every CLIENT is a PEFT adapter folder (adapter_config.json and adapter_model.safetensors) or a
    folder of mlx-lm. DIR becomes a PEFT adapter folder that holds the global adapter and the rank
    and error of every module (report.json). If the clients receive different adapters, client N
    (from 0) finds its own in DIR/clients/N. If a rule has a residual, which is to be merged into
    the base model, it is in DIR/residual.

    Started by torchrun (torchrun --nproc-per-node 4 -m fedlora_kernels aggregate ...), several
    processes share the modules out. The first of them writes DIR.
    """
    require_torch()
    options = RULES.given(context, rule)
    guard = _robust(context, robust)
    _refuse_out(out, clients)
    place = None if device is None else _device(device)

    start = time.perf_counter()
    with _processes(place) as processes:
        with processes.alike():
            adapters = screen.load(clients, pickled=pickled, numbers=processes.alone)
        with screen.working(f"Aggregating with {rule}"), bad_input():
            result = _call(
                adapters,
                rule=rule,
                weights=weights,
                robust=guard,
                device=place,
                absent=absent,
                precision=precision,
                uniform_rank=uniform_rank,
                dtype=dtype,
                heads=heads,
                same_base=same_base,
                magnitudes=magnitudes,
                memory_limit=memory_limit,
                scratch=next(p for p in Path(os.path.realpath(out)).parents if p.exists()),
                progress=_tell if memory_limit is not None and processes.first else None,
                group=processes.group,
                options=options,
            )
    if not processes.first:
        return
    with screen.working(f"Writing {out}"):
        _save(result, out)
    seconds = time.perf_counter() - start

    if as_json:
        screen.print_json(_described(result, out, seconds))
    else:
        _show(result, out, seconds, modules)


def _robust(context: click.Context, name: str | None) -> robust_rules.Robust | None:
    if name is not None:
        with bad_input():
            return robust_rules.make(name, **ROBUST.given(context, name))
    for option in ROBUST.all_given(context):
        raise BadInput(f"{flag(ROBUST.prefix + option)} needs --robust NAME")
    return None


@contextmanager
def _processes(device: "torch.device | None") -> "Iterator[Processes]":
    """Those that torchrun started, or this one. An error of all of them is told by the first."""
    import torch

    from fedlora_kernels._processes import Processes, launched

    with bad_input(), launched(device or torch.device("cpu")) as group:
        processes = Processes(group)
        try:
            yield processes
        except BadInput as error:
            if processes.first or isinstance(error.__cause__, ConnectionError):
                raise
            raise click.exceptions.Exit(BadInput.exit_code) from error


def _tell(done: int, total: int) -> None:
    click.echo(f"{done} of {total} modules", err=True)


def _refuse_out(out: str, clients: Sequence[str]) -> None:
    """Refuse an output folder that cannot be written, or would destroy a client's folder."""
    target = Path(os.path.realpath(out))
    for client in clients:
        source = Path(os.path.realpath(client))
        relation = "is" if target == source else ""
        relation = "contains" if target in source.parents else relation
        relation = "is inside" if source in target.parents else relation
        if relation:
            raise BadInput(
                f"--out {out} {relation} the client folder {client}; choose another folder"
            )
    here = Path.cwd().resolve()
    if target == here or target in here.parents:
        relation = "is" if target == here else "contains"
        raise BadInput(f"--out {out} {relation} the working directory; choose another folder")
    require_writable(out)
    with bad_input():
        folder.refuse_foreign(Path(out))


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"--device {name} cannot be used: {reason}") from error
    return device


def _call(
    adapters: Sequence[Any], *, dtype: str | None, options: Mapping[str, Any], **rest: Any
) -> "Aggregation":
    import torch

    from fedlora_kernels._aggregate import aggregate as combine

    chosen = None if dtype is None else getattr(torch, dtype)
    return combine(adapters, dtype=chosen, **rest, **options)


def _save(result: "Aggregation", out: str) -> None:
    from safetensors import SafetensorError

    from fedlora_kernels.adapters.error import AdapterError

    try:
        result.save(out)
    except AdapterError as error:  # the report takes a pass of its own
        raise BadInput(str(error)) from error
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk its own way
        raise BadInput(f"{out} cannot be written: {error}") from error


def _described(result: "Aggregation", out: str, seconds: float) -> dict[str, Any]:
    from fedlora_kernels.adapters.agreement import absent

    report, lacking = result.report, absent(result.clients)
    return {
        "rule": result.rule.name,
        "clients": [adapter.name for adapter in result.clients],
        **({"absent": lacking} if lacking else {}),
        **dict(_notes(result, out)),
        **({} if result.weighing is None else {"robust": result.weighing.as_dict()}),
        "modules": report.as_dict(),
        "mean": {
            "rank": report.mean_rank,
            **({} if result.residual is None else _ranks(result)),
            "energy": report.energy,
            "relative_error": report.relative_error,
            "svd_floor": report.svd_floor,
        },
        "curve": [dataclasses.asdict(point) for point in result.curve],
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "seconds": seconds,
        "out": out,
    }


def _show(result: "Aggregation", out: str, seconds: float, every_module: bool) -> None:
    from fedlora_kernels.adapters.agreement import absent
    from fedlora_kernels.adapters.peft_format import label, listed

    console, report = screen.out(), result.report
    if report:
        summed_up = len(report) > _ROWS and not every_module
        screen.show(console, _by_projection(report) if summed_up else _by_module(report))
    if result.curve:
        screen.show(console, _curve(result.curve))
    if result.weighing is not None:
        screen.show(console, _weighing(result.weighing))
    clients, modules = (
        screen.counted(len(result.clients), "client"),
        screen.counted(len(report), "module"),
    )
    parts = [f"{result.rule.title}, {clients}, {modules}"]
    if report:
        numbers = (
            f"energy {screen.share(report.energy)}, relative error "
            f"{screen.share(report.relative_error)} (SVD floor {screen.share(report.svd_floor)})"
        )
        if result.residual is None:
            parts.append(f"mean rank {screen.number(report.mean_rank)}, {numbers}")
        else:
            adapter, residual = map(screen.number, _ranks(result).values())
            parts.append(f"mean rank {adapter}, residual of mean rank {residual}")
            parts.append(f"adapter and residual together: {numbers}")
    parts.append(
        f"per client {screen.spread(result.bytes_up, screen.size)} up, "
        f"{screen.spread(result.bytes_down, screen.size)} down"
    )
    parts += [f"{seconds:.2f} s", f"written to {out}"]
    console.print(Text("; ".join(parts)), soft_wrap=True)
    for kind, note in _notes(result, out):
        console.print(Text(f"{kind.replace('_', ' ')}: {note}"), soft_wrap=True)
    for index, missing in absent(result.clients).items():
        who = label(index, result.clients[index].name)
        console.print(
            Text(f"note: {who} lacks {len(missing)} modules: {listed(missing)}"), soft_wrap=True
        )


def _ranks(result: "Aggregation") -> dict[str, float]:
    """The mean ranks of the adapter and of the residual, each by itself."""
    parts = {"adapter_rank": result.adapter, "residual_rank": result.residual}
    return {
        name: _mean([factors.rank for factors in part.factors.values()])
        for name, part in parts.items()
        if part is not None
    }


def _notes(result: "Aggregation", out: str) -> list[tuple[str, str]]:
    """What the numbers do not say: the rule's note, how the next round starts, what is lost."""
    rule, notes = result.rule, []
    if result.report.note:
        notes.append(("note", result.report.note))
    start = f"{out}/clients/N (client N, from 0)" if result.delivery.differs else out
    if result.residual is not None:
        merged = f"merge {out}/residual into the base model, then start the clients from {start}"
        notes.append(("next_round", merged))
    elif rule.after == "merge":
        merged = f"merge {out} into the base model, then start the clients from new adapters"
        notes.append(("next_round", f"{merged} (B = 0)"))
    elif result.delivery.differs:
        notes.append(("next_round", f"start the clients from {start}"))
    if result.carried is not None:
        notes.append(
            (
                "memory",
                f"{rule.title} remembers earlier rounds, but the command line carries nothing from "
                "round to round: this is the result of a first round. In Python, give "
                "aggregate(..., carried=last.carried), where last is the last round's result",
            )
        )
    return notes


def _by_module(report: "Report") -> Table:
    headings = ("rank", "energy", "relative error", "SVD floor")
    table = screen.table("module", numbers=headings, title="Aggregate by module")
    for module, row in report.items():
        shares = (row.energy, row.relative_error, row.svd_floor)
        table.add_row(Text(module), str(row.rank), *map(screen.share, shares))
    return table


def _by_projection(report: "Report") -> Table:
    from fedlora_kernels._inspect import projection_names

    groups: dict[str, list[ModuleReport]] = {}
    for module, name in projection_names(report).items():
        groups.setdefault(name, []).append(report[module])
    columns = ("rank mean", "rank max", "energy mean", "energy min", "error mean", "error max")
    headings = ["modules", *columns, "floor mean", "floor max"]
    table = screen.table(
        "projection",
        numbers=["\n".join(heading.rsplit(" ", 1)) for heading in headings],
        title="Aggregate by projection (relative error; floor: SVD of the same rank)",
        caption="--modules lists every module",
    )
    for name, rows in groups.items():
        cells = [screen.number(_mean([row.rank for row in rows])), str(max(r.rank for r in rows))]
        energies = [row.energy for row in rows]
        cells += [screen.share(_mean(energies)), screen.share(min(energies))]
        for field in ("relative_error", "svd_floor"):
            values = [getattr(row, field) for row in rows]
            cells += [screen.share(_mean(values)), screen.share(max(values))]
        table.add_row(Text(name), str(len(rows)), *cells)
    return table


def _weighing(weighing: robust_rules.Weighing) -> Table:
    numbers = ("norm", "weight given", "weight", "scale")
    table = screen.table(
        "", "client", numbers=numbers, title=f"Clients as {weighing.robust.title} weighs them"
    )
    for index, client in enumerate(weighing.clients):
        values = (client.norm, client.given, client.weight, client.scale)
        table.add_row(str(index), Text(client.name), *map(screen.number, values))
    return table


def _curve(points: "Sequence[CurvePoint]") -> Table:
    headings = ("energy", "mean rank", "relative error", "parameters")
    table = screen.table(numbers=headings, title="Rank against error")
    for point in points:
        table.add_row(
            f"{point.energy:g}",
            screen.number(point.mean_rank),
            screen.share(point.relative_error),
            f"{point.parameters:,}",
        )
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
