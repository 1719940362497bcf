"""Several values of one kind as one page: a row a file, then what they come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bnfix.render.legible import all_legible
from bnfix.render.page import About, Column, Line, Page, Row, State
from bnfix.render.pages import layout_of, page_of
from bnfix.types import Value

FEW = 12
"""Remarks of one sort shown up to here."""
_WORST: tuple[State, ...] = ("failed", "warned", "unsure", "kept", "done", "told", "plain")


@dataclass(frozen=True)
class Failure(Value):
    """That nothing came out for one of several files, and why. ``hint`` holds the next steps, one a line."""

    path: str
    error: str
    message: str
    hint: str = ""


def page_of_all(values: Sequence[Any], about: Sequence[About]) -> Page:
    """``values`` of one kind (or failures) in one table, each named by the subject of its ``about``."""
    told = [(value, all_legible(said)) for value, said in zip(values, about, strict=True)]
    found = [value for value in values if not isinstance(value, Failure)]
    layout = layout_of((found or values)[0])
    columns = (Column("file", "path"), *layout.columns, Column("wrote", "path"))
    rows, lines, states, unmet = [], [], [], []
    annotations: list[Line] = []
    for value, said in told:
        page = page_of(value)
        state: State = "failed" if said.failed else page.state
        cells = all_legible(layout_of(value).cells(value))
        cells += ("",) * (len(layout.columns) - len(cells))
        if said.failed and not isinstance(value, Failure):
            unmet.append(said.subject)
            cells = (f"{cells[0]} · NOT written", *cells[1:])
        rows.append(Row(state, (said.subject, *cells, ", ".join(said.written))))
        wrote = [f"wrote {path}" for path in said.written]
        lines += [Line(line.state, f"{said.subject}: {line.site}", line.text) for line in page.lines]
        lines.append(Line(state, said.subject, " · ".join((*page.verdict, *wrote))))
        annotations += [Line(line.state, f"{said.subject}: {line.site}", line.text) for line in page.annotations]
        if isinstance(value, Failure):
            annotations.append(lines[-1])
        states.append(state)
    lost = [said.subject for value, said in told if isinstance(value, Failure)]
    failed = [f"{len(unmet)} of {len(values)} files NOT written: {_listed(unmet)}"] if unmet else []
    failed += [f"{len(lost)} of {len(values)} files failed: {_listed(lost)}"] if lost else []
    return Page(
        title=f"{len(values)} files",
        columns=columns,
        rows=tuple(rows),
        lines=tuple(lines),
        state=min(states, key=_WORST.index),
        verdict=(*(layout.total(found) if found else ()), *failed),
        details=(*_merged(told, lambda v, _: layout_of(v).remarks(v)), *_merged(told, lambda v, _: page_of(v).details)),
        notes=_merged(told, lambda v, said: (*page_of(v).notes, *said.notes)),
        annotations=tuple(annotations) if any(page_of(value).annotations for value, _ in told) else (),
    )


def _merged(told: Sequence[tuple[Any, About]], of: Callable[[Any, About], Sequence[str]]) -> tuple[str, ...]:
    """What is said of the files, each remark once, with the files that it is about unless it is about all of them."""
    about: dict[str, list[str]] = {}
    for value, said in told:
        for text in dict.fromkeys(of(value, said)):
            about.setdefault(all_legible(text), []).append(said.subject)
    whole = sum(not isinstance(value, Failure) for value, _ in told)
    merged = [text if len(names) == whole else f"{_listed(names)}: {text}" for text, names in about.items()]
    more = [f"and {len(merged) - FEW} more: --output-format concise"] if len(merged) > FEW + 1 else []
    return tuple([*merged[:FEW], *more] if more else merged)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} … {names[-1]} ({len(names)} files)"
