"""What is known of Triton in this process before any kernel is imported."""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# tl.dot on float64 reaches the tensor cores since 3.6 on sm_80 and sm_90 (earlier: no lowering).
_TRITON = (3, 6)


def serves() -> tuple[bool, str]:
    """Whether the kernels can run in this process, and why or why not."""
    if find_spec("torch") is None:
        return False, "torch is not installed"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return False, "triton is not installed (pip install triton)"
    if release() < _TRITON:
        return False, f"triton {found} is older than {'.'.join(map(str, _TRITON))}"
    if interpreted():
        return True, f"triton {found}, interpreted on the CPU (TRITON_INTERPRET): slow, for tests"
    return _device(found)


def interpreted() -> bool:
    """Whether Triton runs kernels in numpy on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def release() -> tuple[int, int]:
    """Triton's major and minor version."""
    major, minor = version("triton").split(".")[:2]
    return int(major), int(minor)


def dispatch_keys() -> tuple[str, ...]:
    """The devices that these kernels run on, as torch's dispatch keys; CUDA stands for ROCm too."""
    return ("CPU",) if interpreted() else ("CUDA", "XPU")


def _device(found: str) -> tuple[bool, str]:
    """Asks only what does not initialize a GPU: an import must leave a process able to fork."""
    import torch

    if torch.cuda.is_available():
        vendor = "an AMD" if torch.version.hip else "an NVIDIA"
        return True, f"triton {found} on {vendor} GPU; composed on other devices"
    if torch.xpu.is_available():
        return True, f"triton {found} on an Intel GPU; composed on other devices"
    return False, "there is no GPU, and TRITON_INTERPRET=1 is not set"
