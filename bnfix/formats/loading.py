"""From a file or a spec to a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.errors import LoadError, UnknownFormatError, UntrustedModelError
from bnfix.formats import advice, fitting, recipes
from bnfix.formats.base import Weights
from bnfix.formats.names import wrapped_by_training
from bnfix.formats.pickles.danger import PACKED
from bnfix.formats.recognition import format_of, sniff
from bnfix.formats.specs import InputHint, build, parse_spec
from bnfix.types import FileInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnfix.running import Call

ARCHES = "--arch takes timm:resnet50, torchvision:resnet18, package.module:Class or file.py:Class"


@dataclass(frozen=True)
class Loaded:
    """What was loaded, where from, and the lines a person should see.

    ``value`` is an ``nn.Module`` (a ``ScriptModule`` too), an exported program, or the path of an ONNX file.
    ``input_hint`` is the shape of one sample without the batch, and who says so; None where nobody does.
    """

    value: nn.Module | torch.export.ExportedProgram | Path
    info: FileInfo | None = None
    arch: str | None = None
    notes: tuple[str, ...] = ()
    input_hint: InputHint | None = None
    call: Call | None = None
    """What an exported program was exported with."""


def load(
    path_or_spec: str | os.PathLike[str],
    *,
    arch: Any = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Loaded:
    """Load a model from a file, or build one that ``timm:resnet50`` or ``pkg.mod:callable`` names.

    Weights are read by torch's safe loader only, on the CPU, into the architecture ``arch`` (a spec, or in Python a
    class, a factory or a module, which is copied); every name must fit. Folded weights bring their recipe, which
    is replayed.
    A pickled module runs its own code and needs ``trust``.

    Raises:
        LoadError: it can't be read as a model; the message says what it is and what to do.
        UntrustedModelError: loading it could run code, and ``trust`` was not given, or it names what no model needs.
        UnknownFormatError: it is nothing that bnfix knows.
        ValueError: arguments that exclude each other.
    """
    spec = parse_spec(os.fspath(path_or_spec)) if isinstance(path_or_spec, str) else None
    if spec is not None:
        if arch is not None:
            raise ValueError(f"{spec} is an architecture: give a file of weights with arch, or {spec} alone")
        model, hint = build(str(spec), arch_kwargs)
        note = f"{spec} has the weights it was built with: no file was given"
        return Loaded(model, None, str(spec), (note,) if spec.where in ("timm", "torchvision") else (), hint)
    info = sniff(path_or_spec)
    _refuse_dangerous(info)
    reader = format_of(info)
    if info.kind == "unknown":
        raise UnknownFormatError(f"{info.path} is {info.title}", hint=info.advice)
    if reader is None:
        raise LoadError(f"{info.path} is {info.title}", hint=info.advice or None)
    if info.kind in ("state_dict", "safetensors", "lightning") and arch is None:
        raise _needs_arch(info)
    content = reader.read(info, trust=trust)
    if not isinstance(content, Weights):
        return Loaded(content, info, None, _module_notes(info, arch))
    model, hint = build(arch, arch_kwargs)
    shown = arch if isinstance(arch, str) else getattr(arch, "__name__", type(arch).__name__)
    notes = [*_wrapper_notes(info), *content.notes]
    if content.recipe is not None:
        model = recipes.replay(model, content.recipe, info.path)
        notes += _recipe_notes(content.recipe)
    notes += fitting.fit(model, content, where=info.path, arch=shown)
    return Loaded(model, info, shown, tuple(notes), hint)


def weights(path: str | os.PathLike[str], *, trust: bool = False) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The tensors of a file of weights by name, without any architecture, and what a person should know of them.

    Read by torch's safe loader only; names come without what training wrappers put before them.

    Raises:
        LoadError, UntrustedModelError: as :func:`load`; LoadError where it holds no weights by name.
    """
    info = sniff(path)
    _refuse_dangerous(info)
    reader = format_of(info)
    content = reader.read(info, trust=trust) if reader is not None and info.kind != "unknown" else None
    if not isinstance(content, Weights):
        raise LoadError(f"{info.path} is {info.title}: no weights by name", hint=info.advice or None)
    rename = wrapped_by_training(content.tensors)
    tensors = {rename(k): v for k, v in content.tensors.items() if k not in rename.dropped}
    return tensors, (*_wrapper_notes(info), *content.notes)


def _refuse_dangerous(info: FileInfo) -> None:
    if info.dangerous == (PACKED,):  # models are made of that, and it can't be looked into
        raise UntrustedModelError(
            f"{info.path} holds {info.title}. It is not loaded, whatever the flags.", hint=info.advice
        )
    if info.dangerous:
        raise UntrustedModelError(
            f"{info.path} names {', '.join(info.dangerous[:3])}: no model needs that, and loading it would run it. "
            "It is not loaded, whatever the flags.",
            hint="get the weights from a source you trust, as safetensors",
        )


def _needs_arch(info: FileInfo) -> LoadError:
    folded = f", {recipes.told(info.recipe)}" if info.recipe else ""
    held = f"{_count(info.tensors, 'tensor')}, {_count(len(info.norms), 'norm')}{folded}"
    return LoadError(
        f"{info.path} holds weights ({held}): of which architecture?",
        hint=f"{info.advice}\n{ARCHES}" if advice.GAP in info.advice else ARCHES,
    )


def _recipe_notes(recipe: Mapping[str, Any]) -> list[str]:
    edits = [e for stage in recipes.stages(recipe) for e in stage["edits"]]
    gone = sum("to" not in e and "unshare" not in e for e in edits)
    apart = sum("unshare" in e for e in edits)
    others = Counter(str(e["to"].get("class")) for e in edits if "to" in e)
    are = "is a placeholder" if gone == 1 else "are placeholders"
    notes = [f"un-shared by bnfix: {_count(apart, 'norm')}, as its recipe says"] if apart else []
    notes += [f"folded by bnfix: {_count(gone, 'norm')} {are}, as its recipe says"] if gone else []
    for name, n in others.items():
        notes.append(f"swapped by bnfix: {_count(n, 'norm')} {'is' if n == 1 else 'are'} {name}, as its recipe says")
    return notes


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _wrapper_notes(info: FileInfo) -> tuple[str, ...]:
    if info.wrapper is None:
        return ()
    others = f"; beside it lie {', '.join(info.other_wrappers)}" if info.other_wrappers else ""
    return (f"weights taken from {info.wrapper!r}{others}",)


def _module_notes(info: FileInfo, arch: Any) -> tuple[str, ...]:
    notes = list(_wrapper_notes(info))
    if arch is not None:
        notes.append("--arch was not needed: the file holds the model itself")
    return tuple(notes)
