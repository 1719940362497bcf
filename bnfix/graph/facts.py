"""Model and calls → :class:`~bnfix.types.Facts`: gathered once, complete, with nothing dropped in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfix.errors import TraceError
from bnfix.graph.frozen import STATE, name_frozen_norms
from bnfix.graph.owners import Owners, Slot, find_owners, hooks_of
from bnfix.graph.routes import Run, Source
from bnfix.types import Facts, NormFact, Op, Route, TensorFact

_SOMETIMES = (
    "some of the recorded runs don't reach it: the forward depends on its data there, and may call the layer before it "
    "without it"
)


@dataclass(frozen=True)
class Binding:
    """From the keys and paths of facts back to the objects of the model they were gathered from.

    ``calls`` are those that the routes belong to, ``runs`` how each route was recorded, where the source is
    ``observed``.
    """

    owners: Owners
    keys: dict[int, int]
    tensors: dict[int, Tensor]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    calls: tuple[Any, ...] = ()
    runs: tuple[Run, ...] = ()

    def slots(self, key: int) -> list[Slot]:
        """Every place that holds the tensor ``key``."""
        return self.owners.tensor_slots[id(self.tensors[key])]


def gather(
    model: nn.Module,
    calls: Sequence[Any],
    *,
    more: Callable[[], Sequence[Any]] | None = None,
    like: Facts | None = None,
) -> Facts:
    """Everything the planner needs to know of ``model``, on each of ``calls``.

    Only private copies are run and traced; ``model`` is not touched. Each runs once before it is traced: to
    see whose output something keeps beyond the forward, and because many fill caches in their first one.
    What ``torch.export`` refuses is recorded from runs instead, on all calls. Without any call it is traced
    symbolically: nothing is known of shapes then.

    Args:
        more: asked for further calls where facts come from runs: those hold for the way that was taken.
        like: facts of a model that ``model`` was made from, on the same calls; gathered in the same way, and with the
            same decisions on data.

    Raises:
        PassError: the forward fails on a call.
        TraceError: it can't be copied or traced.
    """
    owners = find_owners(model)
    keys = {tensor_id: i for i, tensor_id in enumerate(owners.tensors)}
    tensors = {keys[i]: t for i, t in owners.tensors.items()}
    norms = _norm_modules(owners)
    roles = {path: _roles(m, keys) for m in norms for path in owners.paths(m)}
    source = Source(model, owners, keys, list(calls))
    runs: tuple[Run, ...] = ()
    notes: tuple[str, ...] = ()
    if not calls:
        found = source.symbolic()
    elif like is not None and like.source == "observed":
        found, runs = source.observed_again(like.binding.runs), like.binding.runs
    else:
        try:
            found = source.exported()
        except TraceError as refused:
            if like is not None:  # what it was made from could be exported
                raise
            source.calls += more() if more is not None else ()
            found, runs, notes = source.observed(refused)
    routes = [name_frozen_norms(route, roles, tensors.__getitem__) for route in found]
    taken = [r for r, run in enumerate(runs) if run.turn is None]
    facts_of_norms, modules = _norm_facts(owners, norms, keys, routes, taken)
    return Facts(
        source="observed" if runs else "exported" if calls else "symbolic",
        routes=tuple(routes),
        tensors={
            keys[i]: TensorFact(keys[i], owners.paths(t), tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for i, t in owners.tensors.items()
        },
        norms=facts_of_norms,
        hooks={p: h for m in owners.modules.values() if (h := hooks_of(m)) for p in owners.paths(m)},
        held=frozenset(source.held),
        blockers=tuple(dict.fromkeys([*_global_hooks(), *source.blockers])),
        written=tuple(dict.fromkeys(source.written)),
        notes=notes,
        binding=Binding(owners, keys, tensors, modules, tuple(source.calls), runs),
    )


def _global_hooks() -> tuple[str, ...]:
    module = torch.nn.modules.module
    hooks = [*module._global_forward_hooks.values(), *module._global_forward_pre_hooks.values()]
    return tuple(
        f"a global module hook ({getattr(h, '__qualname__', type(h).__name__)}) could read or change any layer's output"
        for h in hooks
    )


# ---------------------------------------------------------------------------------------- norms


def _norm_modules(owners: Owners) -> list[nn.Module]:
    """Modules that own running statistics, or are of a class that would (statistics switched off)."""
    return [m for m in owners.modules.values() if _is_norm(m)]


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm) and module.running_mean is None:
        return False
    if isinstance(module, _NormBase):
        return True
    mean, var = (_own(module, name) for name in ("running_mean", "running_var"))
    return isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.numel() == var.numel()


def _own(module: nn.Module, name: str) -> Any:
    """An attribute that the module holds itself, not one that a wrapper or a property looks up elsewhere."""
    for table in (module._buffers, module._parameters, vars(module)):
        if name in table:
            return table[name]
    return None


def _roles(module: nn.Module, keys: dict[int, int]) -> dict[str, int]:
    found = {}
    for role in STATE:
        tensor = _own(module, role)
        if isinstance(tensor, Tensor) and id(tensor) in keys:
            found[role] = keys[id(tensor)]
    return found


def _norm_facts(
    owners: Owners,
    norms: Iterable[nn.Module],
    keys: dict[int, int],
    routes: Sequence[Route],
    taken: Sequence[int] = (),
) -> tuple[tuple[NormFact, ...], dict[str, nn.Module]]:
    claimed: dict[int, list[tuple[int, int]]] = {}
    loose: dict[str, list[tuple[int, int]]] = {}
    known = list(norms)
    fed = [_fed(route) for route in routes]
    by_path = {p: m for m in known for p in owners.paths(m)}
    by_mean: dict[int, list[nn.Module]] = {}
    for module in known:
        mean = _roles(module, keys).get("running_mean")
        if mean is not None:
            by_mean.setdefault(mean, []).append(module)
    for r, route in enumerate(routes):
        for op in route.ops:
            if op.kind != "norm":
                continue
            owner = _owner(op, by_path, by_mean)
            if owner is not None:
                claimed.setdefault(id(owner), []).append((r, op.index))
            elif _needs_name(op) and op.index in fed[r]:
                loose.setdefault(_loose_path(op, owners, keys), []).append((r, op.index))
    facts = [_norm_fact(m, owners, keys, routes, tuple(claimed.get(id(m), ())), taken) for m in known]
    for path, calls in loose.items():
        op = routes[calls[0][0]].ops[calls[0][1]]
        facts.append(
            NormFact(path, (path,), "F.batch_norm", dict(op.tensors), tuple(calls), module=False, summary=_summary(op))
        )
    facts.sort(key=lambda n: min(n.calls, default=(len(routes), 0)))
    return tuple(facts), by_path


def _owner(op: Op, by_path: dict[str, nn.Module], by_mean: dict[int, list[nn.Module]]) -> nn.Module | None:
    innermost = by_path.get(op.site.path) if op.stack else None
    mean = op.tensors.get("running_mean")
    owners = by_mean.get(mean, []) if mean is not None else []
    if innermost is not None and (innermost in owners or not owners):
        return innermost
    return owners[0] if owners else None


def _fed(route: Route) -> set[int]:
    """The operations that an input of the model reaches; the others compute on weights alone (standardised layers)."""
    reached: set[int] = set()
    for op in route.ops:
        if op.kind == "input" or any(i in reached for i in op.inputs):
            reached.add(op.index)
    return reached


def _needs_name(op: Op) -> bool:
    """An instance norm without statistics is no norm of ours: it depends on its own input alone."""
    return not (op.target.startswith("aten.instance_norm") and "running_mean" not in op.tensors)


def _loose_path(op: Op, owners: Owners, keys: dict[int, int]) -> str:
    mean = op.tensors.get("running_mean")
    names = (
        next((owners.paths(owners.tensors[i]) for i, k in keys.items() if k == mean), ()) if mean is not None else ()
    )
    return names[0] if names else f"{op.site.path or '(root)'}: F.batch_norm"


def _norm_fact(
    module: nn.Module,
    owners: Owners,
    keys: dict[int, int],
    routes: Sequence[Route],
    calls: tuple[tuple[int, int], ...],
    taken: Sequence[int],
) -> NormFact:
    paths = owners.paths(module)
    after: tuple[str, ...] = ()
    extra = ""
    whole = True
    registered = bool({n for n, _ in owners.root.named_modules(remove_duplicate=False)} & set(paths))
    if not calls and any(c.partition("@")[0] in paths for route in routes for op in route.ops for c in op.stack):
        extra = "what its forward computes is not recognised as a normalization with its statistics"
    for r, index in calls:
        op = routes[r].ops[index]
        if op.stack and op.site.path in paths:
            found, extra = _rest_of_forward(routes[r], op)
            if after and found != after:
                extra = "its forward takes different ways in different calls"
            after = found
        elif registered or not (isinstance(module, _NormBase) and _plain_forward(module)):
            whole = False  # called with its statistics, but not by itself: F.batch_norm(x, bn.running_mean, …)
        if extra:
            whole = whole and isinstance(module, _NormBase)  # else its forward is the user's, and calls F.batch_norm
            break
    first = routes[calls[0][0]].ops[calls[0][1]] if calls else None
    if calls and not extra and set(taken) - {r for r, _ in calls}:
        extra = _SOMETIMES
    return NormFact(
        path=paths[0],
        paths=paths,
        cls=type(module).__name__,
        tensors=_roles(module, keys),
        calls=calls,
        training=module.training,
        module=whole,
        summary=_summary(first, module),
        after=after,
        extra=extra,
    )


def _plain_forward(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.nn.modules.")


def _rest_of_forward(route: Route, norm: Op) -> tuple[tuple[str, ...], str]:
    """What else ran in the call of the module around ``norm``: a chain of its submodules, or a reason against it."""
    call, depth = norm.stack[-1], len(norm.stack) - 1
    inside = [op for op in route.ops if len(op.stack) > depth and op.stack[depth] == call and op.index != norm.index]
    after: list[str] = []
    value, last = norm.index, norm.index
    within: set[int] = {norm.index}
    for op in inside:
        if len(op.stack) == depth + 1 or op.index < norm.index:
            return (), f"its forward also does {op.target}"
        child = op.stack[depth + 1].partition("@")[0].removeprefix(f"{norm.site.path}.")
        if not after or after[-1] != child:
            after.append(child)
            value, within = last, {last}
        if any(i != value and i not in within and route.ops[i].kind != "constant" for i in op.inputs):
            return (), "its forward runs its submodules side by side"
        within.add(op.index)
        last = op.index
    if len(set(after)) != len(after) or any("." in name for name in after):
        return (), f"its forward runs {', '.join(after)} in an order that can't be kept without it"
    mine = {op.index for op in inside}
    escaping = {i for op in route.ops if op.index not in mine for i in op.inputs if i in mine or i == norm.index}
    if after and escaping - {last}:
        return (), "its forward gives more than the output of its last submodule"
    return tuple(after), ""


def _summary(op: Op | None, module: nn.Module | None = None) -> str:
    name = "F.batch_norm" if module is None else type(module).__name__
    eps = op.attrs.get("eps") if op is not None else getattr(module, "eps", None)
    channels = getattr(module, "num_features", None)
    if channels is None:
        mean = getattr(module, "running_mean", None)
        channels = mean.numel() if isinstance(mean, Tensor) else op.shape[1] if op is not None and op.shape else "?"
    return f"{name}({channels}, eps={eps:g})" if isinstance(eps, float) else f"{name}({channels})"
