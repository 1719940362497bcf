"""The page of a file that was looked at and not loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bnfix.render.numbers import count, size
from bnfix.render.page import Column, Line, Page, Row, State
from bnfix.render.pages import PageOf
from bnfix.types import FileInfo

COLUMNS = (Column("what", "path"), Column("found"))
FEW = 8
TRAINING = "it was saved in training mode: bnfix uses it in evaluation mode, others have to call model.eval()"


class FileInfoPage(PageOf):
    """What a file is, what is in it, whether it can be loaded, and what to do with it."""

    kind = FileInfo
    columns = (Column("what"), Column("size", "number"), Column("tensors", "number"), Column("norms", "number"),
               Column("loading"))  # fmt: skip

    def page(self, value: FileInfo) -> Page:
        rows = [Row(state, (what, found)) for state, what, found in _found(value) if found]
        state: State = "done" if value.loadable else "failed" if value.dangerous else "kept"
        norms = [count(len(value.norms), "norm")] if value.tensors else []
        lines = [Line(row.state, row.cells[0], row.cells[1]) for row in rows if row.cells[0] != "norms"]
        lines += [Line("plain", n.path, _norm(n.channels, n.dtype, n.affine)) for n in value.norms]
        return Page(
            title=value.path,
            columns=COLUMNS,
            rows=tuple(rows),
            lines=tuple(lines),
            state=state,
            verdict=(value.title, *norms, _can(value)),
            notes=(TRAINING,) if value.facts.get("training") is True else (),
            next=tuple(_step(n, line) for n, line in enumerate(value.advice.splitlines())),
        )

    def cells(self, value: FileInfo) -> tuple[str, ...]:
        tensors, norms = (f"{value.tensors:,}", f"{len(value.norms):,}") if value.tensors else ("", "")
        return value.title, size(value.size), tensors, norms, _can(value)

    def remarks(self, value: FileInfo) -> tuple[str, ...]:
        return tuple(f"{what} {found}" for state, what, found in _found(value) if state == "failed" and found)

    def total(self, values: Sequence[FileInfo]) -> tuple[str, ...]:
        fit = sum(v.loadable for v in values)
        bad = sum(bool(v.dangerous) for v in values)
        said = f"{count(fit, 'file')} can be loaded" + (f", {len(values) - fit} can't" if fit < len(values) else "")
        return (said, *([f"{bad} must not be loaded"] if bad else []))


def _found(value: FileInfo) -> list[tuple[State, str, str]]:
    dtypes = ", ".join(f"{n:,} {dtype}" if len(value.dtypes) > 1 else dtype for dtype, n in value.dtypes.items())
    tensors = f"{value.tensors:,} ({dtypes}), {count(value.parameters, 'number')}, {size(value.bytes)}"
    names = [n.path for n in value.norms]
    shown = names if len(names) <= FEW else [*names[:3], "…", names[-1]]
    listed = ", ".join(shown).replace(", …,", " …")
    wrapper = f"the weights lie under {value.wrapper!r}" if value.wrapper else ""
    if value.wrapper and value.other_wrappers:
        wrapper += f", not taken: {', '.join(map(repr, value.other_wrappers))}"
    recipe = value.recipe or {}
    return [
        ("plain", "kind", f"{_kind(value)}, {size(value.size)}"),
        ("plain", "tensors", tensors if value.tensors else ""),
        ("plain", "norms", f"{len(names)}: {listed}" if names else ("none" if value.tensors else "")),
        ("plain", "wrapper", wrapper),
        ("plain", "prefix", f"{value.prefix!r} is stripped from the names" if value.prefix else ""),
        ("plain", "class", value.root_class or ""),
        ("kept", "runs code of", _some(tuple(n for n in value.names_code if n not in value.dangerous))),
        ("failed", "DANGEROUS", _some(value.dangerous)),
        ("plain", _done(recipe), _recipe(recipe) if recipe else ""),
        *(("plain", str(k).replace("_", " "), _said(v)) for k, v in value.facts.items() if k != "training"),
    ]


def _kind(value: FileInfo) -> str:
    packed = value.size and value.container not in (value.kind, "unknown")
    return f"{value.kind} ({value.container})" if packed else value.kind


def _said(fact: object) -> str:
    """A fact as one would say it: no brackets, no quotes."""
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, Mapping):
        return ", ".join(f"{n:,} {name}" if isinstance(n, int) else f"{name}: {n}" for name, n in fact.items())
    if isinstance(fact, (list, tuple)):
        return ", ".join(map(str, fact))
    return str(fact)


def _step(n: int, line: str) -> tuple[str, str]:
    """A line of advice: the words before three spaces are its label, the rest is there to be pasted."""
    label, gap, rest = line.partition("   ")
    return (label, rest.strip()) if gap else ("next" if n == 0 else "", line)


def _can(value: FileInfo) -> str:
    if value.kind == "onnx":
        return "for bnfix verify; fold and export start from a PyTorch model"
    if value.loadable:
        return "can be loaded"
    return "must not be loaded" if value.dangerous else "can't be loaded as it is"


def _norm(channels: int, dtype: str, affine: bool) -> str:
    return f"norm of {count(channels, 'channel')}, {dtype}" + ("" if affine else ", not affine")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def _done(recipe: Mapping[str, Any]) -> str:
    """The last repair of the norms in a file."""
    kinds = {kind for edit in recipe.get("edits", ()) for kind in ("to", "unshare") if kind in edit}
    return "swapped" if "to" in kinds else "un-shared" if kinds else "folded"


def _recipe(recipe: object) -> str:
    version = recipe.get("bnfix") if isinstance(recipe, dict) else None
    return " ".join(("by bnfix", str(version)) if version else ("by bnfix",)) + ": load it with bnfix.load"
