"""The compiled module behind fedlora_kernels.numpy, which declares the types."""

from typing import Any

def __getattr__(name: str) -> Any: ...
