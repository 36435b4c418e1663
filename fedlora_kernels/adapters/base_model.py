"""base_model_name_or_path: whether two clients name one model.

openai-community/gpt2        a hub's name: organization and model
gpt2                         the model alone
/data/llms/gpt2              a folder, known by its last part
.../models--openai-community--gpt2/snapshots/607a30d    the hub's cache, a hub's name again
"""

import re
from typing import NamedTuple

_CACHED = re.compile(r"models--(?P<organization>.+?)--(?P<model>[^/]+)(?:/snapshots(?:/.*)?)?$")
_HUB = re.compile(r"(?P<organization>[\w.-]+)/(?P<model>[\w.-]+)")
_SAYS_NOTHING = re.compile(
    r"(?:checkpoint|step|epoch|model|base|merged|output|snapshot|weights|final|latest|last|tmp)s?"
    r"[-_]?\d*|[0-9a-f]{7,}|\d*",
    re.IGNORECASE,
)
"""Last parts of paths that folders of different models share."""


class Named(NamedTuple):
    """What a name tells; an organization of None is not told."""

    organization: str | None
    model: str


def named(text: str) -> Named | None:
    """What a name or a path tells of its model, in small letters; None where it tells nothing."""
    path = text.replace("\\", "/").rstrip("/").lower()
    if found := _CACHED.search(path):
        return Named(found["organization"], found["model"])
    if found := _HUB.fullmatch(path):
        return Named(found["organization"], found["model"])
    last = path.rpartition("/")[2]
    return None if _SAYS_NOTHING.fullmatch(last) else Named(None, last)


def same(one: str | None, other: str | None) -> bool:
    """Whether both may be one model: the names are equal as far as both tell them, or one client
    says nothing.
    """
    if not one or not other or one == other:
        return True
    first, second = named(one), named(other)
    if first is None or second is None or first.model != second.model:
        return False
    return None in (first.organization, second.organization) or first == second
