"""What rules that look at a model share: how sites are named, what values tell, how to walk a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from bnfix.types import Evidence, Facts, Fix, NormFact, NormState, Op, Route, Safety, Skipped

if TYPE_CHECKING:
    from bnfix.types.evidence import Array

ACTIVATIONS = frozenset({
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "log_sigmoid", "threshold", "hardshrink", "softshrink",
})  # fmt: skip
POOLING = frozenset({
    *(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for d in (1, 2, 3)),
    *(f"max_pool{d}d_with_indices" for d in (1, 2, 3)), "mean", "amax", "getitem",
})  # fmt: skip
SHAPING = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose",
    "movedim", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as", "expand", "t",
})  # fmt: skip
ELEMENTWISE = ACTIVATIONS | {"abs", "neg", "exp", "log", "sqrt", "square", "pow", "clamp", "clamp_min", "clamp_max",
                             "mul", "add", "sub", "div"}  # fmt: skip

_DRAWN = ((1.0, 0.02, 0.0), (0.1, 0.1, 0.1))
"""Mean and deviation of scales, deviation of shifts, as some draw them at first: DCGAN, pix2pix, CycleGAN; RepVGG."""
_INIT_BIAS = 0.01
"""One small constant in all channels is no sign of training either: fastai begins with .001."""
_Z = 5.0
"""So many standard errors from what was to be drawn, and it was not."""


# ------------------------------------------------------------------------------------------ words


def site(path: str) -> str:
    """A module path for a reader; the model itself has none."""
    return path or "(root)"


def sites(norms: Iterable[NormState | NormFact]) -> tuple[str, ...]:
    """The paths of ``norms``."""
    return tuple(site(n.path) for n in norms)


def listed(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 4 more``."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def some(names: Sequence[str]) -> str:
    """What a finding is about: ``layer1.bn``, or ``53 norms (bn1, layer1.0.bn1, layer1.0.bn2 and 50 more)``."""
    return names[0] if len(names) == 1 else f"{len(names)} norms ({listed(names)})"


def count(number: int, what: str, several: str = "") -> str:
    """``1 norm``, ``2 norms``."""
    return f"{number} {what}" if number == 1 else f"{number} {several or what + 's'}"


# ----------------------------------------------------------------------------------------- values


def readable(evidence: Evidence) -> list[NormState]:
    """The norms whose running statistics have values."""
    return [n for n in evidence.norms or () if n.mean is not None and n.var is not None and n.channels]


def unreadable(code: str, evidence: Evidence) -> Iterator[Skipped]:
    """What is to be said of norms whose statistics have no values yet."""
    blank = [n for n in evidence.norms or () if n.has_stats and (n.mean is None or n.var is None)]
    if blank:
        reason = "their statistics have no values: not initialised yet, or on the meta device"
        yield Skipped(code, reason, "a model with values", sites(blank))


def needs_module(code: str, evidence: Evidence, what: str) -> Iterator[Skipped]:
    """What a rule about attributes says where there are tensors alone."""
    if evidence.norms and not any(n.module for n in evidence.norms):
        yield Skipped(code, f"a state_dict does not hold {what}", "the model itself (on the command line: --arch)")


def is_initial(norm: NormState) -> bool:
    """Whether all statistics are exactly those that a norm begins with: mean 0, variance 1."""
    assert norm.mean is not None
    assert norm.var is not None
    return bool((norm.mean == 0).all() and (norm.var == 1).all())


def is_learned(norm: NormState) -> bool:
    """Whether scale and shift say that the layer was trained: they are none that a layer is initialised with.

    Initialised are constants 0 and 1 (zero-init of a residual's last scale), a small constant shift, and, as long as no
    batch was counted, what some models draw from a normal distribution.
    """
    bias, weight = norm.bias, norm.weight
    if not norm.tracked and any(_is_drawn(norm, *how) for how in _DRAWN):
        return False
    if bias is not None and (bias.min() != bias.max() or abs(bias[0]) > _INIT_BIAS):
        return True
    if weight is None:
        return False
    return bool(weight.min() != weight.max() or weight[0] not in (0.0, 1.0))


def _is_drawn(norm: NormState, mean: float, std: float, shifts: float) -> bool:
    if norm.weight is None or norm.bias is None or norm.channels < 2:
        return False
    return _is_normal(norm.weight, mean, std) and _is_normal(norm.bias, 0.0, shifts)


def _is_normal(values: Array, mean: float, std: float) -> bool:
    """Whether mean and deviation of ``values`` are those of draws from N(mean, std), to :data:`_Z` standard errors."""
    if std == 0:
        return bool((values == mean).all())
    n = len(values)
    centred = abs(values.mean() - mean) <= _Z * std / n**0.5
    return bool(centred and abs(values.std() / std - 1) <= _Z / (2 * n) ** 0.5 and values.std() > 0)


def recalibration(norms: Sequence[NormState], title: str = "measure them on training data") -> Fix:
    """The fix for statistics that are wrong; ``recalibrate`` leaves instance norms alone."""
    paths = sites(n for n in norms if not n.instance)
    if not paths:
        return Fix("code", "reset_running_stats(), then some batches in training mode", sites(norms))
    return Fix("recalibrate", title, paths, safety=Safety.NEEDS_DATA)


# ------------------------------------------------------------------------------------------ graph


def base(op: Op) -> str:
    """``relu`` of ``aten.relu_.default``."""
    parts = op.target.split(".")
    name = parts[1] if len(parts) > 1 and parts[0] == "aten" else parts[0]
    return name if name.startswith("_") else name.rstrip("_")


def calls_of(facts: Facts, norm: NormFact) -> int:
    """How often ``norm`` is called in one forward, at most. Of the branches of a ``torch.cond`` one is taken."""
    most = 0
    for number, route in enumerate(facts.routes):
        ops = [route.ops[i] for r, i in norm.calls if r == number]
        branches = [op for op in ops if op.within]
        most = max(most, len(ops) - len(branches) + bool(branches))
    return most


def is_used(facts: Facts, norm: NormFact) -> bool:
    """Whether anything reads a tensor of ``norm``, or calls it in a way that is not understood."""
    keys = set(norm.tensors.values())
    return bool(norm.calls or norm.extra) or any(
        keys.intersection(op.tensors.values()) for route in facts.routes for op in route.ops if op.kind != "output"
    )


def before(route: Route, op: Op, kinds: frozenset[str]) -> Op | None:
    """The first operation in front of ``op`` that is none of ``kinds``, as long as one value alone leads there.

    ``x * sigmoid(x)`` is one value: one of its inputs is made of the other.
    """
    index = op.reads.get("input")
    while index is not None:
        found = route.ops[index]
        if found.kind != "other" or base(found) not in kinds:
            return found
        index = _one_source(route, found, kinds)
    return None


def _one_source(route: Route, op: Op, kinds: frozenset[str]) -> int | None:
    made = [i for i in dict.fromkeys(op.inputs) if route.ops[i].kind != "constant"]
    if len(made) < 2:
        return made[0] if made else None
    earliest = min(made)
    return earliest if all(_leads_to(route, i, earliest, kinds) for i in made) else None


def _leads_to(route: Route, index: int, source: int, kinds: frozenset[str]) -> bool:
    pending = [index]
    while pending:
        at = pending.pop()
        if at == source:
            continue
        op = route.ops[at]
        if op.kind == "constant":
            continue
        if at < source or op.kind != "other" or base(op) not in kinds or not op.inputs:
            return False
        pending += op.inputs
    return True
