"""Many alike rows told as few: folded norms by the part of the model they are in, kept norms by their reason."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from bnfix.types import Edit, Refusal

ROWS = 12
"""Folded norms shown one a row up to here; beyond, neighbours are run together."""


def together(edits: Sequence[Edit], rows: int = ROWS) -> list[list[Edit]]:
    """``edits`` in at most ``rows`` runs, each within one part of the model, in their order.

    The parts are those of the deepest level of module paths (``layer1``, ``layer1.0``) that still fits. Where even the
    top level has too many parts, neighbours share a row.
    """
    if len(edits) <= rows:
        return [[e] for e in edits]
    best: list[list[Edit]] = []
    for depth in range(1, 1 + max(e.site.count(".") for e in edits)):
        runs = _by_part(edits, depth)
        if len(runs) > rows:
            break
        best = runs
    if len(best) >= min(4, rows):
        return best
    runs = _by_part(edits, depth)
    size = -(-len(runs) // rows)
    return [[e for run in runs[i : i + size] for e in run] for i in range(0, len(runs), size)]


def alike(refusals: Sequence[Refusal], rows: int = ROWS, few: int = 3) -> list[tuple[str, list[Refusal]]]:
    """``refusals`` with one reason together, where at least ``few`` share it, as (reason, refusals).

    Where more than ``rows`` are left even so, reasons that differ only in the module paths they name count as
    one, and the paths are told by what they have in common (``features.*``). A defect stands alone.
    """
    groups = _groups(refusals, lambda r: r.reason, few)
    if len(groups) > rows:
        groups = _groups(refusals, lambda r: _PATH.sub("*", r.reason), few)
    return [(_common_reason([r.reason for r in group]), group) for group in groups]


_PATH = re.compile(r"\b(?!aten\.|torch\.|prims\.)[^\W\d]\w*(?:\.\w+)+(?:@\d+)?")


def named(names: Sequence[str], most: int = 6) -> str:
    """The first of ``names`` and the last, and how many norms they are, where they are more than ``most``."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:3])} … {names[-1]} ({len(names)} norms)"


def _groups(refusals: Sequence[Refusal], key: Callable[[Refusal], str], few: int) -> list[list[Refusal]]:
    groups: dict[object, list[Refusal]] = {}
    for index, refusal in enumerate(refusals):
        groups.setdefault(index if refusal.defect else key(refusal), []).append(refusal)
    return [part for group in groups.values() for part in ([group] if len(group) >= few else [[r] for r in group])]


def _common_reason(reasons: list[str]) -> str:
    if len(set(reasons)) == 1:
        return reasons[0]
    named = iter(zip(*(_PATH.findall(reason) for reason in reasons), strict=True))
    return _PATH.sub(lambda _: _common_path(next(named)), reasons[0])


def _common_path(paths: Sequence[str]) -> str:
    if len(set(paths)) == 1:
        return paths[0]
    levels = zip(*(path.split(".") for path in paths), strict=False)
    shared = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    return ".".join([*shared, "*"])


def _by_part(edits: Sequence[Edit], depth: int) -> list[list[Edit]]:
    runs: list[list[Edit]] = []
    last = None
    for edit in edits:
        part = re.split(r"\.", edit.site)[:depth]
        if part != last:
            runs.append([])
        runs[-1].append(edit)
        last = part
    return runs
