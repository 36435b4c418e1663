"""Device: where a benchmark runs, how time is taken there, and how its results name it.

The one place that knows the difference between a CPU and a GPU: a clock (``perf_counter``, or CUDA
events around work that has been waited for), a description, and the folder of the results.
"""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fedlora_kernels as flk

PACKAGES = ("torch", "numpy", "peft", "safetensors", "triton")
"""What the numbers depend on; those installed are named in every result file."""

# Larger than the L2 cache of any GPU so far (B200: 126 MB), so that no input is still in it.
_COLD_BYTES = 256 << 20


@dataclass(frozen=True)
class Device:
    """One device with a fixed number of CPU threads."""

    torch_device: torch.device
    threads: int

    @classmethod
    def use(cls, name: str | torch.device | None = None, threads: int | None = None) -> "Device":
        """The device to measure on; sets torch's threads for this process.

        Args:
            name: a torch device; the CPU when None.
            threads: CPU threads; torch's own choice when None.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(torch.device(name or "cpu"), torch.get_num_threads())

    @property
    def is_cuda(self) -> bool:
        """Whether work is launched and waited for rather than done in the call."""
        return self.torch_device.type == "cuda"

    @property
    def model(self) -> str:
        """The product's name."""
        if self.is_cuda:
            return str(torch.cuda.get_device_name(self.torch_device))
        return _cpu_model()

    @property
    def folder(self) -> str:
        """The model as a folder name, with the threads on a CPU: amd-epyc-9654-2-threads."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.model.lower()).strip("-")
        return slug if self.is_cuda else f"{slug}-{self.threads}-threads"

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that the call and all work it starts take, and what it returns."""
        if not self.is_cuda:
            start = time.perf_counter()
            result = call()
            return time.perf_counter() - start, result
        torch.empty(_COLD_BYTES, dtype=torch.uint8, device=self.torch_device).zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.torch_device)
        first.record()
        result = call()
        last.record()
        torch.cuda.synchronize(self.torch_device)
        return first.elapsed_time(last) / 1e3, result

    def describe(self) -> dict[str, Any]:
        """Model, threads and instruction set; no host name."""
        described: dict[str, Any] = {"type": self.torch_device.type, "model": self.model}
        if self.is_cuda:
            return described | {
                "capability": list(torch.cuda.get_device_capability(self.torch_device)),
                "memory_bytes": torch.cuda.get_device_properties(self.torch_device).total_memory,
            }
        return described | {
            "threads": self.threads,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "architecture": platform.machine(),
        }


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it is measured with and against."""
    found = {"python": platform.python_version(), "fedlora_kernels": flk.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
