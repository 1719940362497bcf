"""Which files a command has put in place, asked of the file system: an interrupt may come before any line notes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_Identity = tuple[int, ...] | None
_Watched = dict[str, tuple[str, _Identity]]
_watched: ContextVar[_Watched | None] = ContextVar("watched", default=None)
_untold: ContextVar[bool] = ContextVar("untold", default=False)
_SHOWN = 3


@contextmanager
def watching() -> Iterator[None]:
    """Inside, the targets that :func:`watch` is told of are kept; who watches around this keeps them afterwards."""
    around, own = _watched.get(), _Watched()
    token = _watched.set(own)
    try:
        yield
    finally:
        _watched.reset(token)
        if around is not None:
            around.update(own)


@contextmanager
def untold() -> Iterator[None]:
    """Inside, no target is kept: for what deals with its files by itself, as a demo that leaves nothing."""
    token = _untold.set(True)
    try:
        yield
    finally:
        _untold.reset(token)


def watch(target: str) -> None:
    """``target`` will be written: what is there now is not that."""
    kept, path = _watched.get(), os.path.abspath(target)  # code of the user may go to another folder
    if kept is not None and path not in kept and not _untold.get():
        kept[path] = target, _identity(path)


def ended(how: str) -> str:
    """``how`` the command ended early, and what became of the files it was to write, where it was to write any."""
    done = _done()
    if done:
        return f"{how} after {done}"
    return f"{how}: nothing was written" if _watched.get() else how


def despite(message: str) -> str:
    """An error, and the files that were written all the same, where there are any."""
    done = _done()
    return f"{message} ({done})" if done else message


def _done() -> str:
    """``q.pt was written``. Each file is whole: it is made beside its target and moved there."""
    watched = _watched.get() or {}
    files = [shown for path, (shown, before) in watched.items() if _identity(path) != before]
    if not files:
        return ""
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return f"{', '.join(files[:_SHOWN])}{more} {'was' if len(files) == 1 else 'were'} written"


def _identity(path: str) -> _Identity:
    """Another one for the file that is moved to ``path``: both inodes are there for a moment, so they differ."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
