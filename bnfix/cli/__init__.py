"""The command ``bnfix``: parse, call, draw, exit. Importing it is cheap; torch comes with the verb that needs it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    from bnfix.cli.door import Terminated

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated  # so that a file half written is taken away, as after Ctrl-C

    signal.signal(signal.SIGTERM, end)
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """One command in this process; its exit code. What the demo plays is what a user would type."""
    from bnfix.cli.app import build
    from bnfix.cli.door import codes

    with codes(traceback="--traceback" in argv) as ended:
        try:
            build()(args=list(argv), prog_name="bnfix")
        except SystemExit as left:  # how typer ends, with a code in any case
            ended.code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return ended.code
