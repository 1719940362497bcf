"""From a model to a file: beside the target, then moved into place."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.errors import LoadError
from bnfix.files import atomic_path, check_target
from bnfix.formats import recipes
from bnfix.formats.base import Format
from bnfix.formats.recognition import formats
from bnfix.types import FileInfo

if TYPE_CHECKING:
    from torch import nn


PROGRAMS = ("exported_program", "torchscript")
PROGRAM_SUFFIX = ".pt2"


def known_suffixes() -> tuple[str, ...]:
    """Endings under which a model can be saved."""
    return tuple(s for f in formats() for s in f.suffixes)


def writer_for(path: str | os.PathLike[str]) -> Format:
    """The format that the ending of ``path`` asks for; ``.pth.tar``, as many training scripts write, is ``.pth``.

    Raises:
        ValueError: no format writes such files.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".tar" and Path(path).with_suffix("").suffix.lower() in (".pth", ".pt"):
        suffix = ".pth"  # no archive: the example scripts of PyTorch name their checkpoints so
    for known in formats():
        if suffix in known.suffixes:
            return known
    if Path(path).is_dir():
        raise ValueError(f"{os.fspath(path)} is a directory: name a file in it, such as {Path(path) / 'model.pt'}")
    but = f"not as {suffix}" if suffix else "and the name has no such ending"
    raise ValueError(f"{os.fspath(path)}: bnfix saves models as {', '.join(known_suffixes())}, {but}")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    source: FileInfo | None = None,
    inplace: bool = False,
    calls: Sequence[Any] = (),
) -> Path:
    """Write ``model`` to ``path``, whole or not at all; the ending chooses the format. ``model`` is not changed.

    Weights are written (with ``recipe``, by which folded ones are loaded again); the pickled module itself only where
    ``source``, the file it came from, was one, and the ending is torch's. A ``.pt2`` holds the program that the model
    runs on ``calls``: sizes in which these differ may vary. A model that came from a program needs none. What was done
    to the model before it was saved as ``source`` stays in the recipe.

    Raises:
        ValueError: an unknown ending.
        BnfixError: the target can't be written, or is the input and ``inplace`` was not said.
    """
    writer = writer_for(path)
    check_form(path, source)
    check_target(path, source_path=source.path if source is not None else None, inplace=inplace)
    whole = source is not None and source.kind == "pickled_module"
    recipe = recipes.following(source.recipe if source is not None else None, recipe)
    with atomic_path(path) as beside:
        writer.write(beside, model, recipes.to_text(recipe), whole=whole, calls=calls)
    return Path(path)


def check_form(path: str | os.PathLike[str], source: FileInfo | None) -> None:
    """Whether what came from ``source`` can be written to ``path``: a program has no class that weights could go into.

    Raises:
        LoadError: it can't.
    """
    if source is not None and source.kind in PROGRAMS and Path(path).suffix.lower() != PROGRAM_SUFFIX:
        name = Path(path).with_suffix(PROGRAM_SUFFIX)
        raise LoadError(
            f"{source.path} is {source.title}: it has no class that weights fit, so it is saved as a program again",
            hint=f"-o {shlex.quote(str(name))}",
        )
