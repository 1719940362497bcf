"""What goes where: the report to standard output, steps to standard error; a reader that left is no error."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from bnfix.cli.door import leave_quietly
from bnfix.cli.options import OutputFormat
from bnfix.errors import BnfixError
from bnfix.render import About, render_all
from bnfix.render.legible import legible

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 10.0
"""Seconds between two lines of one kind where there is no terminal."""
READABLE = 100
"""Columns of a text at most: longer lines are hard to read."""
_LISTENERS: list[list[tuple[Any, About]]] = []
_LINK = re.compile(r"\[(\w+)\]\(\w+\.md\)")
_COUNTED = re.compile(r"(?<=\s)\d[\d,]*(?=\W|$)")


class Steps:
    """Names of steps on standard error: with a spinner and a clock in a terminal, else one line a step.

    Without a terminal, steps that are alike up to a number in them (``norm 17: …``, ``reading: 2,048 samples``) are
    one line in ``EVERY`` seconds. ``quiet``: nothing is shown.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._show: Callable[[str], None] = self._line
        self._keep: Callable[[str], None] = _print
        self._last = self._kind = self._lead = self._file = ""
        self._when = 0.0

    def on(self, file: str, number: int, of: int) -> None:
        """The steps that follow are those of ``file``, one of several, and name it."""
        self._last = self._kind = ""
        self._file, self._lead = file, f"{number}/{of} {file}: "

    def __call__(self, step: str) -> None:
        """A new step begins."""
        if step != self._last and not self.quiet:
            self._last = step
            self._show(step.removesuffix(f" {self._file}") if self._file else step)

    def keep(self, line: str) -> None:
        """Something to know while the work goes on: it stays on the screen."""
        if not self.quiet:
            self._keep(self._lead + line)

    @contextlib.contextmanager
    def shown(self) -> Iterator[Steps]:
        """With the spinner turning, where there is a terminal; of the steps nothing stays on the screen."""
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        if self.quiet or not console.is_terminal or console.is_dumb_terminal:
            yield self
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting", total=None)
            self._show = lambda step: progress.update(task, description=legible(self._lead + step))
            self._keep = lambda line: progress.console.print(legible(line), markup=False, highlight=False)
            yield self
        self._show, self._keep = self._line, _print

    def _line(self, step: str) -> None:
        counted = _COUNTED.search(step)
        kind = step[: counted.start()] if counted else ""
        now = time.monotonic()
        if kind and kind == self._kind and now - self._when < EVERY:
            return
        self._kind, self._when = kind, now
        _print(f"{self._lead}{step} ...")


def _print(line: str) -> None:
    with contextlib.suppress(OSError):
        print(legible(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def working(*, quiet: bool = False) -> Iterator[Steps]:
    """The long part of a command: steps are shown, and what a model prints does not mix with the report."""
    with Steps(quiet=quiet).shown() as steps, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not sys.warnoptions:  # python -W or PYTHONWARNINGS shows them
            warnings.simplefilter("ignore")
        yield steps


def show_markdown(text: str, file: TextIO) -> None:
    """Write Markdown to ``file``: drawn where that is a terminal, as it is anywhere else.

    Raises:
        BnfixError: it can't be written (a full disk).
    """
    try:
        if file.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.markdown import Markdown
            from rich.theme import Theme

            theme = Theme({"markdown.code": "cyan", "markdown.h1": "bold", "markdown.h2": "bold"})
            console = Console(file=file, theme=theme)
            console.width = min(console.width, READABLE)
            console.print(Markdown(_LINK.sub(r"\1", text), code_theme="ansi_dark"))
        else:
            encoding = getattr(file, "encoding", None) or "utf-8"
            file.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        file.flush()
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        leave_quietly()
        raise BnfixError(f"the page can't be written: {error.strerror}") from error


def output() -> Console:
    """Standard output as rich draws on it; a reader that left is a BrokenPipeError, as everywhere."""
    from rich.console import Console as RichConsole

    class Output(RichConsole):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Output(file=sys.stdout)


@contextlib.contextmanager
def overheard() -> Iterator[list[tuple[Any, About]]]:
    """What the reports inside are made of, in their order, beside being written: for a page that quotes them."""
    heard: list[tuple[Any, About]] = []
    _LISTENERS.append(heard)
    try:
        yield heard
    finally:
        del _LISTENERS[-1]


def report(values: Sequence[Any], format: OutputFormat, about: Sequence[About], overall: About | None = None) -> None:
    """Write the report of a command to standard output; ``overall`` is about all of several files.

    A reader that closed the pipe changes nothing: the work is done, and the exit code is that of the work.

    Raises:
        BnfixError: standard output can't be written (a full disk).
    """
    for heard in _LISTENERS:
        heard.extend(zip(values, about, strict=True))
    try:
        render_all(values, format.value, output(), about, overall)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        leave_quietly()
        raise BnfixError(f"the report can't be written: {error.strerror}") from error
