"""Which backend serves: forced ones, nonsense, and an installation without torch."""

import json
from pathlib import Path

import pytest
from processes import copy_sources, run

import fedlora_kernels as flk
from fedlora_kernels.backends import libraries

ERRORS = """
import json, torch
import fedlora_kernels as flk

generator = torch.Generator().manual_seed(5)
clients = [
    flk.Adapter.from_state_dict(
        {
            "base_model.model.q.lora_A.weight": torch.randn(3, 17, generator=generator),
            "base_model.model.q.lora_B.weight": torch.randn(11, 3, generator=generator),
        },
        {"peft_type": "LORA", "r": 3, "lora_alpha": 3 * (1 + k)},
    )
    for k in range(3)
]
errors = {
    rule: flk.aggregate(clients, rule=rule, weights=[1, 2, 3]).report["q"].relative_error
    for rule in ("fedit", "flora", "flexlora", "florist", "flora_na", "hetlora")
}
print(json.dumps([flk.backend(), errors]))
"""


EMULATED = libraries.library("fedlora_cuda_emulated") is not None


def test_forced_backends_serve_and_agree() -> None:
    results = {}
    for name in ("composed", "reference", *(["cuda-emulated"] if EMULATED else [])):
        done = run(ERRORS, name)
        assert done.returncode == 0, done.stderr
        served, results[name] = json.loads(done.stdout)
        assert served == name
    for name, errors in results.items():
        for rule, error in errors.items():
            room = 1e-3 if rule == "flora_na" else 1e-7  # two solvers stop at different distances
            assert abs(error - results["reference"][rule]) <= room, (name, rule)


def test_nonsense_raises_with_what_can_serve() -> None:
    done = run("import fedlora_kernels.ops", "quantum")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: FEDLORA_BACKEND=quantum cannot serve")
    serving = [item.name for item in flk.backends.ordered() if item.serves]
    assert "composed" in serving
    assert all(name in last.partition("these can: ")[2].split(", ") for name in serving)


def test_backends_are_described() -> None:
    assert flk.backend() in {item.name for item in flk.backends.ordered() if item.serves}
    assert all(item.reason for item in flk.backends.ordered())
    names = [item.name for item in flk.backends.ordered()]
    assert len(names) == len(set(names))


NEW_BACKEND = '''"""``columns``: weighted sums on the CPU, one client after the other."""

from typing import TYPE_CHECKING

from fedlora_kernels.backends.base import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.ops.operator import Operators


class Columns(Backend):
    """``weighted_sum`` for tensors on the CPU; the other operators are composed."""

    name = "columns"
    only_forced = True

    def look(self) -> tuple[bool, str]:
        """It needs what ``composed`` needs."""
        return True, "weighted sums on the CPU; composed for the rest"

    def activate(self, operators: "Operators") -> None:
        """Register ``weighted_sum`` for the CPU."""
        super().activate(operators)
        operators["weighted_sum"].implement(_weighted_sum, "CPU")


def _weighted_sum(stacked: "Tensor", weights: "Tensor") -> "Tensor":
    print("columns")
    clients = weights.double().expand(stacked.shape[:2]).unbind(1)
    terms = zip(stacked.double().unbind(1), clients, strict=True)
    flat = [weight * part.flatten(1).T for part, weight in terms]
    total = sum(flat[1:], start=flat[0]).T
    return total.reshape(stacked.shape[0], *stacked.shape[2:]).to(stacked.dtype)
'''

IMPORT = "from fedlora_kernels.backends.columns import Columns"

USE = """
import torch
from fedlora_kernels import backend, ops

stacked, weights = torch.arange(24.0).view(2, 3, 4), torch.tensor([0.5, 0.25, 0.25])
expected = torch.einsum("lkd,k->ld", stacked, weights)
print(backend())
assert torch.equal(ops.weighted_sum(stacked, weights), expected)
listed = ops.weighted_sum_list(list(stacked.flatten(0, 1)), weights.expand(2, 3))
assert torch.equal(listed, expected)
try:
    ops.weighted_sum(stacked[0, 0], weights)
except ValueError as error:
    print(error)
"""


def test_a_new_backend_is_one_file_and_one_row(tmp_path: Path) -> None:
    """It is forced by name, refuses as the others do, and list forms reach its kernel."""
    folder = copy_sources(tmp_path) / "backends"
    (folder / "columns.py").write_text(NEW_BACKEND)
    table = (folder / "__init__.py").read_text()
    for below, row in (
        ("from fedlora_kernels.backends.compiled", IMPORT),
        ("    Reference(),", "    Columns(),"),
    ):
        assert table.count(below) == 1
        table = table.replace(below, f"{row}\n{below}")
    (folder / "__init__.py").write_text(table)

    done = run(USE, "columns", tree=tmp_path)
    assert done.returncode == 0, done.stderr
    text = "stacked must be [L,K,...], found shape [4]"
    assert done.stdout.splitlines() == ["columns", "columns", "columns", text]
    reasons = run(
        "import fedlora_kernels as flk; print([b.name for b in flk.backends.ordered()])",
        tree=tmp_path,
    )
    assert "'composed', 'columns', 'reference'" in reasons.stdout


STATE = """
import fedlora_kernels as flk
from pathlib import Path

print(flk.backend())
print("libfedlora_cuda" in Path("/proc/self/maps").read_text())
print({item.name: item.serves for item in flk.backends.ordered()}["cuda-emulated"])
"""


def test_the_emulated_backend_is_never_chosen_by_itself(tmp_path: Path) -> None:
    """It is there, were it forced; nothing of it is loaded until then."""
    (tmp_path / "libfedlora_cuda_emulated.so").write_text("no library")
    done = run(STATE, libraries=tmp_path)
    assert done.returncode == 0, done.stderr
    chosen, loaded, serves = done.stdout.splitlines()
    assert chosen != "cuda-emulated"
    assert (loaded, serves) == ("False", "True")


def test_libraries_built_elsewhere_are_found_first(tmp_path: Path) -> None:
    """A broken one there hides any other, and a forced backend then says what the linker said."""
    library = tmp_path / "libfedlora_cuda_emulated.so"
    library.write_text("no library")
    done = run("import fedlora_kernels.ops", "cuda-emulated", libraries=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "RuntimeError: FEDLORA_BACKEND=cuda-emulated cannot serve "
        "(libfedlora_cuda_emulated.so does not load: "
    )
    assert str(library) in last


def test_cuda_without_its_library_cannot_be_forced(tmp_path: Path) -> None:
    (tmp_path / "libfedlora_cuda.so").write_text("no library")
    done = run("import fedlora_kernels.ops", "cuda", libraries=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: FEDLORA_BACKEND=cuda cannot serve (")
    # Without a GPU it is not even loaded.
    assert "torch finds no NVIDIA GPU" in last or "libfedlora_cuda.so does not load" in last
    assert "composed" in last.partition("these can: ")[2]


WITHOUT_TORCH = """
import sys

class NoTorch:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [NoTorch(finder) for finder in sys.meta_path]
import fedlora_kernels as flk

assert "torch" not in sys.modules
try:
    flk.backend()
except RuntimeError as error:
    print(error)
try:
    flk.Adapter
except ImportError as error:
    print(error)
try:
    flk.nonsense
except AttributeError as error:
    print(error)
"""


def test_import_without_torch() -> None:
    done = run(WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    backend_line, torch_line, attribute_line = done.stdout.splitlines()
    assert "no backend can serve" in backend_line
    assert "torch is not installed" in backend_line
    assert "fedlora_kernels.Adapter needs torch" in torch_line
    assert "nonsense" in attribute_line


def test_import_does_not_pull_in_peft_or_transformers() -> None:
    code = "import sys, fedlora_kernels; print(sorted({'peft', 'transformers'} & set(sys.modules)))"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["fedlora_kernels/py.typed"])
def test_typing_marker_is_beside_the_package(name: str) -> None:
    assert (Path(flk.__file__).parent.parent / name).is_file()
