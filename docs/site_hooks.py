"""For mkdocs: what pages link to outside docs/, and the docstrings' roles.

Figures come along; other links become text.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FIGURE = re.compile(r"(!\[[^\]]*\]\()\.\./([^)]+)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the figures to the site's files."""
    for page in list(files.documentation_pages()):
        for _, path in FIGURE.findall(page.content_string):
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point to the figures' new places."""
    return LINK.sub(r"\1", FIGURE.sub(r"\1\2)", markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of the docstrings' references."""
    return re.sub(r":(?:class|meth|func|mod|attr):(?=<code>)", "", html)
