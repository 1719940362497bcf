"""Layers whose weight is computed in their forward become plain ones that hold the weight as computed.

weight_norm, spectral_norm and any other parametrization, pruning masks, standardised convolutions, somebody's own: a
layer whose forward is nothing but (compute the weight from own tensors; one convolution or linear call). In evaluation
mode that weight is a constant of the model, and a constant can take a norm up.

Which value? The one that the forward computes, bit for bit, in its own dtype and on its own device: recorded on its
way into the convolution. Then baking alone changes no output at all, which can be checked by equality, and a fold
behind it is one rounding away from the model as it is, like every fold. The value computed in float64 would be nearer
to what the author meant by a few units in the last place. But it would be another model than the one that was asked
about: its distance from today's outputs would be the rounding of today's weight, plus that of the fold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from bnfix.errors import TraceError, one_line
from bnfix.graph.copies import Memo, copy_model
from bnfix.graph.owners import Owners, find_owners
from bnfix.graph.plain_layers import build, settings_of
from bnfix.graph.recorded_weights import Recorded, Refused, Scratch, differs, record
from bnfix.graph.surgery import Surgeon, all_or_nothing
from bnfix.types import Edit, Facts, Op, Route

_LAYERS = ("conv", "conv_transpose", "linear")
_STATE = ("weight", "bias")
_OWN_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Pre-hooks that do nothing but compute the weight anew."""

_PLAIN_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_KEPT = (int, float, bool, str)


@dataclass(frozen=True)
class BakedLayer:
    """One layer that computed its weight: where it was, what stands there now, and how that is rebuilt."""

    path: str
    paths: tuple[str, ...]
    before: str
    after: str
    settings: Mapping[str, Any]
    module: nn.Module = field(repr=False, compare=False)

    @property
    def edit(self) -> Edit:
        """For a reader."""
        return Edit(action="bake", site=self.path, before=self.before, after=self.after)

    @property
    def entry(self) -> dict[str, Any]:
        """For the recipe that a saved state_dict carries: what ``rebuild`` reads."""
        return {"module": list(self.paths), "settings": dict(self.settings)}


@dataclass(frozen=True)
class Baked:
    """A private copy of a model with plain layers, and for each layer that still computes its weight the reason why.

    ``refusals`` leads from the call site of such a layer (without the number of the call) to the reason.
    """

    model: nn.Module = field(repr=False)
    layers: tuple[BakedLayer, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    memo: Memo = field(default_factory=dict, repr=False, compare=False)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What was baked, for a reader."""
        return tuple(layer.edit for layer in self.layers)


def bake(model: nn.Module, facts: Facts, calls: Sequence[Any], only: Collection[str] | None = None) -> Baked:
    """A copy of ``model`` in which layers that compute their weight hold it instead; ``model`` is not touched.

    The weight is the one that the layer hands on in every call of it, on each of ``calls`` run twice; a copy of the
    layer, run by itself on random inputs, has to hand on the same, and the plain layer to give the same output; so has
    the whole model on ``calls``.

    Args:
        facts: of ``model``, on ``calls``.
        only: paths of the layers to bake, or of the call sites in them; None: every one that can be.

    Raises:
        TraceError: the model can't be copied.
        PassError: its forward fails on a call.
    """
    owners: Owners = facts.binding.owners
    refusals: dict[str, str] = {}
    chosen: dict[int, nn.Module] = {}
    sites: list[tuple[str, int]] = []
    for route, op in _candidates(facts):
        reason, module = _module(owners, route, op)
        if module is None:
            refusals[op.site.path] = reason
        elif only is None or {*owners.paths(module), op.site.path} & set(only):
            chosen[id(module)] = module
            sites.append((op.site.path, id(module)))
    seen = record(model, list(chosen.values()), calls) if chosen else {}
    tried, reasons = _attempt(model, facts, chosen, seen)
    if tried.layers and differs(model, tried.model, calls):
        # One of them has to be there. Which one shows by itself; the others are tried together once more.
        for key, module in list(chosen.items()):
            alone, _ = _attempt(model, facts, {key: module}, seen)
            why = differs(model, alone.model, calls) if alone.layers else ""
            if why:
                reasons[key] = why
        tried, _ = _attempt(model, facts, {k: m for k, m in chosen.items() if not reasons[k]}, seen)
        together = differs(model, tried.model, calls)
        if together:
            tried, _ = _attempt(model, facts, {}, seen)
            reasons = {key: why or together for key, why in reasons.items()}
    refusals.update({site: reasons[key] for site, key in sites if reasons[key]})
    return Baked(tried.model, tried.layers, refusals, tried.memo)


def _attempt(
    model: nn.Module, facts: Facts, chosen: Mapping[int, nn.Module], seen: Mapping[int, Recorded]
) -> tuple[Baked, dict[int, str]]:
    """A copy with those of ``chosen`` baked that can be, and for each a reason, empty where it is."""
    copy, memo = copy_model(model)
    layers: list[BakedLayer] = []
    reasons = {key: _baked_or_reason(facts, module, seen.get(key), memo, layers) for key, module in chosen.items()}
    return Baked(copy, tuple(layers), memo=memo), reasons


def transfer(model: nn.Module, baked: Baked, surgeon: Surgeon) -> Memo:
    """Put the baked layers into ``model`` itself, the original, by its ``surgeon``; it can take that back.

    Returns:
        The memo ``id(object of the baked copy) → object of the original`` that a fold planned on the copy needs to
        be carried out on the original.
    """
    owners = find_owners(model)
    with all_or_nothing(surgeon):
        for layer in baked.layers:
            before = owners.module_at(layer.path)
            if before is None:
                raise TraceError(f"the model has no module {layer.path} any more")
            for slot in owners.module_slots[id(before)]:
                surgeon.put(slot, layer.module)
    back: Memo = {}
    slots = [s for group in (owners.module_slots, owners.tensor_slots) for found in group.values() for s in found]
    for original in (*owners.modules.values(), *owners.tensors.values(), *(s.container for s in slots)):
        twin = baked.memo.get(id(original))
        if twin is not None:
            back[id(twin)] = original
    for layer in baked.layers:  # one and the same object in both
        back.update((id(m), m) for m in (layer.module, *layer.module.parameters()))
    return back


# --------------------------------------------------------------------------- which layers, and why not


def _candidates(facts: Facts) -> Iterator[tuple[Route, Op]]:
    for route in facts.routes:
        for op in route.ops:
            if op.kind in _LAYERS and set(op.attrs.get("computed", ())) & set(_STATE):
                yield route, op


def _module(owners: Owners, route: Route, op: Op) -> tuple[str, nn.Module | None]:
    """The innermost module in whose call both the layer and all that computes its weight run, or why there is none."""
    makers = _makers(route, op)
    if any(route.ops[index].kind == "input" for index in makers):
        return "its weight depends on the model's input", None
    inner = [route.ops[i] for i in makers if route.ops[i].kind != "constant"]
    for call in reversed(op.stack):
        if all(call in other.stack for other in inner):
            module = owners.module_at(call.partition("@")[0])
            if module is not None and module is not owners.root:
                return "", module
            break
    return "its weight is computed in another module's forward, beside other things", None


def _baked_or_reason(
    facts: Facts, module: nn.Module, seen: Recorded | None, memo: Memo, layers: list[BakedLayer]
) -> str:
    """Bake one layer of the copy; empty, or the reason why it stays."""
    try:
        layer = _bake_one(facts, module, seen, memo)
        _put(facts.binding.owners, module, layer, memo)
    except Refused as refused:
        return str(refused)
    layers.append(layer)
    return ""


def _makers(route: Route, op: Op) -> set[int]:
    """The operations that compute the weight and the bias of a layer."""
    pending = [op.reads[role] for role in op.attrs.get("computed", ()) if role in op.reads]
    found: set[int] = set()
    while pending:
        index = pending.pop()
        if index not in found:
            found.add(index)
            pending += route.ops[index].inputs
    return found


def _bake_one(facts: Facts, module: nn.Module, seen: Recorded | None, memo: Memo) -> BakedLayer:
    paths = facts.binding.owners.paths(module)
    _refuse_hooks(module)
    spans = list(_spans(facts, paths))
    first = _the_layer(*spans[0])
    settings: dict[str, Any] | None = None
    padded = False
    for route, span in spans:
        op = _the_layer(route, span)
        padded |= _refuse_other_work(route, span, op, module)
        if (op.kind, op.attrs, op.dtype) != (first.kind, first.attrs, first.dtype):
            raise Refused("its calls use different settings")
    _refuse_readers(facts, spans)
    if seen is None:
        raise Refused("what it hands to its layer can't be seen")
    scratch = Scratch(module, seen)
    for route, span in spans:
        op = _the_layer(route, span)
        weight, bias = scratch.tensors(route.ops[_source(route, span, op)], op)
        if settings is None:
            settings = settings_of(op, weight)
            if padded:
                settings.update(padding=_listed(module.padding), padding_mode=module.padding_mode)
        try:
            plain = build(settings, weight, bias)
        except (ValueError, TypeError, RuntimeError) as error:
            raise Refused(f"no plain layer has its settings: {one_line(error)}") from error
        scratch.compare(plain)
    assert settings is not None
    layer = _finished(module, settings, scratch, memo)
    return BakedLayer(paths[0], paths, _describe(module), _after(layer), settings, layer)


def _refuse_hooks(module: nn.Module) -> None:
    for inner in module.modules():
        hooks = [
            *inner._forward_pre_hooks.values(),
            *inner._forward_hooks.values(),
            *inner._backward_hooks.values(),
            *inner._backward_pre_hooks.values(),
        ]
        for hook in hooks:
            if inner is not module or not isinstance(hook, _OWN_HOOKS):
                raise Refused(f"it has a hook ({getattr(hook, '__qualname__', type(hook).__name__)})")


def _spans(facts: Facts, paths: tuple[str, ...]) -> Iterator[tuple[Route, list[Op]]]:
    """What ran in each call of the module, in each route."""
    for route in facts.routes:
        calls: dict[str, list[Op]] = {}
        for op in route.ops:
            for call in op.stack:
                if call.partition("@")[0] in paths:
                    calls.setdefault(call, []).append(op)
                    break
        for span in calls.values():
            yield route, span


def _the_layer(route: Route, span: list[Op]) -> Op:
    """The convolution or linear call that makes the span's output of its input."""
    fed = _fed(route)
    layers = [op for op in span if op.kind in _LAYERS and op.index in fed]
    if len(layers) != 1:
        raise Refused(f"its forward calls {len(layers)} layers")
    if layers[0].within:
        raise Refused(f"it is called inside {layers[0].within[0]}, where only one of several branches runs")
    return layers[0]


def _fed(route: Route) -> set[int]:
    """The operations that an input of the model reaches."""
    reached: set[int] = set()
    for op in route.ops:
        if op.kind == "input" or any(i in reached for i in op.inputs):
            reached.add(op.index)
    return reached


def _refuse_other_work(route: Route, span: list[Op], layer: Op, module: nn.Module) -> bool:
    """Whether the call pads its input first; anything else that it does beside the layer and its weight is refused."""
    fed = _fed(route)
    inside = {op.index for op in span}
    others = [op for op in span if op.index in fed and op.index != layer.index]
    strange = next((op for op in others if "pad" not in op.target or op.stack != layer.stack), None)
    if strange is not None:
        raise Refused(f"its forward also does {strange.target}")
    if others and not (isinstance(module, _ConvNd) and type(module).forward in _PLAIN_FORWARDS):
        raise Refused("its forward pads its input itself, by what may depend on the size of the input")
    if others and "forward" in vars(module):
        raise Refused("its forward is set on the instance, and pads its input")
    if _makers(route, layer) & fed:
        raise Refused("its weight depends on the model's input")
    escaping = {i for op in route.ops if op.index not in inside for i in op.inputs if i in inside}
    if escaping - {layer.index}:
        raise Refused("its computed weight is also used outside of it")
    _source(route, span, layer)
    return bool(others)


def _source(route: Route, span: list[Op], layer: Op) -> int:
    """The one operation outside whose value goes into the call."""
    inside = {op.index for op in span}
    makers = _makers(route, layer)
    outside = {i for op in span if op.index not in makers for i in op.inputs if i not in inside | makers}
    constants = {i for i in outside if route.ops[i].kind == "constant"}
    if len(outside - constants) != 1 or "input" not in layer.reads:
        raise Refused("it is not called with one tensor")
    return (outside - constants).pop()


def _refuse_readers(facts: Facts, spans: list[tuple[Route, list[Op]]]) -> None:
    """Nobody else reads the tensors that the weight is computed from: they go."""
    mine = {(id(route), op.index) for route, span in spans for op in span}
    goes: set[int] = set()
    for route, span in spans:
        layer = _the_layer(route, span)
        goes |= {k for op in span if op.index != layer.index for k in op.tensors.values()}
    for route in facts.routes:
        for op in route.ops:
            read = sorted(goes & set(op.tensors.values()))
            if read and (id(route), op.index) not in mine:
                name = facts.tensors[read[0]].owners[0]
                where = "the model's output" if op.kind == "output" else f"{op.target} in {op.site}"
                raise Refused(f"{name}, which its weight is computed from, is also read by {where}")


# ---------------------------------------------------------------------------------- the plain layer


def _finished(module: nn.Module, settings: Mapping[str, Any], scratch: Scratch, memo: Memo) -> nn.Module:
    """The layer for the copy of the model: flags and readable settings of the module that it replaces are kept."""

    def own(value: Tensor | None) -> Tensor | None:
        original = scratch.original.get(id(value))
        twin = memo.get(id(original)) if original is not None else None
        return twin if isinstance(twin, nn.Parameter) else value

    weight, bias = own(scratch.weight), own(scratch.bias)
    assert weight is not None
    layer = build(settings, weight, bias)
    trained = any(p.requires_grad for p in module.parameters())
    for parameter in layer.parameters():
        if parameter is not weight and parameter is not bias:
            parameter.requires_grad_(trained)
    for name, value in vars(module).items():
        if isinstance(value, _KEPT) and not name.startswith("_") and name not in vars(layer):
            setattr(layer, name, value)
    layer.training = module.training
    return layer


def _put(owners: Owners, module: nn.Module, layer: BakedLayer, memo: Memo) -> None:
    try:
        with all_or_nothing(Surgeon(memo)) as surgeon:
            for slot in owners.module_slots[id(module)]:
                surgeon.put(slot, layer.module)
    except TraceError as error:
        raise Refused(error.message) from error


def _describe(module: nn.Module) -> str:
    """``Conv2d, weight by WeightNorm``; ``StdConv2d``, which computes it in its own forward."""
    makers: list[str] = [type(h).__name__ for h in module._forward_pre_hooks.values()]
    cls: Callable[..., Any] = type(module)
    for name, inner in getattr(module, "parametrizations", {}).items():
        cls = type(module).__mro__[1]
        makers += [type(step).__name__.lstrip("_") for step in inner if name in _STATE]
    return f"{cls.__name__}, weight by {', '.join(makers)}" if makers else f"{cls.__name__}, weight computed in forward"


def _after(layer: nn.Module) -> str:
    return f"{type(layer).__name__} with the weight as computed"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
