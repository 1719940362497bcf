"""What a file format is: how it is recognised, read and written. One file in ``kinds`` is one format."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bnfix.errors import LoadError
from bnfix.formats.archive import Archive
from bnfix.types import FileInfo

if TYPE_CHECKING:
    import torch

HEAD = 4096
MAX_PICKLE = 64 << 20
MAX_TEXT = 32 << 20


class Probe:
    """A regular file that exists, looked at from outside: size, first bytes, and what is asked for."""

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        self.shown = os.fspath(path)
        self.path = Path(path)
        self.size = size

    @cached_property
    def head(self) -> bytes:
        """The first 4096 bytes."""
        return self.read(0, HEAD)

    def read(self, offset: int, count: int) -> bytes:
        """Up to ``count`` bytes from ``offset``."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(count)

    @cached_property
    def is_zip(self) -> bool:
        """Whether torch would read it as a zip archive: by its first four bytes alone."""
        return self.head[:4] == b"PK\x03\x04"

    @cached_property
    def archive(self) -> Archive:
        """The file as a zip archive; raises as :class:`Archive` does."""
        return Archive(self.path, self.size)

    @cached_property
    def pickled(self) -> bytes:
        """As much of the file as a pickle at its beginning may reach."""
        return self.read(0, MAX_PICKLE)

    def info(self, kind: str, container: str, title: str, *, loadable: bool = False, **more: Any) -> FileInfo:
        """A :class:`FileInfo` of this file."""
        return FileInfo(self.shown, kind, container, self.size, title, loadable, **more)


@dataclass(frozen=True)
class Weights:
    """Tensors by name as they lie in a file, the recipe they carry, and what a person should know of the reading."""

    tensors: Mapping[str, torch.Tensor]
    recipe: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    """``_metadata`` of a state_dict: the version of each module that wrote it."""


class Format(ABC):
    """One way in which a file can hold a model, or something that is taken for one.

    ``order``: formats are asked in ascending order and the first to recognise a file has it. ``kinds`` and
    ``containers`` are the words it uses in ``FileInfo``, ``suffixes`` the endings under which it writes.
    """

    order: ClassVar[int] = 50
    kinds: ClassVar[frozenset[str]] = frozenset()
    containers: ClassVar[frozenset[str]] = frozenset()
    suffixes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def recognise(self, file: Probe) -> FileInfo | None:
        """What ``file`` is, by its content, without unpickling and without torch; None if it is not of this format.

        Raises:
            LoadError: a bound of the archive or the pickle was hit.
        """

    def read(self, info: FileInfo, *, trust: bool) -> Any:
        """The content: :class:`Weights`, an ``nn.Module``, or the path for what other libraries read.

        Raises:
            LoadError: nothing that bnfix can load; the message says what it is and what to do.
        """
        raise LoadError(f"{info.path} is {info.title}", hint=info.advice or None)

    def write(
        self, path: Path, model: torch.nn.Module, recipe: str | None, *, whole: bool, calls: Sequence[Any] = ()
    ) -> None:
        """Write ``model`` to ``path`` (a temporary file). ``recipe`` is JSON; ``whole`` asks for the module itself.

        ``calls`` are what the model is run on, for a format that holds no weights but what is done with them.

        Raises:
            LoadError: the model can't be written in this format.
        """
        raise NotImplementedError(f"{type(self).__name__} writes no files")

    def update(self, info: FileInfo, path: Path, model: torch.nn.Module, *, trust: bool) -> bool:
        """Write ``path`` (a temporary file): the file ``info``, of this format, with the values that ``model`` has now.

        Everything but the tensors that have changed stays: names, wrappers, whatever lies beside the weights.

        Returns:
            False where the format can't, or the file has other names than the model: then nothing was written.

        Raises:
            LoadError: as :meth:`read` and :meth:`write` do.
        """
        return False
