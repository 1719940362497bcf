"""Files: what they are, models out of them and into them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from bnfix.formats import Loaded
    from bnfix.types import FileInfo


def info(path: str | os.PathLike[str]) -> FileInfo:
    """What a file is, by its content: nothing is unpickled, nothing in it is run, torch is not imported.

    Raises:
        LoadError: the file can't be read.
    """
    from bnfix.formats import sniff

    return sniff(path)


def load(
    path: str | os.PathLike[str],
    *,
    arch: Any = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Any:
    """The model in a file, or one that ``timm:resnet50``, ``torchvision:resnet18`` or ``pkg.mod:callable`` names.

    Args:
        arch: for a file of weights, the architecture they go into: a spec, a class, a factory or a module.
        arch_kwargs: what the architecture is built with.
        trust: load a pickled module, which runs its own code. One that names system functions is refused all the same.

    Returns:
        The module, in evaluation mode where bnfix built it (a pickled one as it was saved); for an ONNX file its path.

    Raises:
        LoadError: the file isn't what was asked for, or does not fit; the message says what to do.
    """
    from bnfix import formats

    return formats.load(path, arch=arch, arch_kwargs=arch_kwargs, trust=trust).value


def open_model(
    path: str | os.PathLike[str],
    *,
    arch: Any = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
    modes_as_saved: bool = False,
) -> Loaded:
    """As :func:`load`, in evaluation mode, with what a person should know: wrappers opened, prefixes, shapes.

    With ``modes_as_saved`` a pickled module stays in the modes that it was saved in: they say which norms are frozen.
    """
    from torch import nn

    from bnfix import formats

    loaded = formats.load(path, arch=arch, arch_kwargs=arch_kwargs, trust=trust)
    if not isinstance(loaded.value, nn.Module) or modes_as_saved:
        return loaded
    if any(m.training for m in loaded.value.modules()):
        loaded.value.eval()
        note = "the module was saved in training mode: it is used in evaluation mode"
        loaded = replace(loaded, notes=(*loaded.notes, note))
    return loaded


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    source: FileInfo | None = None,
    inplace: bool = False,
) -> Path:
    """Write ``model`` to ``path``, whole or not at all; with the ``recipe`` of a Result, ``load`` reads it again.

    The suffix chooses the format: ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` or ``.safetensors``.

    Raises:
        BnfixError: the target can't be written, or is the input ``source`` and ``inplace`` was not given.
        ValueError: an unknown suffix.
    """
    from bnfix import formats

    return formats.save(model, path, recipe=recipe, source=source, inplace=inplace)


def update_file(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    source: FileInfo | None = None,
    trust: bool = False,
    inplace: bool = False,
) -> tuple[str, ...]:
    """Write the file ``source`` again with the values that ``model``, loaded from it, has now; whole or not at all.

    Names, wrapper, optimizer state, recipe: everything but tensors that have changed stays as it is in the file. Where
    that can't be had (another format, names that a load hook changed, no file at all), :func:`save`.

    Returns:
        What a person should know of the file written.

    Raises:
        BnfixError: the target can't be written, or is ``source`` and ``inplace`` was not given.
        ValueError: an unknown suffix.
    """
    from bnfix.formats.updating import update

    return update(model, path, source=source, trust=trust, inplace=inplace)
