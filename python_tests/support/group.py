"""Processes of one torch.distributed group on this machine: gloo, which needs no GPU.

The test starts them with :func:`started`; the script that each runs begins with :func:`joined`.
"""

import atexit
import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

Process = subprocess.Popen[str]
Completed = subprocess.CompletedProcess[str]


def joined() -> tuple[Any, Path]:
    """The group, and the folder of this start, in a process that :func:`started` made."""
    import torch.distributed as dist

    rank, size, folder, timeout = sys.argv[1:]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=float(timeout)),
    )
    atexit.register(_left)
    return dist.group.WORLD, Path(folder)


def _left() -> None:
    """End the group's threads before the interpreter ends: one that waits for the interpreter's
    lock then, to give up a tensor of the last message, aborts the process.

    Errors that were caught may still hold the group, in cycles of frames.
    """
    import torch.distributed as dist

    gc.collect()
    dist.destroy_process_group()


def started(script: str, size: int, folder: Path, timeout: float = 60.0) -> list[Process]:
    """Processes that run a script of this folder.

    Args:
        script: its name.
        size: how many processes.
        folder: where they meet; for this start alone.
        timeout: of the group, in seconds.
    """
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, str(here / script), str(rank), str(size), str(folder), str(timeout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]


def ended(processes: Sequence[Process], within: float) -> list[Completed]:
    """What became of them; those that go on for longer, in seconds, are killed: return code -9."""
    end = time.monotonic() + within
    done = []
    try:
        for process in processes:
            try:
                out, err = process.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return done
