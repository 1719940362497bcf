"""What is said for Python, said for the command line: ``max_samples=100`` is ``--max-samples 100`` there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from bnfix.cli import typed
from bnfix.errors import BnfixError

_OF_DATA = ("the data ", "batch ")
_ONE_SIZE = re.compile(r"dimension 0 of \S+ is \d+, the program was exported for (\d+)")

_OPTIONS = (
    "certify", "forward", "include_frozen", "mask", "max_samples", "memory_budget", "method", "select", "spill_dir",
    "tol", "when",
)  # fmt: skip
_YOURS = re.compile(r" raised |the forward failed")
_CODE = re.compile(r"\bforward=(lambda\b.*)$")
_SET = re.compile(rf"\b({'|'.join(_OPTIONS)})=(?:(True)\b|\"([^\"]*)\"|'([^']*)'|(None)\b|([\w.…]+))?")
_BOTH = re.compile(r"\w+= \(on the command line: ([^)]*)\)")
_NAMED = re.compile(r"\b(include_frozen|max_samples|memory_budget|spill_dir)\b")


def as_options(text: str) -> str:
    """``text`` of one or more lines, with arguments of ``bnfix.recalibrate`` as options; other words stay."""
    return "\n".join(_line(line) for line in text.split("\n"))


def _line(line: str) -> str:
    line = _CODE.sub(lambda m: f"--forward {_quoted(m[1])}", line)
    return _NAMED.sub(lambda m: _option(m[1]), _SET.sub(_assigned, line))


def _assigned(match: re.Match[str]) -> str:
    name, true, double, single, none, bare = match.groups()
    if none:
        return f"no {_option(name)}"
    value = double or single or bare
    return _option(name) if true or not value else f"{_option(name)} {value}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _quoted(code: str) -> str:
    """Readable where the code has quotes itself, as ``b['image']`` does."""
    return f'"{code}"' if "'" in code and not set(code) & set('"$`\\!') else shlex.quote(code)


@contextmanager
def in_options(data: str) -> Iterator[None]:
    """Around the verb: what its errors say of its arguments is said of options, and ``data`` is named."""
    try:
        yield
    except BnfixError as error:
        error.hint = as_options(error.hint) if error.hint else None
        size = _ONE_SIZE.search(error.message)
        if size is not None and "the forward failed" in error.message:
            error.hint = f"--batch-size {size[1]}   or, of a loader of yours, batches of {size[1]}"
        error.message = as_options(error.message)
        if error.message.startswith(_OF_DATA):
            error.message = f"{data}: {error.message}"
        if error.hint is None and error.__cause__ is not None and _YOURS.search(error.message):
            error.hint = f"it is code of yours; where in it:   {typed.command(['--traceback'])}"
        raise


def asked_for(text: str) -> str:
    """What a rule needs, as an option: ``--data`` for ``data= (on the command line: --data)``."""
    return _BOTH.sub(r"\1", text)
