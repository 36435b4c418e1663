"""`fedlora doctor`: the installation, the backend in use, the solvers that it chooses, and whether
its results are right.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from fedlora_kernels import __version__
from fedlora_kernels.backends.solver import DTYPES
from fedlora_kernels.cli import screen

if TYPE_CHECKING:
    from fedlora_kernels._solvers import Solvers

# The factors are float64, so an aggregate at full energy is right to rounding.
_TOLERANCE = 1e-12


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print JSON, to be pasted into a bug report.")
@click.option(
    "--rank",
    "ranks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(64, 128, 256, 512, 1024),
    show_default=True,
    help="Stacked rank R whose solver is named; may be repeated.",
)
@click.option("--modules", type=click.IntRange(min=1), default=224, show_default=True)
@click.option(
    "--size", type=click.IntRange(min=1), nargs=2, default=(4096, 4096), show_default=True
)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True
)
def doctor(
    as_json: bool,
    ranks: tuple[int, ...],
    modules: int,
    size: tuple[int, int],
    dtype: str,
    energy: float,
) -> None:
    """Report the installation, name the solvers that would be used, and run one small aggregation.

    A solver is named for each stacked rank R, for --modules modules of --size M N with factors of
    --dtype, where --energy is to be kept.
    """
    from fedlora_kernels.backends import backend, ordered

    facts = dict(_facts())
    refusal = None
    try:
        active = backend()
    except RuntimeError as error:  # FEDLORA_BACKEND names one that cannot be used
        active, refusal = "", str(error)
    backends = {
        one.name: ("active" if one.name == active else "yes" if one.serves else "no", one.reason)
        for one in ordered()
    }
    verdicts = {device: _verdict(device) for device in _devices()} if _has_torch() else {}
    chosen = {}
    if verdicts and refusal is None:
        from fedlora_kernels._solvers import solvers

        chosen = {
            device: {
                rank: solvers(
                    rank, modules=modules, size=size, dtype=dtype, device=device, energy=energy
                )
                for rank in ranks
            }
            for device in verdicts
        }
    if as_json:
        rows = {name: {"usable": usable, "why": why} for name, (usable, why) in backends.items()}
        named = {
            device: {str(rank): asdict(answer) for rank, answer in answers.items()}
            for device, answers in chosen.items()
        }
        content = {
            "facts": facts,
            "backends": rows,
            "refusal": refusal,
            "solvers": named,
            "self_check": verdicts,
        }
        screen.print_json(content)
    else:
        _show(facts, backends, refusal)
        what = f"{modules} modules of {size[0]} x {size[1]}, {dtype}, energy {energy:g}"
        for device, answers in chosen.items():
            _show_solvers(device, answers, what)
        _show_verdicts(verdicts)
    if not all(verdict.startswith("ok") for verdict in verdicts.values()):
        raise click.exceptions.Exit(1)


def _show(
    facts: dict[str, str],
    backends: dict[str, tuple[str, str]],
    refusal: str | None,
) -> None:
    console = screen.out()
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(name, style="bold"), Text(value))
    console.print(grid)
    console.print()

    table = screen.table("backend", "usable", "why", title="Backends, best first")
    if refusal is not None:
        console.print(Text(refusal), soft_wrap=True)
    for name, (usable, why) in backends.items():
        table.add_row(Text(name), usable, Text(why))
    screen.show(console, table)


def _show_solvers(device: str, answers: dict[int, "Solvers"], what: str) -> None:
    backend = next(iter(answers.values())).backend
    title = f"Solvers of {backend} on {device}: {what}"
    table = screen.table("R", "at once", "solver", "for R", "limits from", title=title)
    for rank, answer in answers.items():
        for index, step in enumerate(answer.steps):
            first, last = step.ranks
            table.add_row(
                str(rank) if index == 0 else "",
                str(answer.modules_at_once) if index == 0 else "",
                Text(step.solver),
                f"{first} and more" if last is None else f"{first} to {last}",
                Text(step.source),
            )
    screen.show(screen.out(), table)


def _show_verdicts(verdicts: dict[str, str]) -> None:
    console = screen.out()
    if not verdicts:
        console.print("Self-check: left out, torch is missing (pip install torch)")
    for device, verdict in verdicts.items():
        console.print(Text(f"Self-check on {device}: {verdict}"), soft_wrap=True)


def _facts() -> Iterator[tuple[str, str]]:
    yield "fedlora_kernels", __version__
    yield "Python", f"{platform.python_version()} ({platform.platform()})"
    yield "torch", _torch()
    if _has_torch():
        yield "CUDA device", _cuda()
    for package in ("triton", "peft", "numpy", "jax", "flwr"):
        yield package, _version(package)
    yield "threads", _threads()
    yield "FEDLORA_BACKEND", os.environ.get("FEDLORA_BACKEND") or "not set"


def _has_torch() -> bool:
    try:
        import torch  # noqa: F401 - only asked for
    except ImportError:
        return False
    return True


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch() -> str:
    if not _has_torch():
        return "missing: aggregate, inspect and rules need it (pip install torch)"
    import torch

    if torch.version.hip:
        return f"{torch.__version__} (built for ROCm {torch.version.hip})"
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"{torch.__version__} (built {built})"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(found)


def _threads() -> str:
    cores = f"{os.cpu_count()} cores"
    if not _has_torch():
        return cores
    import torch

    return f"{torch.get_num_threads()} of {cores}"


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _verdict(device: str) -> str:
    try:
        error = _self_check(device)
    except Exception as problem:  # whatever a broken installation raises is the finding
        return f"FAILED with {type(problem).__name__}: {problem}"
    if not error <= _TOLERANCE:
        return f"FAILED, relative error {error:.1e}, expected at most {_TOLERANCE:g}"
    return f"ok, relative error {error:.1e}"


def _self_check(device: str) -> float:
    """The relative error of FLoRIST at full energy for two small clients of different ranks."""
    import torch

    from fedlora_kernels._aggregate import aggregate
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.rules import preferred

    generator = torch.Generator().manual_seed(0)
    clients = []
    for rank in (2, 3):
        state = {
            "base_model.model.layer.lora_A.weight": torch.randn(rank, 7, generator=generator),
            "base_model.model.layer.lora_B.weight": torch.randn(5, rank, generator=generator),
        }
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4}
        double = {key: tensor.double() for key, tensor in state.items()}
        clients.append(Adapter.from_state_dict(double, config))
    result = aggregate(clients, rule=preferred(), energy=1.0, weights=[3, 1], device=device)
    ideal = 0.75 * clients[0].delta("layer") + 0.25 * clients[1].delta("layer")
    return float((result.adapter.delta("layer").cpu() - ideal).norm() / ideal.norm())
