"""The command ``bnfix``: parse, call, draw, exit. Importing it is cheap; torch comes with the verb that needs it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        _main(argv)
    except KeyboardInterrupt:  # before or after what `run` guards, as while the command itself is imported
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _main(argv: Sequence[str] | None) -> None:
    from bnfix.cli.door import Terminated, leave_quietly

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated  # so that a file half written is taken away, as after Ctrl-C

    signal.signal(signal.SIGTERM, end)
    code = run(sys.argv[1:] if argv is None else argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the help, to a reader that left
        leave_quietly()
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """One command in this process; its exit code. What the demo plays is what a user would type."""
    from bnfix.cli.app import build
    from bnfix.cli.door import UNHEARD, codes, leave_quietly
    from bnfix.cli.typed import typing

    streams = sys.stdout, sys.stderr
    with typing(argv), codes(traceback="--traceback" in argv) as ended:
        try:
            build()(args=list(argv), prog_name="bnfix")
        except SystemExit as left:  # how typer ends, with a code in any case
            ended.code = left.code if isinstance(left.code, int) else int(left.code is not None)
            if isinstance(left.__context__, BrokenPipeError):  # the help, to a reader that left; typer swaps streams
                sys.stdout, sys.stderr = streams
                leave_quietly()
                ended.code = UNHEARD
    return ended.code
