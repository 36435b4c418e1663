"""`fedlora inspect`: what adapters hold, the spectra of their aggregate, and how alike they are."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from fedlora_kernels.cli import screen
from fedlora_kernels.cli.program import bad_input, require_torch
from fedlora_kernels.cli.rule_options import NUMBERS, numbers

if TYPE_CHECKING:
    from fedlora_kernels._inspect import Inspection, ModuleSpectrum

# The similarity of more clients than this is summed up instead of printed as a matrix.
_MATRIX = 12
_TOP = 3


@click.command
@click.argument("adapters", nargs=-1, required=True, metavar="DIR...")
@click.option(
    "--plot", metavar="FILE", help="Draw the spectra and the similarities (.png, .pdf, .svg)."
)
@click.option(
    "--weights",
    type=numbers,
    metavar=NUMBERS,
    help="The clients' weights.  [default: equal weights]",
)
@click.option(
    "--energy",
    type=numbers,
    metavar=NUMBERS,
    help="Shares of the energy to find ranks for.  [default: 0.8,0.9,0.95,0.99]",
)
@click.option(
    "--pickled",
    is_flag=True,
    help="Read adapter_model.bin where there are no safetensors; no code of the file runs.",
)
@click.option("--modules", is_flag=True, help="List every module instead of projections.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def inspect(
    adapters: Sequence[str],
    plot: str | None,
    weights: Sequence[float] | None,
    energy: Sequence[float] | None,
    pickled: bool,
    modules: bool,
    as_json: bool,
) -> None:
    """Show what adapters hold and how alike they are.

    Every DIR is a PEFT adapter folder or a folder of mlx-lm. The spectra are those of the ideal
    aggregate, the weighted sum of the clients' updates s_k B_k A_k; the similarity is the cosine
    between two clients' updates over all modules. A client is flagged if it is farther than twice
    the median distance from the geometric median of all.
    """
    require_torch()
    from fedlora_kernels._inspect import ENERGIES
    from fedlora_kernels._inspect import inspect as look

    if plot is not None:
        _refuse_plot(plot)
    loaded = screen.load(adapters, pickled=pickled)
    with screen.working("Inspecting"), bad_input():
        found = look(loaded, weights=weights, energies=energy or ENERGIES)
    if plot is not None:
        _draw(found, plot)
    if as_json:
        screen.print_json(_described(found))
        return
    console = screen.out()
    screen.show(console, _clients(found))
    if found.modules:
        screen.show(console, _spectra(found, modules, console.width >= screen.NARROW))
    if len(found.clients) > 1:
        few = len(found.clients) <= _MATRIX
        screen.show(console, _matrix(found) if few else _summary(found))
        if found.outliers:
            screen.show(console, _outliers(found))
    for note in found.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)
    if plot is not None:
        console.print(Text(f"Figure written to {plot}"), soft_wrap=True)


def _refuse_plot(path: str) -> None:
    """Refuse a figure that cannot be drawn or written, before any work."""
    from fedlora_kernels.cli.program import BadInput, require_writable

    try:
        from fedlora_kernels import plot
    except ImportError:
        raise BadInput(
            "--plot needs matplotlib, which is not installed: pip install fedlora_kernels[plot]"
        ) from None
    with bad_input():
        plot.check(path)
    require_writable(path)


def _draw(found: "Inspection", path: str) -> None:
    from fedlora_kernels import plot

    with screen.working("Drawing"), bad_input():
        plot.save(found, path)


def _described(found: "Inspection") -> dict[str, Any]:
    described = dataclasses.asdict(found)
    for name, module in found.modules.items():
        described["modules"][name]["numerical_rank"] = module.numerical_rank
    return described


def _clients(found: "Inspection") -> Table:
    bases = {client.base_model for client in found.clients}
    title = "Adapters"
    if len(bases) == 1:
        title += f" of {next(iter(bases)) or 'an unnamed base model'}"
    several = ["base model"] if len(bases) > 1 else []
    headings = ("kind", "modules", "ranks", "scalings", "dtype", "bytes", "weight", "norm")
    table = screen.table("", "adapter", *several, numbers=headings, title=title)
    for index, client in enumerate(found.clients):
        beside = f" + {client.extras}" if client.extras else ""
        table.add_row(
            str(index),
            Text(client.name),
            *[Text(client.base_model or "-") for _ in several],
            client.kind,
            f"{client.modules}{beside}",
            _listed(client.ranks),
            _listed(client.scalings) or "-",
            ", ".join(client.dtypes),
            screen.size(client.bytes),
            f"{client.weight:.3g}",
            _known(client.norm, screen.number),
        )
    return table


def _listed(values: Sequence[float]) -> str:
    """A few values one by one, more as a range."""
    if len(values) <= 4:
        return ", ".join(map(screen.number, values))
    return f"{screen.number(values[0])}-{screen.number(values[-1])}"


def _known(value: float, form: Any) -> str:
    return "-" if math.isnan(value) else str(form(value))


def _spectra(found: "Inspection", every_module: bool, wide: bool) -> Table:
    kind = "module" if every_module else "projection"
    title = f"Ideal aggregate by {kind}"
    headings = ["size"] if wide else []
    headings += ["‖ΔW‖", "rank", *(f"rank at\n{energy:g}" for energy in found.energies)]
    headings += ["largest\nsingular values" if wide else "largest\nvalue"]
    if not every_module:
        title += " (means; largest in brackets)"
        headings.insert(0, "modules")
    table = screen.table(kind, numbers=headings, title=title)
    for name, group in _groups(found, every_module):
        ranks = [[module.ranks[energy] for module in group] for energy in found.energies]
        table.add_row(
            Text(name),
            *([] if every_module else [str(len(group))]),
            *([_sizes(group)] if wide else []),
            screen.number(sum(module.norm for module in group) / len(group)),
            _mean_and_max([module.numerical_rank for module in group]),
            *map(_mean_and_max, ranks),
            ", ".join(f"{value:.3g}" for value in _top(group, _TOP if wide else 1)) or "0",
        )
    return table


def _groups(
    found: "Inspection", every_module: bool
) -> Iterator[tuple[str, tuple["ModuleSpectrum", ...]]]:
    if every_module:
        for name, module in found.modules.items():
            yield name, (module,)
    else:
        for projection in found.projections:
            yield projection.name, projection.modules


def _sizes(group: Sequence["ModuleSpectrum"]) -> str:
    sizes = {module.size for module in group}
    rows, columns = next(iter(sizes))
    return f"{rows} x {columns}" if len(sizes) == 1 else f"{len(sizes)} sizes"


def _top(group: Sequence["ModuleSpectrum"], most: int) -> list[float]:
    """The means of the leading singular values."""
    longest = max(module.numerical_rank for module in group)
    return [
        sum(module.sigma[index] for module in group if index < module.numerical_rank) / len(group)
        for index in range(min(most, longest))
    ]


def _mean_and_max(values: Sequence[int]) -> str:
    mean, most = sum(values) / len(values), max(values)
    return str(most) if mean == most else f"{mean:.1f} ({most})"


def _matrix(found: "Inspection") -> Table:
    numbers = list(map(str, range(len(found.clients))))
    title = "Cosine between the clients' updates"
    table = screen.table("client", numbers=numbers, title=title)
    for index, (client, row) in enumerate(zip(found.clients, found.similarity, strict=True)):
        table.add_row(Text(f"{index} {client.name}"), *(_known(v, "{:.3f}".format) for v in row))
    return table


def _summary(found: "Inspection") -> Table:
    """For each client how alike the others are; the whole matrix is in the figure and in JSON."""
    table = screen.table(
        "client",
        numbers=("mean", "least", "with", "most", "with"),
        title="Cosine to the other clients' updates",
        caption="the whole matrix: --plot FILE or --json",
    )
    for index, (client, row) in enumerate(zip(found.clients, found.similarity, strict=True)):
        others = [(v, k) for k, v in enumerate(row) if k != index and not math.isnan(v)]
        cells = ["-"] * 5
        if others:
            (least, far), (most, near) = min(others), max(others)
            mean = sum(value for value, _ in others) / len(others)
            cells = [f"{mean:.3f}", f"{least:.3f}", str(far), f"{most:.3f}", str(near)]
        table.add_row(Text(f"{index} {client.name}"), *cells)
    return table


def _outliers(found: "Inspection") -> Table:
    table = screen.table(
        "client",
        numbers=("norm", "cosine to the mean", "distance to the\ngeometric median", "flagged"),
        title="Outliers",
        caption="flagged: farther than twice the median distance; a reason to look, and no proof",
    )
    for index, (client, row) in enumerate(zip(found.clients, found.outliers, strict=True)):
        table.add_row(
            Text(f"{index} {client.name}"),
            screen.number(row.norm),
            _known(row.cosine, "{:.3f}".format),
            screen.number(row.distance),
            "yes" if row.flagged else "no",
        )
    return table
