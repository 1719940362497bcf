"""What a file is, by its content: no torch, nothing unpickled, nothing run."""

from __future__ import annotations

import difflib
import os
import stat
from functools import cache
from pathlib import Path

from bnfix.errors import LoadError
from bnfix.formats.archive import DamagedError
from bnfix.formats.base import Format, Probe
from bnfix.formats.pickles.machine import LimitError
from bnfix.registry import plugins
from bnfix.types import FileInfo

FRESH_COPY = "copy or download it again"


@cache
def formats() -> tuple[Format, ...]:
    """Every format there is, in the order in which they are asked."""
    found = plugins("bnfix.formats.kinds", Format)  # type: ignore[type-abstract]
    return tuple(sorted(found, key=lambda f: (f.order, type(f).__name__)))


def format_of(info: FileInfo) -> Format | None:
    """The format that reads files of ``info.kind`` in ``info.container``."""
    return next((f for f in formats() if info.kind in f.kinds and info.container in f.containers), None)


def sniff(path: str | os.PathLike[str]) -> FileInfo:
    """What the file at ``path`` is. Reads it, never runs it, never imports torch.

    Raises:
        LoadError: no such file, a directory, unreadable, or an archive or pickle beyond all bounds.
    """
    file = _probe(path)
    try:
        for candidate in formats():
            info = candidate.recognise(file)
            if info is not None:
                return info
    except DamagedError as error:
        kind = "truncated" if error.cut else "damaged"
        return file.info(kind, "zip", f"a damaged zip archive: {error.reason}", advice=FRESH_COPY)
    except LimitError as error:
        raise LoadError(f"{file.shown}: {error}, more than bnfix reads") from error
    except OSError as error:
        raise LoadError(f"{file.shown} can't be read: {error.strerror or error}") from error
    return file.info(
        "unknown", "unknown", "no model file that bnfix knows", advice=f"{FRESH_COPY}, or convert it to a state_dict"
    )


def _probe(path: str | os.PathLike[str]) -> Probe:
    shown = os.fspath(path)
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise LoadError(f"there is no file {shown}", hint=_near(Path(path))) from error
        raise LoadError(f"{shown} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(found.st_mode):
        inside = _models_in(Path(path))
        raise LoadError(f"{shown} is a directory", hint=_in_it(inside))
    if not stat.S_ISREG(found.st_mode):
        raise LoadError(f"{shown} is no regular file")
    return Probe(path, found.st_size)


def _in_it(models: list[str]) -> str:
    if models:
        return f"name a file in it: {', '.join(models)}"
    return "name a file of weights (.pt, .pth, .ckpt, .safetensors); there is none in this directory"


def _near(path: Path) -> str | None:
    try:
        names = [e.name for e in path.parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=2, cutoff=0.75)
    return f"near that name: {', '.join(str(path.parent / c) for c in close)}" if close else None


def _models_in(folder: Path) -> list[str]:
    endings = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pt2")
    try:
        return sorted(str(e) for e in folder.iterdir() if e.suffix in endings)[:5]
    except OSError:
        return []
