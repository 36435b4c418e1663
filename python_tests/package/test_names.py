"""Names in code: rules are named by their own files, words are spelled the American way."""

import ast
import re
from pathlib import Path

import pytest

import fedlora_kernels as flk

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for name in ("fedlora_kernels", "integration") for path in ROOT.glob(f"{name}/**/*.py")
)
OF_RULES = ("fedlora_kernels/rules/", "fedlora_kernels/reference/")
"""A rule's own file, and its specification."""


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
    """What is particular to a rule is asked of the rule; presets name the rules of a run. The
    operator flora_na bears its rule's name.
    """
    for path in FILES:
        where = str(path.relative_to(ROOT))
        if not where.startswith(OF_RULES):
            found = named(path) - ({"flora_na"} if where.startswith("fedlora_kernels/") else set())
            assert not found, f"{where} names {found}"


def test_a_name_would_be_seen(tmp_path):
    path = tmp_path / "code.py"
    lines = ('"""florist"""', 'a = rule.name == "fedex"', 'b = f"{a} flora"', "c = rules.FFA")
    path.write_text("\n".join(lines))
    assert named(path) == {"fedex", "flora", "FFA"}


BRITISH = re.compile(
    r"colour|grey|(?<!prom)(?:optim|token|normal|recogn|serial|initial|summar|organ|real|minim"
    r"|maxim|general|special|util|parallel|synchron|equal|factor|random|personal)is(?:e|ed|es|er|ers|ing|ation)\b"
    r"|behaviour|favour|centre\b|licence|modell|labell|cancell(?:ed|ing)|travell|analys(?:e|ed|ing)"
    r"\b|catalogue|artefact|judgement",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "where", ["fedlora_kernels", "integration", "benchmarks", "csrc", "docs", "."]
)
def test_american_spelling(where):
    """Names, literals, messages and prose."""
    kinds = {".py", ".toml", ".json", ".md", ".cpp", ".cu", ".cuh", ".h", ".txt"}
    for path in (ROOT / where).glob("*" if where == "." else "**/*"):
        if path.suffix in kinds and "results" not in path.parts:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not BRITISH.search(line), (
                    f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
                )
