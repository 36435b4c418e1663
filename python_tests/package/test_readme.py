"""The README as its reader meets it: its code runs, its commands work, what it names is there."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from federation import draw, write_client

import fedlora_kernels as flk
from fedlora_kernels.cli import app
from fedlora_kernels.cli.rules import as_markdown

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARRAYS = "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("numpy.md", "jax.md", "dlpack.md")
)
PYTHON = re.findall(r"```python\n(.*?)```", README + ARRAYS, re.DOTALL)
COMMANDS = re.findall(r"(?:^|`)(fedlora [^`\n]*)", README, re.MULTILINE)
SIZES = {"model.layers.0.self_attn.q_proj": (40, 24), "model.layers.0.self_attn.v_proj": (16, 24)}


@pytest.fixture(autouse=True)
def _clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three client folders that the README speaks of, of different ranks and scalings."""
    monkeypatch.chdir(tmp_path)
    for k, client in enumerate(draw(ranks=(8, 4, 2), sizes=SIZES).drawn):
        write_client(Path("clients") / str(k), client)


def test_there_is_code_to_run() -> None:
    assert len(PYTHON) == 5
    assert {line.split()[1] for line in COMMANDS} == {"aggregate", "inspect", "rules", "doctor"}


@pytest.mark.parametrize(
    "code",
    [code for code in PYTHON if "interop.flower" not in code],
    ids=lambda code: code.partition("\n")[0],
)
def test_python_blocks_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})
    if "save(" in code:
        assert flk.Adapter.load("global").factors.keys() == SIZES.keys()


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line: str) -> None:
    result = CliRunner().invoke(app, shlex.split(line)[1:], prog_name="fedlora")
    assert result.exit_code == 0, result.output


def test_the_table_of_rules_is_the_registrys() -> None:
    assert as_markdown() in README


def test_the_page_of_the_rules_has_every_rule_in_each_table() -> None:
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    _, *tables = re.split(r"^\| rule \|.*$", page, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == flk.rules.names()
    for name in flk.rules.names():
        assert flk.rules.find(name).link() in page


def test_operators_and_backends_are_there() -> None:
    operators = README[README.index("`fedlora_kernels.ops.*` have:") : README.index("Variants")]
    names = set(re.findall(r"`(\w+)`", operators))
    assert names
    assert all(hasattr(torch.ops.fedlora, name) and hasattr(flk.ops, name) for name in names)
    backends = README[README.index("The backends are ") : README.index("The GPU backends pass")]
    assert re.findall(r"`([\w-]+)`", backends) == [b.name for b in flk.backends.ordered()]


def doors() -> list[str]:
    """Every call of the frameworks' block below the import of the name that it uses."""
    (block,) = (code for code in PYTHON if "interop.flower" in code)
    imports, calls = (part.splitlines() for part in block.strip().split("\n\n"))
    return [
        f"{line}\n{call}\n"
        for call in calls
        for line in imports
        if re.search(rf"\b{line.split()[-1]}\b", call)
    ]


def test_there_are_five_doors_in_python_and_one_in_cpp() -> None:
    found = [re.findall(r"peft|flower|nvflare|numpy|jax", lines)[0] for lines in doors()]
    assert found == ["peft", "flower", "nvflare", "numpy", "jax"]
    (cpp,) = re.findall(r"```cpp\n(.*?)```", README, re.DOTALL)
    header = (ROOT / "csrc" / "include" / "fedlora" / "fedlora.h").read_text(encoding="utf-8")
    assert all(name in header for name in ("stacked_svd", *re.findall(r"flk::(\w+)", cpp)))


@pytest.mark.parametrize("lines", doors(), ids=lambda lines: lines.splitlines()[0])
def test_doors_run(lines: str) -> None:
    for package, door in {"flwr": "flower", "nvflare": "nvflare", "jax": "jax"}.items():
        if f"interop.{door}" in lines or f"{door} as" in lines:
            pytest.importorskip(package, reason="of the extra")
    names: dict[str, object] = {}
    if "model" in lines:
        from peft import LoraConfig, get_peft_model

        base = torch.nn.Sequential(torch.nn.Linear(8, 6))
        model = get_peft_model(base, LoraConfig(target_modules=["0"]), "a")
        model.add_adapter("b", LoraConfig(target_modules=["0"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        names["model"] = model
    draw_ = np.random.default_rng(0).standard_normal
    b, a = draw_((2, 8, 4), dtype=np.float32), draw_((2, 4, 6), dtype=np.float32)
    names |= {"b": b, "a": a, "scale": np.ones((2, 4), dtype=np.float32)}
    exec(compile(lines, "README.md", "exec"), names)
    if "model" in names:
        assert "mixed" in names["model"].peft_config  # type: ignore[attr-defined]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_papers_have_this_version() -> None:
    assert f"\nversion: {flk.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## ([\d.]+)", changes, re.MULTILINE)[0] == flk.__version__


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        ast.parse(code, page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_files_and_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for file in re.findall(
        r"`((?:csrc|fedlora_kernels|python_tests|benchmarks|docs)/[\w/.]+)`", text
    ):
        assert (ROOT / file).exists(), file
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
