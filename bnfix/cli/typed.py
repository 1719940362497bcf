"""The command line that was typed, so that an error can give it back with what was missing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_typed: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
_DONE = {"recalibrate": "recalibrated", "swap": "swapped", "unshare": "unshared"}
_OTHERWISE = re.compile(r"bnfix fold (weights\.pt .*)-o folded\.pt")
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
    done = _DONE.get(typed[0]) if typed else None
    if done is not None:
        line = _OTHERWISE.sub(rf"bnfix {typed[0]} \1-o {done}.pt", line)
    label, gap, general = line.partition("   ")
    words = _words(general.strip() if gap else line)
    if typed[:1] not in {(verb,) for verb in _OPENING} or len(words) < 3 or words[0] != "bnfix":
        return line
    if words[1] not in _OPENING:
        return line
    if words[2] not in typed:
        return f"{label}{gap}{_on_weights(words)}" if label.startswith("safer") and _is_another(words, typed) else line
    missing = ["--trust"] if "--trust" in words and "--trust" not in typed else []
    if "--arch" in words and not was_typed("--arch"):
        missing += words[words.index("--arch") :][:2]
        if "--data" in words and not was_typed("--data", "--input"):
            missing += words[words.index("--data") :][:2]
    return f"{label}{gap}{command(missing)}" if gap and missing else line


def _is_another(words: Sequence[str], typed: Sequence[str]) -> bool:
    """Whether a hint goes on from weights yet to be saved, with another command than the one that was typed."""
    return "--arch" in words and words[1] != typed[0] and len(typed) > 1 and not typed[1].startswith("-")


def _on_weights(words: Sequence[str]) -> str:
    """What was typed, on the weights and with the architecture that a hint names."""
    verb, _, *options = (w for w in _typed.get() if w != "--trust")
    return shlex.join(["bnfix", verb, words[2], "--arch", words[words.index("--arch") + 1], *options])


def command(more: Sequence[str] = ()) -> str:
    """What was typed, with ``more`` at its end, quoted for the shell."""
    return shlex.join(["bnfix", *_typed.get(), *more])


def without(flag: str, *, more: Sequence[str] = ()) -> str:
    """What was typed, without ``flag``, and with ``more`` at its end; quoted for the shell."""
    return shlex.join(["bnfix", *(word for word in _typed.get() if word != flag), *more])


def was_typed(*names: str) -> bool:
    """Whether one of the options ``names`` was given, with its value in the same word or the next."""
    return any(word.partition("=")[0] in names for word in _typed.get())


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # prose with an apostrophe
        return []
