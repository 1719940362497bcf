"""Facts of a model in training mode: what runs only there. Dropout, auxiliary heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bnfix.errors import BnfixError, TraceError
from bnfix.graph.copies import copy_model
from bnfix.graph.facts import _is_norm, _norm_facts, _norm_modules, _roles
from bnfix.graph.frozen import name_frozen_norms
from bnfix.graph.owners import Owners, find_owners
from bnfix.graph.routes import _KeyOf
from bnfix.graph.sources import exported, observed
from bnfix.graph.sources.exported import quiet_export
from bnfix.types import Facts, Route, TensorFact


def training_facts(model: nn.Module, calls: Sequence[Any]) -> tuple[Facts | None, str]:
    """What ``model`` does in training mode on ``calls``, recorded from one run of a private copy each.

    Norms are evaluated all the same: a batch of one is enough then, and where they stand is all that is asked. Where
    the forward fails in training mode (detectors want targets there), dropout alone is switched on.

    Returns:
        The facts, and why they are absent or of what they know only a part: dropout modules in training mode, all
        else as it is in evaluation. Empty where they are whole.
    """
    try:
        return _facts(model, calls, everything=True), ""
    except BnfixError as error:
        why = f"the model can't be run in training mode: {error.message}"
    try:
        return _facts(model, calls, everything=False), why
    except BnfixError:
        return None, why


def _facts(model: nn.Module, calls: Sequence[Any], *, everything: bool) -> Facts:
    owners = find_owners(model)
    keys = {tensor_id: i for i, tensor_id in enumerate(owners.tensors)}
    tensors = {keys[i]: t for i, t in owners.tensors.items()}
    norms = _norm_modules(owners)
    roles = {path: _roles(m, keys) for m in norms for path in owners.paths(m)}
    routes: list[Route] = []
    for call in calls:
        try:
            copy, key_of = _copied(model, owners, keys, everything)
            with quiet_export():
                route, _ = observed.trace(copy, call, key_of)
        except TraceError as refused:  # nobody can watch torch.cond
            copy, key_of = _copied(model, owners, keys, everything)
            try:
                route = exported.trace(copy, call, key_of)
            except TraceError:
                raise refused from None
        routes.append(name_frozen_norms(route, roles, tensors.__getitem__))
    found, _ = _norm_facts(owners, norms, keys, routes, range(len(routes)))
    return Facts(
        source="observed",
        routes=tuple(routes),
        tensors={
            keys[i]: TensorFact(keys[i], owners.paths(t), tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for i, t in owners.tensors.items()
        },
        norms=found,
    )


def _copied(
    model: nn.Module, owners: Owners, keys: dict[int, int], everything: bool
) -> tuple[nn.Module, Callable[[Tensor], int | None]]:
    copy, memo = copy_model(model)
    _set_modes(copy, everything)
    return copy, _KeyOf(owners, keys, memo)


def _set_modes(copy: nn.Module, everything: bool) -> None:
    copy.train(everything)
    for module in find_owners(copy).modules.values():
        if _is_norm(module):
            module.training = False  # its own flag: the activation inside it is not concerned
        elif isinstance(module, _DropoutNd):
            module.training = True
