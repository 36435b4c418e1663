"""The import statements of the packages: no circle, no name in a module's way, torch where needed.

An import inside a function counts as one at the top; one under ``if TYPE_CHECKING:`` does not.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import fedlora_kernels as flk

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedlora_kernels", "integration", "benchmarks")


def modules(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """Dotted name -> file; a package's name stands for its __init__.py, where it has one."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


class Imports(ast.NodeVisitor):
    """The modules that one module's statements import."""

    def __init__(self, name: str, known: Mapping[str, Path]) -> None:
        self.package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
        self.known = known
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            submodule = f"{base}.{alias.name}"
            self.add(submodule if submodule in self.known else base)

    def add(self, name: str) -> None:
        """The module, and the packages around it that importing it executes first: not those that
        the importing module itself is in, which are executed already.
        """
        while name:
            if name in self.known:
                self.found.add(name)
            name = name.rpartition(".")[0]
            if f"{self.package}.".startswith(f"{name}."):
                break


def graph(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    known = modules(root, packages)
    edges = {}
    for name, path in known.items():
        imports = Imports(name, known)
        imports.visit(ast.parse(path.read_text(encoding="utf-8")))
        edges[name] = imports.found - {name}
    return edges


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """One circle of the graph, its first module again at the end; empty where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_of_imports() -> None:
    edges = graph(ROOT)
    assert len(edges) > 100
    assert "fedlora_kernels.backends" in edges["fedlora_kernels.ops"]
    # What the package imports when a public name is first asked for.
    edges["fedlora_kernels"] |= {f"fedlora_kernels.{module}" for module in flk._WHERE.values()}
    assert circle(edges) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "import p.b", "b": "from p import a"}, True),
        ({"a": "def f():\n    from .b import g", "b": "import p.a as a"}, True),
        ({"a": "from p.q.c import x", "q/__init__": "from p import b", "b": "import p.a"}, True),
        ({"q/__init__": "import p.q.c", "q/c": "from p.q import d", "q/d": ""}, False),
        ({"a": "import p.b", "b": "if TYPE_CHECKING:\n    from p.a import A"}, False),
        ({"a": "import p.b", "b": "if TYPE_CHECKING:\n    pass\nelse:\n    import p.a"}, True),
    ],
    ids=["top", "function", "package_around", "siblings", "type_checking", "else_branch"],
)
def test_the_reader_sees_circles(files: dict[str, str], expected: bool, tmp_path: Path) -> None:
    for name, text in {"__init__": "", **files}.items():
        path = tmp_path / "p" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert bool(circle(graph(tmp_path, ("p",)))) == expected


def test_no_public_name_hides_a_module() -> None:
    """``import fedlora_kernels.rules.florist as f`` must give the module."""
    for full in modules(ROOT, ("fedlora_kernels",)):
        package, _, name = full.rpartition(".")
        if package:
            found = getattr(import_module(package), name, None)
            assert found is None or isinstance(found, ModuleType), f"{full} is hidden by {found}"
    import fedlora_kernels.rules.florist as florist

    assert isinstance(florist, ModuleType)


def test_public_names_are_where_the_table_says() -> None:
    assert set(flk._WHERE) == set(flk.__all__)
    assert set(flk.__all__) <= set(dir(flk))
    for name, where in flk._WHERE.items():
        module = import_module(f"fedlora_kernels.{where}")
        assert getattr(flk, name) is (module if name == where else getattr(module, name))


def names_for_type_checkers() -> Iterator[str]:
    """What the TYPE_CHECKING block of the package imports."""
    tree = ast.parse(Path(flk.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                for alias in statement.names:
                    assert alias.asname in (None, alias.name)
                    yield alias.name


def test_type_checkers_see_every_public_name() -> None:
    assert sorted(names_for_type_checkers()) == sorted(flk.__all__)


def imported(code: str) -> set[str]:
    """The modules that a process holds after it ran some code and exited."""
    listing = "import atexit, sys; atexit.register(lambda: print('held', *sys.modules))"
    environment = {key: value for key, value in os.environ.items() if key != "FEDLORA_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", f"{listing}\n{code}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


HEAVY = {"torch", "numpy", "safetensors", "triton"}


@pytest.mark.parametrize(
    "arguments", ["--version", "--help", "rules", "aggregate --help", "inspect --help"]
)
def test_the_command_line_answers_without_torch(arguments: str) -> None:
    """Seconds of imports for a line of text."""
    code = f"import sys; sys.argv[1:] = {arguments.split()}; from fedlora_kernels.cli import main"
    held = imported(f"{code}; main()")
    assert "fedlora_kernels.cli" in held
    assert not HEAVY & held


def test_importing_the_package_imports_no_torch() -> None:
    held = imported("import fedlora_kernels, fedlora_kernels.backends; dir(fedlora_kernels)")
    assert not HEAVY & held


REGISTERED = "assert torch._C._dispatch_has_kernel('fedlora::gram')"


@pytest.mark.parametrize(
    "code",
    [
        f"import torch, fedlora_kernels; {REGISTERED}",
        f"import fedlora_kernels.ops, torch; {REGISTERED}",
        f"import fedlora_kernels as flk, torch; flk.Adapter; {REGISTERED}",
        f"import fedlora_kernels as flk, torch; flk.aggregate; {REGISTERED}",
    ],
    ids=["after_torch", "ops", "an_adapter", "aggregate"],
)
def test_when_operators_are_registered(code: str) -> None:
    assert "torch" in imported(code)
