"""What goes where: the report to standard output, steps to standard error; a reader that left is no error."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bnfix.cli.door import leave_quietly
from bnfix.cli.options import OutputFormat
from bnfix.errors import BnfixError
from bnfix.render import About, render_all
from bnfix.render.legible import legible


class Steps:
    """Names of steps on standard error: with a spinner and a clock in a terminal, else one line a step."""

    def __init__(self) -> None:
        self._show: Callable[[str], None] = _print
        self._last = ""

    def __call__(self, step: str) -> None:
        """A new step begins."""
        if step != self._last:
            self._last = step
            self._show(step)

    @contextlib.contextmanager
    def shown(self) -> Iterator[Steps]:
        """With the spinner turning, where there is a terminal; nothing of it stays on the screen."""
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        if not console.is_terminal or console.is_dumb_terminal:
            yield self
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting", total=None)
            self._show = lambda step: progress.update(task, description=legible(step))
            yield self
        self._show = _print


def _print(step: str) -> None:
    with contextlib.suppress(OSError):
        print(f"{legible(step)} ...", file=sys.stderr, flush=True)


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
