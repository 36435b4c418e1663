"""The peak of anonymous memory of some code, in a process of its own."""

import os
import subprocess
import sys

_BEGIN = """
import re, sys, threading, torch
import fedlora_kernels as flk
torch.set_num_threads(1)
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
"""

_WATCH = """
start, most, done = anonymous(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.001):
        most = max(most, anonymous() - start)
watcher = threading.Thread(target=watch)
watcher.start()
"""

_END = """
done.set()
watcher.join()
print(most)
"""


def peak(warm: str, code: str, *arguments: object) -> int:
    """Bytes of RssAnon while ``code`` runs beyond what there was after ``warm``.

    Mapped files are in the resident set and not in RssAnon. What libraries allocate once, work
    space of products for example, belongs to ``warm``.

    Args:
        warm: Python, in which ``flk`` and ``sys.argv`` are known.
        code: Python that is measured, after it.
        arguments: of the process.
    """
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + warm + _WATCH + code + _END, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout.split()[-1])
