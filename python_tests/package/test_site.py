"""The documentation site: built as `make docs` builds it, where a warning is an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("mkdocs", reason="needs mkdocs: pip install 'fedlora_kernels[docs]'")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page is there with its figures, and the functions' docstrings are on theirs."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        built = tmp_path / ("" if page.stem == "index" else page.stem) / "index.html"
        assert built.is_file(), page.name
    figures = (tmp_path / "performance" / "index.html").read_text(encoding="utf-8")
    assert figures.count(".svg") >= 3
    assert len(list(tmp_path.glob("benchmarks/**/*.svg"))) >= 3
    functions = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("_aggregate.aggregate", "_round.Round", "ops.stacked_svd", "interop.jax.flora_na"):
        assert f'id="fedlora_kernels.{name}"' in functions, name
    assert ":class:" not in functions
