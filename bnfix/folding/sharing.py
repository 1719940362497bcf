"""Which operations give memory that they were given, and which write into it: by the operator's own schema."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from bnfix.folding.carrier import short
from bnfix.types import Op, Route

_MAYBE = frozenset(["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "getitem", "pad"])
"""Those that may return their argument itself, without a word of it in the schema."""
_VIEW_OR_COPY = frozenset(["reshape", "reshape_as", "flatten", "ravel", "contiguous", "to"])
_NO_CHANGE = frozenset({"detach_", "dropout_", "lift_fresh"})


@cache
def _schema(target: str) -> tuple[frozenset[str], bool] | None:
    """The arguments that are written into, and whether a result may share memory with one; None: nothing is known."""
    room, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None) if room == "aten" and name else None
    function = getattr(packet, overload or "default", None)
    if function is None:
        return None
    given, made = function._schema.arguments, function._schema.returns
    written = frozenset(a.name for a in given if a.alias_info is not None and a.alias_info.is_write)
    return written, any(r.alias_info is not None for r in made)


def may_share(op: Op) -> bool:
    """Whether what an operation gives may lie where one of its inputs lies."""
    known = _schema(op.target)
    return known is None or known[1] or bool(known[0]) or short(op) in _MAYBE


def written(op: Op) -> frozenset[int]:
    """The inputs that an operation changes in place."""
    known = _schema(op.target)
    name = short(op)
    if known is None:  # no operator of PyTorch's: by its name
        changes = name.endswith("_") and not name.endswith("__")
        return frozenset(op.inputs[:1]) if changes else frozenset()
    if name in _NO_CHANGE:
        return frozenset()
    if any(argument not in op.reads for argument in known[0]):  # a list of values, say
        return frozenset(op.inputs) if known[0] else frozenset()
    return frozenset(op.reads[argument] for argument in known[0])


def changed(route: Route, start: int, after: int, shares: Callable[[Op], bool] = may_share, *, back: bool) -> bool:
    """Whether a value, or one that may share its memory, is changed in place behind operation ``after``.

    ``back``: the values that it was made from count as well, not only those made from it.
    """
    same = _sharing(route, start, shares, back=back)
    return any(written(op) & same for op in route.ops[after + 1 :])


def changed_by_layout(route: Route, start: int, shares: Callable[[Op], bool] = may_share) -> bool:
    """Whether a change in place reaches a value or not by how it lies in memory: ``flatten`` is a view or a copy."""
    certain = _sharing(route, start, lambda op: shares(op) and short(op) not in _VIEW_OR_COPY, back=False)
    maybe = _sharing(route, start, shares, back=False) - certain
    return any(written(op) & maybe for op in route.ops[start + 1 :])


def _sharing(route: Route, start: int, shares: Callable[[Op], bool], *, back: bool) -> set[int]:
    same, pending = {start}, [start]
    while pending:
        here = pending.pop()
        near = [u.index for u in route.users(here) if shares(u)]
        if back and shares(route.ops[here]):
            near += route.ops[here].inputs
        pending += [n for n in dict.fromkeys(near) if n not in same]
        same.update(near)
    return same
