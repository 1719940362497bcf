"""``bnfix demo``: the whole way once, on a model trained on the spot."""

from __future__ import annotations

from typing import Annotated

import typer

from bnfix.cli import options as o

ORDER = 50
EPILOG = """**Examples**

`bnfix demo`

`bnfix demo --dir my-demo`

**Exit codes**  0 all went well · otherwise the code of the step that did not"""


def demo(
    dir: Annotated[str, typer.Option("--dir", metavar="FOLDER", help="Where its files go.")] = "bnfix-demo",
    traceback: o.TracebackOption = False,
) -> int:
    """Train a small CNN on handwritten digits; fold, export, verify and recalibrate it: offline, in under a minute.

    Each step is shown as the command that you would type; the files stay, and every command can be pasted.
    """
    from bnfix.cli.demo import play

    return play(dir)
