"""The optimizer of a model that is changed in place: it goes on with the new parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

Replaced = Sequence[tuple[nn.Parameter, "nn.Parameter | None", str]]


@contextlib.contextmanager
def kept_if_failed(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Whatever leaves this block early, Ctrl-C included, leaves the optimizer as it was."""
    if optimizer is None:
        yield
        return
    groups = [
        (g, list(g["params"]), list(g["param_names"]) if "param_names" in g else None) for g in _groups(optimizer)
    ]
    state = dict(optimizer.state)
    try:
        yield
    except BaseException:
        for group, params, names in groups:
            group["params"][:] = params
            if names is not None:
                group["param_names"][:] = names
        optimizer.state.clear()
        optimizer.state.update(state)
        raise


def bring_along(optimizer: torch.optim.Optimizer, replaced: Replaced) -> list[str]:
    """Put the new parameters where the old ones stood, in their groups; what was remembered of the old ones goes.

    Momentum and second moments of an old γ belong to another function, and the new γ' has another scale: state of
    replaced parameters starts anew, as it does for a fresh parameter. A parameter with nothing in its place leaves.

    Returns:
        What was done, for the user.
    """
    new = {id(old): (fresh, path) for old, fresh, path in replaced}
    changed = left = 0
    for group in _groups(optimizer):
        names = group.get("param_names")
        params, kept_names = [], []
        for i, parameter in enumerate(group["params"]):
            fresh, path = new.get(id(parameter), (parameter, names[i] if names else ""))
            if id(parameter) in new:
                changed, left = changed + (fresh is not None), left + (fresh is None)
            if fresh is not None:
                params.append(fresh)
                kept_names.append(path)
        group["params"][:] = params
        if names is not None:
            names[:] = kept_names
    flat = isinstance(optimizer, torch.optim.LBFGS)  # its state is of all parameters together
    forgotten = len(optimizer.state) if flat else 0
    if flat:
        optimizer.state.clear()
        vars(optimizer)["_numel_cache"] = None
    for old, _, _ in replaced:
        forgotten += optimizer.state.pop(old, None) is not None
    notes = [f"optimizer: {changed} parameter{'' if changed == 1 else 's'} replaced in its groups"]
    notes[0] += f", {left} taken out" if left else ""
    notes[0] += f"; what it remembered of {'all' if flat else 'them'} is gone, and starts anew" if forgotten else ""
    missing = len(replaced) - changed - left
    return [*notes, *([f"optimizer: it does not hold {missing} of the replaced parameters"] if missing else [])]


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return optimizer.param_groups
