"""Files written beside their target and moved into place: the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from bnfix.errors import BnfixError


def check_target(
    path: str | os.PathLike[str], *, source_path: str | os.PathLike[str] | None = None, inplace: bool = False
) -> None:
    """Whether ``path`` can be written, asked before any long work. Writes nothing.

    With ``source_path`` the target must be another file (by inode: links are seen through), unless ``inplace``.

    Raises:
        BnfixError: a directory, a missing or read-only directory, a device, a read-only file, or the input itself.
    """
    shown = os.fspath(path)
    try:
        target = Path(path).resolve()
        found = target.stat() if target.exists() else None
        folder = target.parent
        folder_ok = folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, a loop of links
        raise BnfixError(f"{shown} can't be written: {_reason(error)}") from error
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise BnfixError(f"{shown} is a directory", hint=f"name a file in it:  -o {Path(shown) / 'model.pt'}")
    if not folder_ok:
        raise BnfixError(f"{shown} can't be written: there is no directory {folder}", hint=f"mkdir -p {folder}")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise BnfixError(f"{shown} can't be written: it is no regular file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BnfixError(f"{shown} can't be written: the directory {folder} is not writable")
    if found is not None and not os.access(target, os.W_OK):
        raise BnfixError(f"{shown} can't be written: the file is read-only", hint="name another file with -o")
    if source_path is not None and not inplace and found is not None and _same(target, Path(source_path)):
        raise BnfixError(
            f"{shown} is the input: it would be overwritten",
            hint="name another file with -o\nor say that you mean it:  --in-place",
        )


def check_apart(path: str | os.PathLike[str], inputs: Iterable[tuple[str, str]]) -> None:
    """Whether ``path`` is none of ``inputs``, files each with what names it: those are never written over.

    Compared by inode, so that links and other spellings of a path are seen through.

    Raises:
        BnfixError: it is one of them.
    """
    shown = os.fspath(path)
    for option, source in inputs:
        if _same(Path(path), Path(source)):
            raise BnfixError(
                f"{shown} is what {option} reads: it would be overwritten", hint="name another file with -o"
            )


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty file beside ``target``, to be written inside the block and moved over ``target`` at its end.

    Leaving by an exception (Ctrl-C included) removes it and leaves ``target`` as it was. The new file
    has the permissions of the one it replaces, else those of any new file. A link stays, what it leads to is replaced.

    Raises:
        BnfixError: the operating system refused (no space, no permission).
    """
    final = Path(target).resolve()
    # The suffix stays: some writers go by it. The name is short: the target's own may be as long as names can be.
    beside = final.parent / f".bnfix-{secrets.token_hex(6)}{final.suffix}"
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE((final if final.exists() else beside).stat().st_mode)
        yield beside
        os.chmod(beside, mode)
        _sync(beside)
        os.replace(beside, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise BnfixError(f"{os.fspath(target)} can't be written: {_reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where a system lets a directory be opened and synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # not there; a NUL in a name
        return False


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
