"""Shared norms taken apart in a module tree: by name, by buffer, by call. Steps are plain data: files hold them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bnfix.graph.norm_layers import norm_modules
from bnfix.graph.owners import Owners, Slot, find_owners
from bnfix.graph.per_call import BeginForward, EndForward, FunctionalNorm, NormPerCall, StatisticsOfCall
from bnfix.graph.surgery import Surgeon, all_or_nothing

STATE = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")


def own_slots(owners: Owners, module: nn.Module) -> list[Slot]:
    """The places of a module, each once: one that is inside a module with two names is one place with two names."""
    return list({(id(s.container), s.key): s for s in owners.module_slots[id(module)]}.values())


def take_apart(model: nn.Module, steps: Sequence[Mapping[str, Any]]) -> None:
    """Take norms of ``model`` apart as ``steps`` say: in place, all or nothing.

    A step is one of::

        {"how": "names", "sites": [paths]}                      one module under these names: one module each
        {"how": "buffers", "sites": [paths]}                    modules with the same buffers: buffers of their own
        {"how": "calls", "site": path, "calls": k}              a module called k times in a forward: k modules
        {"how": "function", "site": path, "mean": attribute, "var": attribute, "weight": attribute or None,
         "bias": attribute or None, "calls": k}                 buffers handed to F.batch_norm k times in a forward

    and with ``"share_affine": True`` all norms in place of one have the same weight and bias, else copies of them.

    Raises:
        KeyError: ``model`` has nothing of such a name.
        ValueError: what is there is no norm; numbers that make no sense.
        TraceError: a place that can't be written.
    """
    per_call: list[NormPerCall] = []
    with all_or_nothing(Surgeon()) as surgeon, _withdrawn_on_failure() as handles:
        owners = find_owners(model)
        named = False
        for step in steps:
            if named:  # names and buffers are other ones since then; what is called by its number stays where it was
                owners, named = find_owners(model), False
            share_affine = bool(step.get("share_affine"))
            named = step["how"] in ("names", "buffers")
            if step["how"] == "names":
                _by_name(owners, surgeon, step["sites"], share_affine)
            elif step["how"] == "buffers":
                _by_buffer(owners, surgeon, step["sites"], share_affine)
            elif step["how"] == "calls":
                per_call.append(_by_call(owners, surgeon, step["site"], _count(step["calls"]), share_affine))
            elif step["how"] == "function":
                per_call.append(_by_function(owners, surgeon, step, _count(step["calls"]), share_affine))
            else:
                raise ValueError(f"there is no way {step['how']!r} to take norms apart")
        if per_call:
            handles += _follow_forwards(model, per_call)


def clone_norm(owners: Owners, norm: nn.Module, *, share_affine: bool) -> nn.Module:
    """Another norm like this one: the same class, settings, hooks and numbers. Its submodules stay the same objects."""
    memo: dict[int, Any] = {i: m for i, m in owners.modules.items() if m is not norm}
    mine = {id(t) for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None}
    memo.update({i: t for i, t in owners.tensors.items() if i not in mine})
    if share_affine:
        memo.update({id(p): p for p in norm._parameters.values() if p is not None})
    return copy.deepcopy(norm, memo)


def _module(owners: Owners, path: str) -> nn.Module:
    found = owners.module_at(path)
    if found is None:
        raise KeyError(path)
    return found


def _norm(owners: Owners, path: str) -> nn.Module:
    found = _module(owners, path)
    if not any(found is norm for norm in norm_modules(owners)):
        raise ValueError(f"{path} is a {type(found).__name__}, no norm")
    return found


def _by_name(owners: Owners, surgeon: Surgeon, sites: Sequence[str], share_affine: bool) -> None:
    norm = _norm(owners, sites[0])
    slots = {s.path: s for s in owners.module_slots[id(norm)]}
    for site in sites[1:]:
        if site not in slots:
            raise KeyError(site)
        surgeon.put(slots[site], clone_norm(owners, norm, share_affine=share_affine))


def _by_buffer(owners: Owners, surgeon: Surgeon, sites: Sequence[str], share_affine: bool) -> None:
    first, *others = [_norm(owners, site) for site in sites]
    shared = {id(t) for t in (*first._buffers.values(), *first._parameters.values()) if t is not None}
    for site, norm in zip(sites[1:], others, strict=True):
        for name in (*STATE, *(() if share_affine else AFFINE)):
            tensor = norm._buffers.get(name, norm._parameters.get(name))
            if tensor is not None and id(tensor) in shared:
                surgeon.put(Slot(norm, name, f"{site}.{name}"), _duplicate(tensor))


def _by_call(owners: Owners, surgeon: Surgeon, site: str, calls: int, share_affine: bool) -> NormPerCall:
    norm = _norm(owners, site)
    clones = [clone_norm(owners, norm, share_affine=share_affine) for _ in range(calls - 1)]
    made = NormPerCall([norm, *clones], site)
    for slot in own_slots(owners, norm):
        if not _holds(slot, norm):
            raise ValueError(f"{site} is taken apart twice")
        surgeon.put(slot, made)
    return made


def _holds(slot: Slot, norm: nn.Module) -> bool:
    holder = slot.container
    if isinstance(holder, nn.Module) and slot.key in holder._modules:
        return holder._modules[slot.key] is norm
    if isinstance(holder, (list, tuple, Mapping)):
        return holder[slot.key] is norm
    return getattr(holder, str(slot.key), None) is norm


def _by_function(
    owners: Owners, surgeon: Surgeon, step: Mapping[str, Any], calls: int, share_affine: bool
) -> NormPerCall:
    site, names = step["site"], [step["mean"], step["var"]]
    holder = _module(owners, site)
    mean, var = (holder._buffers.get(name) for name in names)
    weight, bias = [None if share_affine or not step[role] else holder._parameters.get(step[role]) for role in AFFINE]
    if mean is None or var is None:
        raise KeyError(f"{site}.{names[0]}".lstrip("."))
    kept = not ({*names} & holder._non_persistent_buffers_set)
    dot = f"{site}." if site else ""
    made = NormPerCall(
        [
            FunctionalNorm(mean, var, weight, bias, persistent=kept)
            if i == 0
            else FunctionalNorm(*map(_duplicate, (mean, var, weight, bias)), persistent=kept)
            for i in range(calls)
        ],
        f"{dot}{names[0]}",
    )
    for one in made:
        one.training = holder.training
    made.training = holder.training
    stand_in = StatisticsOfCall(made)
    for name in names:
        surgeon.shadow(holder, name, stand_in)
    surgeon.add_module(holder, per_call_name(names[0]), made)
    return made


def per_call_name(mean: str) -> str:
    """The name of the norms for each call of a function, beside the buffer ``mean`` that they are instead of."""
    return f"{mean}_per_call"


def _duplicate(tensor: Any) -> Any:
    """The same numbers, device and kind (parameter or not) in memory of their own; None for None."""
    if tensor is None:
        return None
    with torch.no_grad():
        copied = tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return copied
    parameter = torch.Tensor._make_subclass(type(tensor), copied, tensor.requires_grad)
    vars(parameter).update(vars(tensor))
    return parameter


def _count(calls: Any) -> int:
    if type(calls) is not int or not 1 < calls <= 4096:
        raise ValueError(f"{calls!r} is no number of calls")
    return calls


def _follow_forwards(model: nn.Module, norms: Sequence[NormPerCall]) -> list[Any]:
    paths = {id(m): path for path, m in model.named_modules()}
    registered = tuple(paths[id(n)] for n in norms if id(n) in paths)
    around = (registered, tuple(n for n in norms if id(n) not in paths))
    begin = model.register_forward_pre_hook(BeginForward(*around), prepend=True)
    return [begin, model.register_forward_hook(EndForward(*around), always_call=True)]


@contextlib.contextmanager
def _withdrawn_on_failure() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
