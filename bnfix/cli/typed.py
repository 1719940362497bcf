"""The command line that was typed, so that an error can give it back with what was missing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_typed: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
_ON_WEIGHTS = re.compile(r"bnfix (\w+) (weights\.pt) --arch (\S+)(?: -o \S+)?")
"""What hints go on with where the weights are to be saved first."""
_OPENING = ("check", "fold", "recalibrate", "swap", "unshare", "export", "verify")


@contextmanager
def typing(argv: Sequence[str]) -> Iterator[None]:
    """Inside, ``argv`` is what the user typed."""
    token = _typed.set(tuple(argv))
    try:
        yield
    finally:
        _typed.reset(token)


def own(line: str) -> str:
    """A line of a hint with the user's own command in place of a general one.

    ``if you trust it   bnfix fold net.pt --trust -o …`` becomes ``if you trust it   bnfix export net.pt -o net.onnx
    --trust`` where that was typed without ``--trust``; and what is to be done with weights once they are saved becomes
    what was to be done. Every other line stays as it is.
    """
    typed = _typed.get()
    if typed[:1] not in {(verb,) for verb in _OPENING}:
        return line
    line = _ON_WEIGHTS.sub(_on_weights, line)
    label, gap, general = line.partition("   ")
    words = _words(general.strip() if gap else line)
    if len(words) < 3 or words[0] != "bnfix" or words[1] not in _OPENING or words[2] not in typed:
        return line
    missing = ["--trust"] if "--trust" in words and "--trust" not in typed else []
    if "--arch" in words and not was_typed("--arch"):
        missing += words[words.index("--arch") :][:2]
        if "--data" in words and not was_typed("--data", "--input"):
            missing += words[words.index("--data") :][:2]
    return f"{label}{gap}{command(missing)}" if gap and missing else line


def _on_weights(hint: re.Match[str]) -> str:
    """What was typed, on the weights and with the architecture that a hint names; the hint where that is the same."""
    verb, *given = _typed.get()
    if verb == hint[1] or not given or given[0].startswith("-") or hint[2] in given:
        return hint[0]
    options = [word for word in given[1:] if word != "--trust"]
    if was_typed("--arch"):  # a person knows better than a file which class its weights are of
        return shlex.join(["bnfix", verb, hint[2], *options])
    return shlex.join(["bnfix", verb, hint[2], "--arch", hint[3], *options])


def command(more: Sequence[str] = ()) -> str:
    """What was typed, with ``more`` at its end, quoted for the shell."""
    return shlex.join(["bnfix", *_typed.get(), *more])


def without(flag: str, *, more: Sequence[str] = ()) -> str:
    """What was typed, without ``flag``, and with ``more`` at its end; quoted for the shell."""
    return shlex.join(["bnfix", *(word for word in _typed.get() if word != flag), *more])


def for_real(output: str, *more: str) -> str:
    """What was typed, without ``--dry-run``, with ``more``, and with ``-o output`` where nothing says where it goes."""
    where = () if was_typed("-o", "--output", "--in-place") else ("-o", output)
    return without("--dry-run", more=(*more, *where))


def was_typed(*names: str) -> bool:
    """Whether one of the options ``names`` was given, with its value in the same word or the next."""
    return any(word.partition("=")[0] in names for word in _typed.get())


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # prose with an apostrophe
        return []
