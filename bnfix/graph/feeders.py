"""How large the weights in front of each norm are, channel by channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bnfix.types import Facts, NormFact, Op


def feeder_norms(facts: Facts) -> dict[str, Any]:
    """‖w‖ (C,) float64 of the one convolution or linear layer that feeds each norm, by the norm's path.

    Of each output channel the Euclidean norm of all its weights. Norms that something else feeds, or more than one
    layer, are left out.
    """
    found = {}
    for norm in facts.norms:
        feeders = [_feeder(facts, norm, call) for call in norm.calls]
        weights = {op.tensors["weight"] for op in feeders if op is not None and "weight" in op.tensors}
        if len(weights) == 1 and None not in feeders:
            op = next(op for op in feeders if op is not None)
            found[norm.path] = _channel_norms(op, facts.binding.tensors[op.tensors["weight"]])
    return found


def _feeder(facts: Facts, norm: NormFact, call: tuple[int, int]) -> Op | None:
    route, index = call
    ops = facts.routes[route].ops
    source = ops[index].reads.get("input")
    op = ops[source] if source is not None else None
    return op if op is not None and op.kind in ("conv", "conv_transpose", "linear") else None


def _channel_norms(op: Op, weight: Tensor) -> Any:
    wide = weight.detach().double().cpu()
    if op.kind == "conv_transpose":  # (in, out / groups, …): the channels of one group follow those of the one before
        groups = int(op.attrs.get("groups", 1))
        wide = wide.reshape(groups, wide.shape[0] // groups, wide.shape[1], -1).transpose(1, 2).flatten(0, 1)
    return wide.flatten(1).norm(dim=1).numpy()
