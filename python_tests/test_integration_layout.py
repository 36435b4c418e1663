"""The harness's layout: rooms, the direction of imports, no circle, one file for a task."""

import ast
import re
import sys
from pathlib import Path

import pytest
from miniature import miniature as settings_of

import fedlora_kernels as flk
import integration
from integration import tasks
from integration.__main__ import main
from integration.plan import plan
from integration.tiny import miniature

HOME = Path(integration.__file__).parent
ROOMS = ("settings", "tasks", "model", "rounds", "report", "flower")
"""In the order in which a room may import from the ones before it."""
FILES = {
    path: ".".join(("integration", *path.relative_to(HOME).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in sorted(HOME.rglob("*.py"))
    if "app" not in path.parts
}
"""File -> its module."""


def imports(path):
    """The harness's modules that a file imports, also within its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    modules, found = set(FILES.values()), set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {str(node.module)}
            if names - modules:
                found.add(str(node.module))
    return (found & modules) - {FILES[path]}


GRAPH = {module: imports(path) for path, module in FILES.items()}


def room(module):
    """The room that a module belongs to; None for a file beside the rooms."""
    _, first, *_ = f"{module}.".split(".")
    return first if first in ROOMS else None


def test_there_are_six_rooms_and_few_files_beside_them():
    folders = {path.name for path in HOME.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS)
    assert len([path for path in HOME.iterdir() if path.is_file()]) <= 14


def test_a_room_imports_from_the_rooms_before_it():
    for module, imported in GRAPH.items():
        here = room(module)
        for other in imported:
            there = room(other)
            if here is None or there is None:
                continue
            assert ROOMS.index(there) <= ROOMS.index(here), f"{module} imports {other}"


def test_no_circle_of_imports():
    done, above = set(), []

    def visit(module):
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module in done:
            return
        above.append(module)
        for other in sorted(GRAPH[module]):
            visit(other)
        done.add(above.pop())

    for module in GRAPH:
        visit(module)


def test_every_file_is_in_the_overview_of_its_room():
    for path, module in FILES.items():
        if path.name == "__init__.py" or room(module) == "tasks":
            continue
        overview = (path.parent / "__init__.py").read_text(encoding="utf-8")
        assert path.name in overview, f"{path.name} is not named in {path.parent.name}/__init__.py"


def test_a_public_name_hides_no_module():
    for path, module in FILES.items():
        if path.name == "__init__.py":
            children = {
                child.stem for child in path.parent.glob("*.py") if child.name != "__init__.py"
            }
            hidden = children & set(getattr(sys.modules[module], "__all__", ()))
            assert not hidden, f"{module} exports {hidden}"


def named(path):
    """The rules that a file's code names, in identifiers and strings; not its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= set() if id(node) in docstrings else set(re.findall(r"[\w-]+", node.value))
        elif isinstance(node, (ast.Name, ast.Attribute)):
            words.add(node.id if isinstance(node, ast.Name) else node.attr)
    kinds = [flk.rules.find(name) for name in flk.rules.names()]
    return words & {word for kind in kinds for word in (kind.name, kind.title, kind.__name__)}


def test_no_code_names_a_rule():
    """What is particular to a rule is asked of the rule; presets name the rules of a run."""
    for path in FILES:
        assert not named(path), f"{path.relative_to(HOME)} names {named(path)}"


def test_a_name_would_be_seen(tmp_path):
    path = tmp_path / "code.py"
    lines = ('"""florist"""', 'a = rule.name == "fedex"', 'b = f"{a} flora"', "c = rules.FFA")
    path.write_text("\n".join(lines))
    assert named(path) == {"fedex", "flora", "FFA"}


BRITISH = re.compile(
    r"colour|grey|(?<!prom)(?:optim|token|normal|recogn|serial|initial|summar|organ|real|minim"
    r"|maxim|general|special|util|parallel|synchron|equal)is(?:e|ed|es|er|ers|ing|ation)\b"
    r"|behaviour|favour|centre\b|licence|modell|labell|cancell(?:ed|ing)|travell|analys(?:e|ed|ing)"
    r"\b|catalogue|artefact|judgement",
    re.IGNORECASE,
)


def test_american_spelling():
    paths = [*FILES, *HOME.glob("presets/*.toml"), *HOME.glob("configs/*.json")]
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not BRITISH.search(line), f"{path.relative_to(HOME)}:{number}: {line.strip()}"


# ---- a new task: one file, and its test ----------------------------------------------------------

(RIDDLES,) = re.findall(
    r"```python\n(.*?)```",
    (HOME.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("A **task**")[2],
    re.DOTALL,
)[:1]
"""The task that CONTRIBUTING shows."""


@pytest.fixture
def riddles(tmp_path, monkeypatch):
    """integration/tasks/ with one file more."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "riddles.py").write_text(RIDDLES)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    for name, task in tasks.read_tasks(tasks.__path__).items():
        monkeypatch.setitem(tasks.TASKS, name, task)
    yield
    sys.modules.pop("integration.tasks.riddles", None)


@pytest.mark.usefixtures("riddles")
def test_a_new_task_is_one_file(tmp_path, capsys):
    """It is planned by its published sizes, runs in miniature and knows its options."""
    changes = {
        "task": "riddles",
        "config": "llama-tiny",
        "target_modules": ("q_proj", "v_proj"),
        "train_size": None,
    }
    settings = settings_of(**changes)
    planned = plan(settings)
    assert (sum(planned.examples), planned.tests) == (900, 40)
    assert "the page where the sizes are printed" in planned.data
    small = miniature(settings, tmp_path)
    small.write()
    task = tasks.load_task(small.settings)
    assert (task.kind, len(task.train), len(task.test)) == ("language", 64, 12)
    assert task.test[0].completion
    with pytest.raises(tasks.TaskError, match="riddles has no option 'easy'; its options: source"):
        tasks.find_task("riddles").load(test_size=1, easy=True)
    flags = "--task riddles --config llama-tiny --target-modules q_proj,v_proj --rules florist"
    out = ["--out", str(tmp_path / "out"), "--tiny"]
    assert main(["compare", *flags.split(), *out, "--rounds", "1", "--clients", "2"]) == 0
    assert "florist" in capsys.readouterr().out


def test_without_its_file_it_is_unknown():
    with pytest.raises(tasks.TaskError, match="unknown task 'riddles'; known: "):
        plan(settings_of(task="riddles"))
