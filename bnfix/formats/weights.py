"""The tensors of a file by name, for what needs no architecture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnfix.errors import LoadError
from bnfix.formats.base import Weights
from bnfix.formats.loading import refuse_dangerous, wrapper_notes
from bnfix.formats.names import wrapped_by_training
from bnfix.formats.recognition import format_of, sniff
from bnfix.types import FileInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadedWeights:
    """Tensors by name, without what training wrappers put before the names; the file, and what to know of it."""

    tensors: dict[str, torch.Tensor]
    info: FileInfo
    notes: tuple[str, ...] = ()


def load_weights(path: str | os.PathLike[str], *, trust: bool = False) -> LoadedWeights:
    """The weights in the file at ``path``, on the CPU; those of a module or of TorchScript are its state_dict.

    Raises:
        LoadError: there are none; the message says what the file is and what to do.
        UntrustedModelError: a pickled module without ``trust``, or one that names what no model needs.
    """
    import torch

    info = sniff(path)
    refuse_dangerous(info)
    reader = format_of(info)
    if reader is None or info.kind in ("unknown", "onnx"):
        raise LoadError(f"{info.path} is {info.title}: it holds no weights by name", hint=info.advice or None)
    content = reader.read(info, trust=trust)
    notes = list(wrapper_notes(info))
    if isinstance(content, Weights):
        table = dict(content.tensors)
        notes += content.notes
    elif isinstance(content, torch.nn.Module | torch.export.ExportedProgram):
        table = dict(content.state_dict())
    else:
        raise LoadError(f"{info.path} is {info.title}: it holds no weights by name", hint=info.advice or None)
    tensors = {k: v for k, v in table.items() if isinstance(v, torch.Tensor)}
    renaming = wrapped_by_training(tensors)
    if renaming:
        tensors = {renaming(k): v for k, v in tensors.items() if k not in renaming.dropped}
        notes.append(f"prefix {str(renaming)!r} stripped from the names")
    return LoadedWeights(tensors, info, tuple(notes))
