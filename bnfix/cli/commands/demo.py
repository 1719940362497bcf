"""``bnfix demo``: the story that bnfix began with, on a model trained on the spot."""

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
    """A Siamese network is fine in train() and lost in eval(): trained, found out, repaired, shipped. Under a minute.

    Offline, on handwritten digits: watch and check name the fault, unshare and recalibrate repair it without training,
    then fold, export and verify. Each step is shown as the command that you would type; the files stay, every command
    can be pasted, and report.html tells it with pictures.
    """
    from bnfix.cli.demo import play

    return play(dir)
