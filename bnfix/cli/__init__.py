"""The command ``bnfix``: parse, call, draw, exit. Importing it is cheap; torch comes with the verb that needs it."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from bnfix.cli.written import ended, watching


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code; with ``argv`` in a process of somebody else's."""
    with watching():
        try:
            _main(argv)
        except KeyboardInterrupt:  # before or after what `run` guards, as while the command itself is imported
            print(ended("interrupted"), file=sys.stderr)
            if argv is None:
                _leave_at_once(130)
            sys.exit(130)


def _main(argv: Sequence[str] | None) -> None:
    if argv is None:
        atexit.register(_ignore_interrupts)  # before anything else is imported, so that it runs last
    from bnfix.cli.door import Terminated, leave_quietly

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated  # so that a file half written is taken away, as after Ctrl-C

    signal.signal(signal.SIGTERM, end)
    code = run(sys.argv[1:] if argv is None else argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the help, to a reader that left
        leave_quietly()
    if argv is None:
        _leave_at_once(code)
    sys.exit(code)


def _leave_at_once(code: int) -> None:
    """From here on a signal ends the process with ``code``: all is done and told, and only Python has to be taken down.

    That takes torch a while, and whoever presses Ctrl-C then would get a traceback of somebody's exit handler.
    Without a signal those handlers run, as code of the user may have some too.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in a shell's background
            signal.signal(number, leave)


def _ignore_interrupts() -> None:
    """Behind the last exit handler Python gives signals back to the system, for which Ctrl-C is death by a signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(argv: Sequence[str]) -> int:
    """One command in this process; its exit code. What the demo plays is what a user would type."""
    from bnfix.cli.app import build
    from bnfix.cli.door import UNHEARD, codes, leave_quietly
    from bnfix.cli.typed import typing

    streams = sys.stdout, sys.stderr
    with watching(), typing(argv), codes(traceback="--traceback" in argv) as ended:
        try:
            build()(args=list(argv), prog_name="bnfix")
        except SystemExit as left:  # how typer ends, with a code in any case
            ended.code = left.code if isinstance(left.code, int) else int(left.code is not None)
            if isinstance(left.__context__, BrokenPipeError):  # the help, to a reader that left; typer swaps streams
                sys.stdout, sys.stderr = streams
                leave_quietly()
                ended.code = UNHEARD
    return ended.code
