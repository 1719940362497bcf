"""``bnfix info``: what a file is, found out without loading it."""

from __future__ import annotations

from typing import Annotated

import typer

from bnfix.cli import options as o
from bnfix.cli.door import DONE, FAILED, WRONG, complain
from bnfix.cli.screen import report
from bnfix.errors import BnfixError
from bnfix.render import About

ORDER = 40
EPILOG = """**Examples**

`bnfix info weights.pt`

`bnfix info *.pt --output-format concise | grep norm`

**Exit codes**  0 bnfix can load every file · 1 one can't be loaded, or must not be (dangerous, truncated,
a web page …), which stops `bnfix info x.pt && …` in a script · 2 a file can't be read"""


def info(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files to look at.", show_default=False)],
    output_format: o.FormatOption = o.OutputFormat.full,
    traceback: o.TracebackOption = False,
) -> int:
    """Say what a file is: its kind, its tensors and norms, what loading it would run, and what to do with it.

    Nothing is unpickled and no code in the file is run; torch is not even imported. The exit code says whether
    every file can be loaded, so that it can stand before another command in a script.
    """
    from bnfix import api

    found, about, code = [], [], DONE
    for path in files:
        try:
            found.append(api.info(path))
            about.append(About("bnfix info", path))
        except BnfixError as error:  # the other files are still worth a look
            complain(error)
            code = WRONG
    if found:
        report(found, output_format, about)
    unfit = any(value.dangerous or not value.loadable for value in found)
    return code or (FAILED if unfit else DONE)
