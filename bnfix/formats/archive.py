"""Zip archives read within bounds, and only where every reader would see the same members in them."""

from __future__ import annotations

import copy
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from bnfix.errors import LoadError

MAX_MEMBERS = 200_000
MAX_TABLE = 64 << 20
MAX_NAME = 1024
MAX_INFLATED = 64 << 20
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_PIECE = 1 << 20
_WHOLE: set[tuple[int, ...]] = set()
"""Files whose checksums were right, by what changes with their content: a command looks at its file several times."""
_READING = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    EOFError,
)


class DamagedError(Exception):
    """The file is not whole, or not as its writer made it. ``cut`` where its end is missing."""

    def __init__(self, reason: str, *, cut: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cut = cut


class Archive:
    """A zip file: its members by name below the folder that torch puts everything in.

    ``content`` is an archive within the file at ``path``, in memory already.

    Raises:
        DamagedError: cut off, or members that overlap, share a name or lie outside the file.
        LoadError: more members, or longer names, than any model has.
    """

    def __init__(self, path: Path, size: int, content: bytes | None = None) -> None:
        self.path = path
        self._content = content
        with self._open() as file:
            table_at = _check_end(path, file, size)
        try:
            with self._open() as raw, zipfile.ZipFile(raw) as file:
                members = file.infolist()
        except _READING as error:
            raise DamagedError(f"its table of contents is damaged ({error})") from error
        self._members = {m.filename: m for m in members}
        _check_members(path, members, table_at)
        first = members[0].filename if members else ""
        self.root = first.partition("/")[0] if "/" in first else ""
        """The folder of the first member, where torch looks for everything."""

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._content is None else io.BytesIO(self._content)

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in order."""
        return tuple(self._members)

    def _member(self, name: str) -> zipfile.ZipInfo | None:
        return self._members.get(f"{self.root}/{name}" if self.root else name)

    def has(self, name: str) -> bool:
        """Whether there is a member ``name`` below the root folder."""
        return self._member(name) is not None

    def has_below(self, folder: str) -> bool:
        """Whether there is any member below ``folder`` of the root folder."""
        start = f"{self.root}/{folder}/" if self.root else f"{folder}/"
        return any(n.startswith(start) for n in self._members)

    def below(self, *folders: str) -> list[str]:
        """The names below any of ``folders`` of the root folder, without that root."""
        start = f"{self.root}/" if self.root else ""
        wanted = tuple(f"{start}{folder}/" for folder in folders)
        return [n.removeprefix(start) for n in self._members if n.startswith(wanted)]

    def stored_size(self, name: str) -> int | None:
        """Bytes of a member as it lies there; None if it is missing or compressed, as torch never writes tensors."""
        member = self._member(name)
        return member.file_size if member is not None and member.compress_type == zipfile.ZIP_STORED else None

    def read(self, name: str, limit: int) -> bytes:
        """The content of a member of at most ``limit`` bytes.

        Raises:
            LoadError: it declares more. DamagedError: it can't be read.
        """
        member = self._member(name)
        if member is None:
            raise DamagedError(f"{name} is missing in it")
        if member.file_size > limit:
            raise LoadError(
                f"{self.path}: {name} in it claims {member.file_size:,} bytes, more than the {limit:,} bnfix reads"
            )
        try:
            with self._open() as raw, zipfile.ZipFile(raw) as file, file.open(_as_written(member)) as stream:
                return stream.read(limit)
        except _READING as error:
            raise _unreadable(name, error) from error

    def check_sums(self) -> None:
        """That each member, stored as torch stores them, is what was written: by its checksum, if it has one.

        torch reads without a look at them, and a damaged weight is as good as any other. Takes about .03 s for 100 MB;
        a file that was found whole is not read again as long as it is the same.

        Raises:
            DamagedError: one is not.
        """
        with self._open() as raw:
            found = os.fstat(raw.fileno()) if self._content is None else None
            now = None if found is None else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if now is not None and now in _WHOLE:
                return
            with zipfile.ZipFile(raw) as file:
                for name, member in self._members.items():
                    if member.compress_type == zipfile.ZIP_STORED:
                        _check_sum(file, member, name.removeprefix(f"{self.root}/"))
        if now is not None:
            _WHOLE.add(now)


def _check_sum(file: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> None:
    try:
        with file.open(_as_written(member)) as stream:
            while stream.read(_PIECE):
                pass
    except _READING as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> DamagedError:
    if isinstance(error, zipfile.BadZipFile) and "CRC" in str(error):
        return DamagedError(f"record {name} is not what was written, by its checksum")
    return DamagedError(f"{name} in it can't be read ({error})")


def _as_written(member: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """The member, to be read without its checksum where that is 0: torch can leave them out (``set_crc32_options``)."""
    if member.CRC:
        return member
    plain = copy.copy(member)
    plain.CRC = None  # type: ignore[assignment]  # what zipfile takes for none
    return plain


def _check_end(path: Path, file: BinaryIO, size: int) -> int:
    """Where the table of contents begins, as the end record says; refused where it does not join it seamlessly."""
    start = max(0, size - 65_557)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise DamagedError("it ends before its table of contents", cut=True)
    entries, length, offset, comment = struct.unpack("<HIIH", tail[at + 10 : at + 22])
    end = start + at
    if at >= 20 and tail[at - 20 : at - 16] == _LOCATOR64:
        end = struct.unpack("<Q", tail[at - 12 : at - 4])[0]
        file.seek(min(end, size))
        record = file.read(56)
        if len(record) < 56 or record[:4] != _END64:
            raise DamagedError("its table of contents is damaged")
        entries, length, offset = struct.unpack("<QQQ", record[32:56])
    if at + 22 + comment != len(tail) or offset + length != end:
        raise DamagedError("its table of contents is not where it should be")
    if entries > MAX_MEMBERS or length > MAX_TABLE:
        raise LoadError(f"{path}: the archive claims {entries:,} members, more than the {MAX_MEMBERS:,} bnfix reads")
    return int(offset)


def _check_members(path: Path, members: list[zipfile.ZipInfo], table_at: int) -> None:
    seen: set[str] = set()
    end = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        name = member.filename
        if len(name) > MAX_NAME:
            raise LoadError(f"{path}: a name in the archive is {len(name):,} characters long, bnfix reads {MAX_NAME:,}")
        if ".." in name.split("/") or name.startswith("/") or "\0" in name or "\\" in name:
            raise DamagedError("a name in it leads out of it")
        if name.casefold() in seen:
            raise DamagedError(f"two members in it are called {name}")  # readers differ in which one they take
        seen.add(name.casefold())
        if member.compress_type != zipfile.ZIP_STORED and member.file_size > MAX_INFLATED:
            raise LoadError(
                f"{path}: {name} in the archive claims {member.file_size:,} bytes out of {member.compress_size:,}, "
                f"more than the {MAX_INFLATED:,} bnfix unpacks"
            )
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            raise DamagedError(f"{name} in it has two sizes")
        if member.flag_bits & 1:
            raise DamagedError("it is encrypted")
        if member.header_offset < end:
            raise DamagedError("members in it overlap")
        end = member.header_offset + 30 + member.compress_size
        if end > table_at:
            raise DamagedError("a member in it reaches beyond its end", cut=True)
