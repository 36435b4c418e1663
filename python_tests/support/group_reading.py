"""How much of the clients' files each process of a group reads: mapped pages that it touched."""

import re
from pathlib import Path

from group import joined

import fedlora_kernels as flk


def touched() -> int:
    """Bytes of files in this process's memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"RssFile:\s+(\d+)", status)
    return int(found[1]) << 10 if found else 0


def main() -> None:
    group, folder = joined()
    flk.aggregate(sorted((folder / "small").iterdir()), rule="fedit", group=group)  # libraries
    before = touched()
    result = flk.aggregate(sorted((folder / "large").iterdir()), rule="fedit", group=group)
    print(touched() - before)
    del result


if __name__ == "__main__":
    main()
