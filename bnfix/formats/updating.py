"""A file written again with new values in it: for a repair that changes some numbers and nothing else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bnfix.errors import BnfixError
from bnfix.files import atomic_path, check_target
from bnfix.formats import recipes
from bnfix.formats.recognition import format_of
from bnfix.formats.saving import save, writer_for
from bnfix.types import FileInfo

if TYPE_CHECKING:
    from torch import nn


def update(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    source: FileInfo | None = None,
    trust: bool = False,
    inplace: bool = False,
) -> tuple[str, ...]:
    """Write ``source``, the file that ``model`` was loaded from, to ``path`` with the values that ``model`` has now.

    Names, wrappers and all that lies beside the weights stay. Where that can't be had (another ending, names that a
    load hook changed, no file at all) the weights are written, or the module where the file held one.

    Returns:
        What a person should know of the file written.

    Raises:
        BnfixError: the target can't be written, is ``source`` and ``inplace`` was not said, or would lose what
            lies beside the weights.
        ValueError: an unknown ending.
    """
    writer = writer_for(path)
    check_target(path, source_path=source.path if source is not None else None, inplace=inplace)
    reader = format_of(source) if source is not None else None
    if source is None or reader is None:
        save(model, path, inplace=inplace)
        return ()
    same = (".safetensors" in reader.suffixes) == (".safetensors" in writer.suffixes)
    with atomic_path(path) as beside:
        kept = same and reader.update(source, beside, model, trust=trust)
        if not kept:
            if inplace and source.wrapper:
                raise BnfixError(
                    f"{os.fspath(path)} can't be written again with all that is in it: its names are not the model's",
                    hint="the weights by themselves:  -o weights.pt",
                )
            writer.write(beside, model, recipes.to_text(source.recipe), whole=source.kind == "pickled_module")
    return _said(source, kept)


def _said(source: FileInfo, kept: bool) -> tuple[str, ...]:
    if not source.wrapper:
        return (f"the names in the file are as they were, with {source.prefix!r}",) if kept and source.prefix else ()
    if kept:
        said = f"written into {source.wrapper!r}: all else in the checkpoint is as it was"
        if source.other_wrappers:
            others = ", ".join(map(repr, source.other_wrappers))
            said += f", the weights under {others} too; to do these, save them as a file of their own"
        return (said,)
    return (f"the weights alone were written: what lies beside {source.wrapper!r} in {source.path} was not",)
