"""What goes where: the report to standard output, steps to standard error; a reader that left is no error."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from bnfix.cli.options import OutputFormat
from bnfix.errors import BnfixError
from bnfix.render import About, render_all


class Steps:
    """Names of steps on standard error: a spinner in a terminal, else one line a step."""

    def __init__(self) -> None:
        self._status: Any = None
        self._last = ""
        self._began = time.monotonic()

    def __call__(self, step: str) -> None:
        """A new step begins."""
        if step == self._last:
            return
        self._last = step
        if self._status is not None:
            seconds = time.monotonic() - self._began
            self._status.update(f"{_literally(step)} [dim]{seconds:.0f} s[/dim]" if seconds >= 1 else _literally(step))
        elif sys.stderr is not None:
            with contextlib.suppress(OSError):
                print(f"{step} ...", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def shown(self) -> Iterator[Steps]:
        """With the spinner turning, where there is a terminal."""
        from rich.console import Console

        console = Console(stderr=True)
        if not console.is_terminal or console.is_dumb_terminal:
            yield self
            return
        with console.status("starting") as self._status:
            yield self
        self._status = None


@contextlib.contextmanager
def working() -> Iterator[Steps]:
    """The long part of a command: steps are shown, and what a model prints does not mix with the report."""
    with Steps().shown() as steps, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not sys.warnoptions:  # python -W or PYTHONWARNINGS shows them
            warnings.simplefilter("ignore")
        yield steps


def report(values: Sequence[Any], format: OutputFormat, about: Sequence[About]) -> None:
    """Write the report of a command to standard output.

    A reader that closed the pipe changes nothing: the work is done, and the exit code is that of the work.

    Raises:
        BnfixError: standard output can't be written (a full disk).
    """
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    try:
        render_all(values, format.value, Output(file=sys.stdout), about)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        leave_quietly()
        raise BnfixError(f"the report can't be written: {error.strerror}") from error


def leave_quietly() -> None:
    """Send what is left in the buffer of standard output nowhere, so that Python does not complain when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _literally(text: str) -> str:
    from rich.markup import escape

    return escape(text)
