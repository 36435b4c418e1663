"""A group of which one process is lost while it works: killed, or stopped without a word."""

import os
import signal
import sys

from federation import draw
from group import joined

import fedlora_kernels as flk


def main() -> None:
    group, folder = joined()
    how = (folder / "how").read_text(encoding="ascii")

    def lost(done: int, total: int) -> None:
        if group.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    sizes = {f"layers.{i}.q": (24, 17) for i in range(9)}
    try:
        flk.aggregate(draw(sizes=sizes).adapters, rule="florist", group=group, progress=lost)
    except ConnectionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
