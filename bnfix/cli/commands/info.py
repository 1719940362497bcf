"""``bnfix info``: what a file is, found out without loading it."""

from __future__ import annotations

from typing import Annotated

import typer

from bnfix.cli import options as o
from bnfix.cli.door import DONE, FAILED, complain
from bnfix.cli.screen import report
from bnfix.cli.several import Done, failed, finish
from bnfix.errors import BnfixError
from bnfix.render import About

ORDER = 40
EPILOG = """**Examples**

`bnfix info weights.pt`

`bnfix info *.pt --output-format concise | grep norm`

**Exit codes**  0 bnfix can load every file · 1 one can't be loaded, or must not be (dangerous, truncated,
a web page …), which stops `bnfix info x.pt && …` in a script · 2 a file can't be read"""


def info(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Files to look at.", show_default=False)],
    output_format: o.FormatOption = o.OutputFormat.full,
    traceback: o.TracebackOption = False,
) -> int:
    """Say what a file is: its kind, its tensors and norms, what loading it would run, and what to do with it.

    Nothing is unpickled and no code in the file is run; torch is not even imported. The exit code says whether
    every file can be loaded, so that it can stand before another command in a script.
    """
    from bnfix import api

    told = []
    for path in files:
        try:
            value = api.info(path)
            unfit = bool(value.dangerous) or not value.loadable
            told.append(Done(value, About("bnfix info", path), FAILED if unfit else DONE))
        except BnfixError as error:  # the other files are still worth a look
            if len(files) == 1:
                raise
            complain(error)
            told.append(failed(path, error, "bnfix info"))
    if len(told) == 1:
        report([told[0].value], output_format, [told[0].about])
    else:
        finish(told, output_format, "bnfix info")
    return max(d.code for d in told)
