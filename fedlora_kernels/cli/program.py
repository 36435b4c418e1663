"""How the program fails: one line on stderr and exit code 2 for what the user can put right.

Anything else is a bug and keeps its traceback (exit code 1).
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


class BadInput(click.ClickException):
    """Something about the input that the message says how to put right."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.ctx = click.get_current_context(silent=True)

    def __reduce__(self) -> tuple[type["BadInput"], tuple[str]]:
        """Without the context, which cannot be sent to another process."""
        return BadInput, (self.message,)


class Program(click.Group):
    """A group of commands that reports every refusal in one line, usage errors included."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; see :meth:`click.Command.main`."""
        try:
            result = super().main(
                args=args,
                prog_name=prog_name,
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "fedlora"
            message = error.format_message().strip().replace("\n", " ")
            click.echo(f"{command}: {message}", err=True)
            sys.exit(2)
        except click.Abort:
            sys.exit(130)
        if not standalone_mode:
            return result
        sys.exit(result if isinstance(result, int) else 0)  # an int is the code of an Exit


@contextmanager
def bad_input() -> Iterator[None]:
    """Turns the library's errors about its input into :class:`BadInput`."""
    try:
        yield
    except KeyError as error:  # its str() is the repr of its message
        raise BadInput(str(error.args[0]) if error.args else repr(error)) from error
    except (ValueError, TypeError, OSError) as error:  # AdapterError, FileExistsError, ...
        raise BadInput(str(error)) from error


def require_torch() -> None:
    """Refuse to go on without torch.

    Raises:
        BadInput: torch is not installed.
    """
    try:
        import torch  # noqa: F401 - only asked for
    except ImportError:
        raise BadInput("needs torch, which is not installed (pip install torch)") from None


def require_writable(path: str) -> None:
    """Refuse a path that cannot be made, before any work is done for it.

    Raises:
        BadInput: the nearest folder above the path is a file, or cannot be written to.
    """
    parents = Path(os.path.realpath(path)).parents
    nearest = next(parent for parent in parents if parent.exists())
    if not nearest.is_dir():
        raise BadInput(f"{path} cannot be written: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadInput(f"{path} cannot be written: no permission to write in {nearest}")
