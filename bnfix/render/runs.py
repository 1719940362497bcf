"""Many alike rows told as few: folded norms by the part of the model they are in, kept norms by their reason."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def alike(refusals: Sequence[Refusal], few: int = 3) -> list[list[Refusal]]:
    """``refusals`` with one reason together, where at least ``few`` share it; a defect stands alone."""
    groups: dict[object, list[Refusal]] = {}
    for index, refusal in enumerate(refusals):
        key: object = (index,) if refusal.defect else refusal.reason
        groups.setdefault(key, []).append(refusal)
    return [part for group in groups.values() for part in ([group] if len(group) >= few else [[r] for r in group])]


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
