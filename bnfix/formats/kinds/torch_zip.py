"""What ``torch.save`` writes since 1.6: a zip with a pickle and one member a storage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.formats import torch_files
from bnfix.formats.archive import DamagedError
from bnfix.formats.base import MAX_PICKLE, Format, Probe
from bnfix.formats.pickles.contents import storages
from bnfix.formats.pickles.machine import examine
from bnfix.types import FileInfo

if TYPE_CHECKING:
    from torch import nn


class TorchZip(Format):
    """State dicts, Lightning checkpoints and pickled modules in a zip archive."""

    order = 20
    kinds = torch_files.KINDS
    containers = frozenset(["zip"])
    suffixes = (".pt", ".pth", ".bin", ".ckpt")

    def recognise(self, file: Probe) -> FileInfo | None:
        if not file.is_zip or not file.archive.has("data.pkl"):
            return None
        data = file.archive.read("data.pkl", MAX_PICKLE)
        pickle = examine(data)
        rest = data[pickle.end :]
        names = dict(pickle.names)
        hidden = ""
        if not pickle.problem and rest:
            hidden = f"({len(rest):,} bytes behind its end)"
            names |= examine(rest).names
        if pickle.problem:
            _, dangerous = torch_files.judged(names)
            return file.info(
                "damaged", "zip", f"a damaged torch file: in its pickle, {pickle.problem}", dangerous=dangerous,
                advice="copy or download it again",
            )  # fmt: skip
        info = torch_files.classify(file, pickle, names, "zip", hidden=hidden)
        if not info.dangerous:
            _check_storages(file, pickle.value)
            file.archive.check_sums()
        return info

    def read(self, info: FileInfo, *, trust: bool) -> Any:
        return torch_files.read(info, trust=trust)

    def update(self, info: FileInfo, path: Path, model: nn.Module, *, trust: bool) -> bool:
        return torch_files.update(info, path, model, trust=trust)

    def write(
        self, path: Path, model: nn.Module, recipe: str | None, *, whole: bool, calls: Sequence[Any] = ()
    ) -> None:
        torch_files.write(path, model, recipe, whole=whole)


def _check_storages(file: Probe, root: Any) -> None:
    try:
        declared = storages(root)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    for storage in declared.values():
        stored = file.archive.stored_size(f"data/{storage.key}")
        if storage.nbytes and (stored is None or stored < storage.nbytes):
            raise DamagedError(f"the tensor data/{storage.key} in it is missing or too short")
