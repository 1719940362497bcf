"""What ``torch.save`` wrote before 1.6, and many pretrained files still are: five pickles and then the raw storages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.formats import torch_files
from bnfix.formats.base import Format, Probe
from bnfix.formats.pickles.contents import storages
from bnfix.formats.pickles.machine import Pickle, examine
from bnfix.formats.pickles.values import Global
from bnfix.types import FileInfo

if TYPE_CHECKING:
    from torch import nn

MAGIC = 0x1950A86A20F9469CFC6C
_PARTS = 5  # magic number, protocol, system, the object, the keys of its storages
_OBJECT = 3
_AGAIN = "copy or download it again"


class TorchLegacy(Format):
    """State dicts, Lightning checkpoints and pickled modules in torch's old format."""

    order = 20
    kinds = torch_files.KINDS
    containers = frozenset(["legacy"])

    def recognise(self, file: Probe) -> FileInfo | None:
        first = examine(file.head)
        if first.problem or first.value != MAGIC:
            return None
        pickles = [first]
        while len(pickles) < _PARTS and not pickles[-1].problem:
            pickles.append(examine(file.pickled, pickles[-1].end))
        names: dict[Global, None] = {}
        for pickle in pickles:
            names |= pickle.names
        problem = self._problem(file, pickles)
        if problem:
            _, dangerous = torch_files.judged(names)
            title = f"a torch file in the old format, cut off or damaged: {problem}"
            return file.info("truncated", "legacy", title, dangerous=dangerous, advice=_AGAIN)
        return torch_files.classify(file, pickles[_OBJECT], names, "legacy")

    def _problem(self, file: Probe, pickles: list[Pickle]) -> str:
        last = pickles[-1]
        if last.problem:
            return f"in pickle {len(pickles)} of {_PARTS}, {last.problem}"
        keys = last.value
        if pickles[1].value != 1001 or not isinstance(keys, list):
            return "its parts are not in order"
        try:
            declared = storages(pickles[_OBJECT].value)
        except ValueError as error:
            return str(error)
        needed = last.end
        for key in keys:
            storage = declared.get(str(key))
            if storage is None:
                return f"its storage {key} is unknown"
            needed += 8 + storage.nbytes
        return f"{needed:,} bytes are announced, {file.size:,} are there" if needed > file.size else ""

    def read(self, info: FileInfo, *, trust: bool) -> Any:
        return torch_files.read(info, trust=trust)

    def update(self, info: FileInfo, path: Path, model: nn.Module, *, trust: bool) -> bool:
        return torch_files.update(info, path, model, trust=trust)
