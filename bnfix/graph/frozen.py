"""Norms written out in arithmetic: FrozenBatchNorm2d of torchvision and timm, and everyone's own.

In the graph such a norm is reshape, add, rsqrt, mul; nothing says batch_norm. Where a module owns running
statistics and what ran inside it is exactly x·γ/√(var + eps) + β − μ·γ/√(var + eps), computed here from
its real buffers in float64, its operations are replaced by one operation of kind ``norm``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnfix.types import Op, Route

TensorOf = Callable[[int], Tensor]
STATE = ("weight", "bias", "running_mean", "running_var")
_ON_CONSTANTS = {
    "reshape",
    "view",
    "unsqueeze",
    "expand",
    "rsqrt",
    "sqrt",
    "pow",
    "neg",
    "reciprocal",
    "detach",
    "alias",
}
_CASTS = {"to", "_to_copy", "type_as", "contiguous", "clone"}
_MATCH = 1e-9  # relative, float64 against float64 in another order of operations: some 1e-15


def name_frozen_norms(route: Route, norms: Mapping[str, Mapping[str, int]], tensor_of: TensorOf) -> Route:
    """``route`` with each written-out norm as one operation.

    Args:
        route: as traced.
        norms: for each path of a module with running statistics, its tensors' keys by role.
        tensor_of: the real tensor of a key.
    """
    spans: dict[str, list[Op]] = {}
    for op in route.ops:
        if op.stack and op.stack[-1].partition("@")[0] in norms:
            spans.setdefault(op.stack[-1], []).append(op)
    replaced: dict[int, Op | None] = {}
    for call, span in spans.items():
        roles = norms[call.partition("@")[0]]
        if any(op.kind == "norm" for op in span) or "running_var" not in roles:
            continue
        found = _as_norm(route, span, roles, tensor_of)
        if found is not None:
            replaced.update(dict.fromkeys((op.index for op in span), None))
            replaced[span[-1].index] = found
    return _renumber(route, replaced) if replaced else route


def _as_norm(route: Route, span: list[Op], roles: Mapping[str, int], tensor_of: TensorOf) -> Op | None:
    inside = {op.index for op in span}
    outside = {i for op in span for i in op.inputs if i not in inside}
    last = span[-1]
    if len(outside) != 1 or last.shape is None or len(last.shape) < 2:
        return None
    if any(u.index not in inside for op in span[:-1] for u in route.users(op.index)):
        return None
    (source,) = outside
    values: dict[int, Any] = {source: (torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))}
    scalars = []
    for op in span:
        scalars += [float(v) for v in op.attrs.values() if type(v) in (int, float)]
        values[op.index] = _evaluate(op, values, tensor_of)
        if values[op.index] is None:
            return None
    affine = values[last.index]
    if not isinstance(affine, tuple):
        return None
    channels = last.shape[1]
    shape = (1, channels) + (1,) * (len(last.shape) - 2)
    try:
        scale, shift = (torch.broadcast_to(v, shape).reshape(-1) for v in affine)
    except RuntimeError:  # varies along more than the channels
        return None
    state = {role: tensor_of(key).detach().double().reshape(-1) for role, key in roles.items() if role in STATE}
    gamma, beta = state.get("weight", torch.ones(())), state.get("bias", torch.zeros(()))
    mean = state.get("running_mean", torch.zeros(()))
    for eps in (*scalars, 0.0):
        a = gamma / torch.sqrt(state["running_var"] + eps)
        b = beta - mean * a
        if _same(a, scale) and _same(b, shift):
            return replace(
                last,
                kind="norm",
                target=f"written out ({', '.join(dict.fromkeys(_base(o) for o in span))})",
                inputs=(source,),
                reads={"input": source},
                tensors={r: k for r, k in roles.items() if r in STATE},
                attrs={"training": False, "eps": eps},
            )
    return None


def _evaluate(op: Op, values: dict[int, Any], tensor_of: TensorOf) -> Any:
    """A constant in float64, or (scale, shift) of the norm's input; None for what is neither."""
    arguments: dict[str, Any] = {role: tensor_of(key).detach().double() for role, key in op.tensors.items()}
    arguments.update({role: values.get(i) for role, i in op.reads.items()})
    name = _base(op)
    affine = {role for role, v in arguments.items() if isinstance(v, tuple)}
    if any(v is None for v in arguments.values()):
        return None
    if name in _CASTS:
        return arguments.get("self")
    if not affine:
        if name in _ON_CONSTANTS or name in ("add", "sub", "mul", "div"):
            constants = {k: v for k, v in op.attrs.items() if k not in ("computed",)}
            return _overload(op)(**arguments, **constants)
        return None
    left, right = arguments.get("self"), arguments.get("other", op.attrs.get("other"))
    if op.attrs.get("alpha", 1) != 1 or left is None or right is None or len(affine) != 1:
        return None
    (x, c) = (left, right) if isinstance(left, tuple) else (right, left)
    if name == "mul":
        return (x[0] * c, x[1] * c)
    if name == "add":
        return (x[0], x[1] + c)
    if name == "sub":
        return (x[0], x[1] - c) if x is left else (-x[0], c - x[1])
    if name == "div" and x is left:
        return (x[0] / c, x[1] / c)
    return None


def _overload(op: Op) -> Any:
    _, name, overload = op.target.split(".")
    return getattr(getattr(torch.ops.aten, name), overload)


def _base(op: Op) -> str:
    parts = op.target.split(".")
    return (parts[1] if len(parts) == 3 else op.target).rstrip("_")


def _same(expected: Tensor, found: Tensor) -> bool:
    expected = expected.broadcast_to(found.shape) if expected.dim() == 0 else expected
    if expected.shape != found.shape:
        return False
    unit = torch.clamp(expected.abs().max(), min=1e-300)
    return bool(((expected - found).abs().max() <= _MATCH * unit).item())


def _renumber(route: Route, replaced: Mapping[int, Op | None]) -> Route:
    kept = [replaced.get(op.index, op) for op in route.ops]
    new_index = {op.index: i for i, op in enumerate(o for o in kept if o is not None)}
    ops = tuple(
        replace(
            op,
            index=new_index[op.index],
            inputs=tuple(new_index[i] for i in op.inputs),
            reads={r: new_index[i] for r, i in op.reads.items()},
        )
        for op in kept
        if op is not None
    )
    return Route(route.signature, ops)
