"""Declaring an operator: its schema, its checks, its implementation and its fake, once.

Compiled libraries register further implementations of the same schemas for their dispatch keys;
nothing here changes when they do.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch

from fedlora_kernels.backend import backend

_library = torch.library.Library("fedlora", "DEF")
_checks: dict[str, Callable[..., None]] = {}


def declare(
    schema: str,
    *,
    check: Callable[..., None],
    composed: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Define ``fedlora::<schema>`` with its implementation for every device and its fake kernel.

    Args:
        schema: a torch function schema; the text before the parenthesis is the operator's name.
        check: takes the operator's arguments, raises ValueError or TypeError for bad ones. The
            Python face lets these through; the raw operator raises RuntimeError with their text.
        composed: the implementation from torch operators. ``FEDLORA_BACKEND=reference`` puts the
            function of the same name from ``fedlora_kernels.reference`` in its place.
        fake: shapes and dtypes of the results, for tracing.
    """
    name = schema.partition("(")[0]
    kernel = composed
    if backend() == "reference" and not name.endswith("_list"):
        kernel = getattr(import_module("fedlora_kernels.reference"), name)
    _checks[name] = check
    _library.define(schema)
    implement(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fedlora::{name}", fake, lib=_library)


def implement(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Put ``kernel`` behind ``fedlora::<name>`` for a dispatch key, with the operator's checks."""
    check = _checks[name]

    @wraps(kernel)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            check(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"fedlora::{name}: {error}") from error
        return kernel(*args, **kwargs)

    _library.impl(name, checked, key)
