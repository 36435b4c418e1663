"""An operator: its schema, check, implementation, fake and specification, each stated once.

Compiled libraries register further implementations of the same schemas for their dispatch keys;
nothing here changes when they do.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Generic, TypeVar, cast

import torch

Operators = Mapping[str, "Operator[Any]"]
OPERATORS: dict[str, "Operator[Any]"] = {}
"""name -> operator; making an operator enters it, so importing a stage's file adds its rows"""

_library = torch.library.Library("fedlora", "DEF")

T = TypeVar("T")


class Operator(Generic[T]):
    """``torch.ops.fedlora.<name>``, and its Python face when called.

    Args:
        schema: a torch function schema; the text before the parenthesis is the operator's name.
        check: takes the operator's arguments; raises ValueError or TypeError for bad ones.
        composed: the implementation from torch operators, for any device.
        fake: shapes and dtypes of the results, for tracing; ``composed`` where that computes
            nothing itself, as list forms do, which stack and call the stacked operator.
        reference: the specification, which ``FEDLORA_BACKEND=reference`` puts in the place of
            ``composed``; none for list forms, whose stacked operator has one.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        composed: Callable[..., T],
        fake: Callable[..., T] | None = None,
        reference: Callable[..., T] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.schema = schema
        self.check = check
        self.composed = composed
        self.reference = reference
        OPERATORS[self.name] = self
        _library.define(schema)
        self._call = getattr(torch.ops.fedlora, self.name).default
        shapes = self._checked(composed if fake is None else fake)
        torch.library.register_fake(f"fedlora::{self.name}", shapes, lib=_library)

    def __call__(self, *arguments: Any) -> T:
        """The face: the operator, whose complaints about arguments are ValueErrors or TypeErrors.

        Every implementation checks its arguments, compiled ones in C++. So ``check`` runs here only
        to raise what the operator refused as what it is, and where a trace has no implementation.
        """
        if torch.compiler.is_compiling():
            self.check(*arguments)
            return cast(T, self._call(*arguments))
        try:
            return cast(T, self._call(*arguments))
        except RuntimeError:
            try:
                self.check(*arguments)
            except (TypeError, ValueError) as error:
                raise error from None
            raise

    def implement(self, kernel: Callable[..., T], key: str) -> None:
        """Put ``kernel`` behind the operator for a dispatch key, with the operator's check."""
        _library.impl(self.name, self._checked(kernel), key)

    def _checked(self, kernel: Callable[..., T]) -> Callable[..., T]:
        @wraps(kernel)
        def checked(*args: Any, **kwargs: Any) -> T:
            try:
                self.check(*args, **kwargs)
            except (TypeError, ValueError) as error:
                raise RuntimeError(f"fedlora::{self.name}: {error}") from error
            return kernel(*args, **kwargs)

        return checked
