"""How much of the clients' files each process of a group reads: mapped pages that it touched."""

import re
from pathlib import Path

from group import joined

import fedlora_kernels as flk


def touched(folder: Path) -> int:
    """Bytes of the folder's files that this process has read through its mappings."""
    found, mine = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mine = str(folder) in line
        elif mine and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def main() -> None:
    group, folder = joined()
    where = folder / "large"
    clients = [flk.Adapter.load(path, numbers=False) for path in sorted(where.iterdir())]
    flk.aggregate(clients, rule="fedit", group=group)
    print(touched(where))


if __name__ == "__main__":
    main()
