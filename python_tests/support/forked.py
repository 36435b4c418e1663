"""What runs that will be killed are forked from: all imported, the library parsed, no thread begun.

A process that has computed on several threads, as that of the tests may have, cannot be forked: the
child would wait for threads that it does not have.
"""

import torch

from integration.tasks import stdlib_chapters

torch.set_num_threads(1)
stdlib_chapters.strings()
