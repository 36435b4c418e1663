"""The harness's layout: rooms, the direction of imports, one file for a task."""

import ast
import re
import sys
from pathlib import Path

import pytest
from miniature import miniature as settings_of

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
