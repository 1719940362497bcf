"""How a command ends: every error as one line and what to do next, and the exit codes of the design.

0 done · 1 a check failed, or a dry run would change something · 2 wrong use, or an error of bnfix ·
3 inconclusive · 130 interrupted · 141 the reader of the output left
"""

from __future__ import annotations

import os
import re
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any

import typer

from bnfix.cli import written
from bnfix.cli.typed import own
from bnfix.errors import BnfixError
from bnfix.render.legible import legible

_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
DONE, FAILED, WRONG, INCONCLUSIVE, INTERRUPTED, UNHEARD, TERMINATED = 0, 1, 2, 3, 130, 141, 143


class Terminated(BaseException):
    """SIGTERM came. No ``Exception``, so that nothing on the way out takes it for an error of its own."""


class UsageError(BnfixError):
    """The command was asked for something that does not fit together."""


@dataclass
class Ended:
    """How a command ended."""

    code: int = DONE


def command(function: Callable[..., int]) -> Callable[..., None]:
    """A typer command out of a function that returns an exit code."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with codes(traceback=bool(kwargs.get("traceback"))) as ended:
            ended.code = function(*args, **kwargs)
        raise typer.Exit(ended.code)

    return run


@contextmanager
def codes(*, traceback: bool) -> Iterator[Ended]:
    """Whatever happens inside becomes an exit code, and an error a line on standard error."""
    ended = Ended()
    shown = traceback or os.environ.get("BNFIX_TRACEBACK", "") not in ("", "0")
    try:
        yield ended
    except (typer.Exit, typer.Abort) as left:
        ended.code = getattr(left, "exit_code", INTERRUPTED)
    except KeyboardInterrupt:
        _say(written.ended("interrupted"))
        ended.code = INTERRUPTED
    except Terminated:
        _say(written.ended("terminated"))
        ended.code = TERMINATED
    except BrokenPipeError:  # the help, to a reader that left
        leave_quietly()
        ended.code = UNHEARD
    except Exception as error:  # noqa: BLE001 -- the last door: a traceback helps nobody who did not ask for it
        message, hint = explained(error, shown)
        _fail(written.despite(message), hint, shown)
        ended.code = WRONG


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Around what runs code of the user: a script that ends the program must not end ours as if all were well.

    Raises:
        BnfixError: the code inside called ``sys.exit``.
    """
    try:
        yield
    except SystemExit as left:
        raise BnfixError(
            f"{what}: the code in it ended the program (sys.exit({left.code!r}))",
            hint='keep what a script does under  if __name__ == "__main__":',
        ) from left


@contextmanager
def users_words(option: str) -> Iterator[None]:
    """Around what reads a string that the user typed: a ValueError there is wrong use, not a defect.

    Raises:
        UsageError: with the message of the ValueError.
    """
    try:
        yield
    except ValueError as error:
        said = str(error)
        raise UsageError(said if said.startswith("--") else f"{option}: {said}") from error


def explained(error: Exception, traceback: bool = False) -> tuple[str, list[str]]:
    """An error in words, and what to do next; ``traceback``: its origin is shown as well."""
    if isinstance(error, BnfixError):
        return error.message, (error.hint or "").splitlines()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return "out of memory", ["smaller inputs or batches take less; so does --memory-budget, where there is one"]
    first = (str(error).strip().splitlines() or ["(no message)"])[0]
    hint = [] if traceback else ["what happened where:  add --traceback (or set BNFIX_TRACEBACK=1)"]
    return f"{type(error).__name__}: {first}", ["this is a defect of bnfix, please report it", *hint]


def complain(error: Exception, traceback: bool = False, *, about: str = "") -> None:
    """An error as a line on standard error, where the command goes on; it names the file that it is ``about``."""
    message, hint = explained(error, traceback)
    _fail(message if about in message else f"{about}: {message}", hint, traceback)


def _fail(message: str, hint: list[str], traceback: bool) -> None:
    if traceback:
        tracebacks.print_exc(file=sys.stderr)
    _say("".join([f"error: {message}", *(f"\n  {own(line)}" for line in hint)]))


def _say(text: str) -> None:
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    try:
        print(legible(text).encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)
    except OSError:  # nobody listens: the exit code still speaks
        return


def leave_quietly() -> None:
    """Send what is left in the buffer of standard output nowhere, so that Python does not complain when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
