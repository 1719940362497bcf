"""Files: what they are, models out of them and into them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
        The module, in evaluation mode where bnfix built it (a pickled one as it was saved); for a ``.pt2`` the
        ``ExportedProgram``, for TorchScript the ``ScriptModule``, for an ONNX file its path.

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
    if not isinstance(loaded.value, (nn.Module, str, os.PathLike)):
        return _of_program(loaded)
    if not isinstance(loaded.value, nn.Module) or modes_as_saved:
        return loaded
    if any(m.training for m in loaded.value.modules()):
        loaded.value.eval()
        note = "the module was saved in training mode: it is used in evaluation mode"
        loaded = replace(loaded, notes=(*loaded.notes, note))
    return loaded


def _of_program(loaded: Loaded) -> Loaded:
    """An exported program as a module with real layers, and the inputs that it was exported with."""
    from bnfix.graph import drawn_example, from_exported
    from bnfix.running import Call

    program: Any = loaded.value
    return replace(loaded, value=from_exported(program), call=Call(*drawn_example(program)))


def converted(loaded: Loaded, calls: Sequence[Any]) -> Loaded:
    """A TorchScript program as a module, on what it is called with; whatever else was loaded as it is.

    Raises:
        TraceError: torch can't convert it, or not faithfully.
    """
    import torch

    if not isinstance(loaded.value, torch.jit.ScriptModule):
        return loaded
    from bnfix.graph import from_script

    note = "converted from TorchScript, with the same outputs on the first input"
    return replace(loaded, value=from_script(loaded.value, calls[0]), notes=(*loaded.notes, note))


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    source: FileInfo | None = None,
    inplace: bool = False,
    example: Any = None,
) -> Path:
    """Write ``model`` to ``path``, whole or not at all; with the ``recipe`` of a Result, ``load`` reads it again.

    The suffix chooses the format: ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.safetensors``, or ``.pt2``: an exported
    program, which needs no class. It is exported with ``example``, as for ``fold``; sizes in which a list of examples
    differs may vary. ``model`` may be an exported program itself.

    Raises:
        BnfixError: the target can't be written, or is the input ``source`` and ``inplace`` was not given.
        ValueError: an unknown suffix.
    """
    import torch

    from bnfix import formats
    from bnfix.graph import from_exported
    from bnfix.running import as_call

    given = example if isinstance(example, list) else [] if example is None else [example]
    if not isinstance(model, torch.nn.Module):
        model = from_exported(model)
    calls = [as_call(one) for one in given]
    return formats.save(model, path, recipe=recipe, source=source, inplace=inplace, calls=calls)


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
