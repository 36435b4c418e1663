"""`fedlora doctor`: the installation, the backend in use, and whether its results are right."""

import os
import platform
from collections.abc import Iterator

import click
from rich.table import Table
from rich.text import Text

from fedlora_kernels import __version__
from fedlora_kernels.cli import screen

# The factors are float64, so an aggregate at full energy is right to rounding.
_TOLERANCE = 1e-12


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print JSON, to be pasted into a bug report.")
def doctor(as_json: bool) -> None:
    """Report the installation and run one small aggregation."""
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
    if as_json:
        rows = {name: {"usable": usable, "why": why} for name, (usable, why) in backends.items()}
        content = {"facts": facts, "backends": rows, "refusal": refusal, "self_check": verdicts}
        screen.print_json(content)
    else:
        _show(facts, backends, refusal, verdicts)
    if not all(verdict.startswith("ok") for verdict in verdicts.values()):
        raise click.exceptions.Exit(1)


def _show(
    facts: dict[str, str],
    backends: dict[str, tuple[str, str]],
    refusal: str | None,
    verdicts: dict[str, str],
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
