"""Which norm goes into which layers, and for every other one the reason why not. Reads :class:`Facts`, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from bnfix.folding.fold import Fold
from bnfix.folding.walking import Place, Reached, Refused, Walker, lanes, named
from bnfix.registry import plugins
from bnfix.types import Facts, NormFact, Op, Refusal


@dataclass(frozen=True)
class Target:
    """A layer that takes a norm up: the keys of its weight and bias (None: it has none yet), and one of its calls.

    ``lanes`` says which channel of the norm each of its channels is (-1: none of them), ``shift`` is False where it
    takes the scale alone.
    """

    weight: int
    bias: int | None
    op: Op
    holder: str
    """Path of the module whose weight this is."""
    fold: Fold
    lanes: tuple[int, ...]
    shift: bool = True


@dataclass(frozen=True)
class PlannedFold:
    """One norm, the layers it goes into, and the norms that must be folded before it (norm after norm)."""

    norm: NormFact
    op: Op
    targets: tuple[Target, ...]
    requires: frozenset[str] = frozenset()
    calls: tuple[str, ...] = ()
    """The norm's call sites, as a reader names them."""

    @property
    def forward(self) -> bool:
        """Whether it goes into the layers that it feeds."""
        return any(t.fold.forward for t in self.targets)

    def refused(self, reason: str, *, defect: bool = False) -> Refusal:
        """This norm stays after all."""
        return Refusal(self.norm.path, reason, self.calls, defect, self.norm.summary)


@dataclass(frozen=True)
class Plan:
    """Every norm of the facts, either in ``folds`` (in the order to apply them) or in ``refusals``.

    ``plain`` are the sites of refusals where nothing is wrong with the norm itself: only its neighbours can't take it.
    ``computed`` leads from norms to the module whose computed weight is what they were refused for.
    """

    folds: tuple[PlannedFold, ...]
    refusals: tuple[Refusal, ...]
    plain: frozenset[str] = frozenset()
    computed: Mapping[str, str] = field(default_factory=dict)


def plan(facts: Facts) -> Plan:
    """Decide for each norm: it is folded only if every use of its statistics and of the weights concerned allows it.

    First backward, in the order of the calls: a norm behind another one goes where that one went. What is left goes
    forward if it can, the last first: a norm may pass through the one behind it.
    """
    planner = _Planner(facts)
    folds: list[PlannedFold] = []
    reasons: dict[str, str] = {}
    computed: dict[str, str] = {}
    for norm in facts.norms:
        try:
            planned = planner.decide(norm)
        except Computed as refused:
            reasons[norm.path], computed[norm.path] = str(refused), refused.module
        except Refused as refused:
            reasons[norm.path] = str(refused)
        else:
            folds.append(planned)
            planner.accept(planned)
    # What is changed in place afterwards shows by name alone where there are no shapes: nothing goes forward there.
    for norm in reversed([n for n in facts.norms if n.path in reasons and facts.source != "symbolic"]):
        try:
            planned = planner.decide(norm, forward=True)
        except Computed as refused:
            computed.setdefault(norm.path, refused.module)
            reasons[norm.path] += f"; nor forward: {refused}"
        except Refused as refused:
            if str(refused) != reasons[norm.path]:
                reasons[norm.path] += f"; nor forward: {refused}"
        else:
            del reasons[norm.path]
            computed.pop(norm.path, None)
            folds.append(planned)
            planner.accept(planned)
    refusals = [
        Refusal(n.path, reasons[n.path], planner.call_names(n), before=n.summary)
        for n in facts.norms
        if n.path in reasons
    ]
    return Plan(tuple(folds), tuple(refusals), frozenset(n.path for n in facts.norms if planner.plain(n)), computed)


class Computed(Refused):
    """The weight of ``module`` is computed in its forward: as a constant it could take the norm up."""

    def __init__(self, reason: str, module: str) -> None:
        super().__init__(reason)
        self.module = module


@dataclass
class _Planner:
    facts: Facts
    uses: dict[int, list[tuple[Place, str]]] = field(default_factory=dict)
    walker: Walker = field(init=False)

    def __post_init__(self) -> None:
        for r, route in enumerate(self.facts.routes):
            for op in route.ops:
                for role, key in op.tensors.items():
                    self.uses.setdefault(key, []).append(((r, op.index), role))
        self.backward: dict[str, Fold] = {}
        self.ahead: dict[str, Fold] = {}
        for fold in plugins("bnfix.folding.folds", Fold):  # type: ignore[type-abstract]
            for kind in fold.kinds:
                (self.ahead if fold.forward else self.backward)[kind] = fold
        self.walker = Walker(self.facts.routes, self.backward, self.ahead)

    # ------------------------------------------------------------------------------ decisions

    def decide(self, norm: NormFact, *, forward: bool = False) -> PlannedFold:
        """The plan for one norm. Raises :class:`Refused` with the reason."""
        self._norm_itself(norm)
        folds = self.ahead if forward else self.backward
        targets: dict[tuple[int, int | None, str], Target] = {}
        places: set[Place] = set()
        requires: set[str] = set()
        for place in norm.calls:
            self._changes_nothing_else(place)
            for reached in self.walker.ahead(place) if forward else self.walker.back(place):
                target = self._target(self._op(reached.place), folds, reached)
                self._unseen(target, place, reached, norm)
                for other in targets.values():
                    same = (other.lanes, other.shift) == (target.lanes, target.shift)
                    if not same and (other.weight == target.weight or None is not other.bias == target.bias):
                        raise Refused(f"{target.op.site} would take it up in two ways at once")
                targets.setdefault((target.weight, target.bias, target.holder), target)
                places.add(reached.place)
                requires |= reached.norms
        if forward and self.facts.held & {norm.tensors.get("running_mean")}:
            raise Refused("something keeps its output beyond the forward, and would read other numbers after a fold")
        for target in targets.values():
            self._every_use(target, places)
        first = self._op(norm.calls[0])
        return PlannedFold(norm, first, tuple(targets.values()), frozenset(requires), self.call_names(norm))

    def plain(self, norm: NormFact) -> bool:
        """Whether the norm is known to be one scale and shift per channel, whatever is around it."""
        try:
            self._norm_itself(norm)
        except Refused:
            return False
        return not self.facts.hooks.get(norm.path)

    def accept(self, planned: PlannedFold) -> None:
        """From here on the norm passes its input on unchanged."""
        for r, index in planned.norm.calls:
            op = self.facts.routes[r].ops[index]
            self.walker.through[r, index] = op.reads["input"]
            self.walker.planned[r, index] = planned.norm.path

    def _changes_nothing_else(self, place: Place) -> None:
        """A norm that also turns one shape or dtype into another does something that no layer takes up."""
        op = self._op(place)
        source = self._op((place[0], op.reads["input"])) if "input" in op.reads else op
        if (source.shape, source.dtype) != (op.shape, op.dtype):
            raise Refused(f"it turns {_typed(source)} into {_typed(op)}, which {source.site} can't")

    def _norm_itself(self, norm: NormFact) -> None:
        for reason in self.facts.blockers:
            raise Refused(reason)
        if not norm.calls and norm.extra:
            raise Refused(f"{norm.cls}: {norm.extra}")
        if not norm.calls:
            tried = ", ".join(r.signature for r in self.facts.routes)
            raise Refused(f"no forward reached it (tried {tried}): nothing is known of its input")
        for place in norm.calls:
            op = self._op(place)
            if op.attrs.get("training"):
                if "running_mean" not in op.tensors:
                    raise Refused("it has no running statistics: it normalises with those of each batch")
                raise Refused("it is in training mode; call model.eval() first")
            if "running_mean" not in op.tensors or "running_var" not in op.tensors:
                raise Refused("its statistics are computed in the forward, or it has none")
            if op.attrs.get("computed"):
                raise Refused(f"its {', '.join(op.attrs['computed'])} is computed in the forward")
            if op.within:
                raise Refused(f"it is called inside {op.within[0]}, where only one of several branches runs")
            if dict(op.tensors) != dict(norm.tensors) and norm.module:
                raise Refused("a call of it uses other weights or statistics than its own")
            if op.attrs.get("eps") != self._op(norm.calls[0]).attrs.get("eps"):
                raise Refused("its calls use different eps")
        if not norm.module:
            raise Refused(
                f"it is a functional call (F.batch_norm) in a forward of {self._op(norm.calls[0]).site}: "
                "there is no module to take out; use nn.BatchNorm there"
            )
        if norm.extra:
            raise Refused(f"{norm.cls}: {norm.extra}")
        for role, key in norm.tensors.items():
            for place, used_as in self.uses.get(key, ()):
                other = self._op(place)
                if place not in norm.calls and (other.kind != "norm" or used_as != role):
                    raise Refused(f"its {role} is also read by {named(other)}")

    def _target(self, layer: Op, folds: Mapping[str, Fold], reached: Reached) -> Target:
        site, fold = layer.site, folds[layer.kind]
        if "weight" in layer.attrs.get("computed", ()):
            raise Computed(
                f"the weight of {site} is computed in its forward (parametrization, weight_norm, standardised layer)",
                site.path,
            )
        weight = layer.tensors.get("weight")
        if weight is None:
            raise Refused(f"the weight of {site} is no parameter of the model")
        if "bias" in layer.attrs.get("computed", ()):
            raise Refused(f"the bias of {site} is computed in its forward")
        traced = layer if layer.shape is not None else replace(layer, shape=tuple(reached.labels.shape))
        reason = fold.refuse(traced, self.facts.tensors[weight].shape)
        if reason:
            raise Refused(reason)
        channels = lanes(reached.labels, fold.axis(layer))
        if channels is None:
            where = "the last" if fold.axis(layer) == -1 else f"number {fold.axis(layer)}"
            rank = reached.labels.dim()
            raise Refused(
                f"{site} has its channels on {where} of {rank} axes, this norm elsewhere: not the same channels"
            )
        owner = self.facts.tensors[weight].owners[0]
        inside = {call.partition("@")[0] for call in layer.stack}
        for name in self.facts.tensors[weight].owners:
            if name.rpartition(".")[0] in inside and name.rpartition(".")[0]:
                owner = name
        holder = owner.rpartition(".")[0]
        # A module in a plain list is in no stack though it is called.
        if "bias" not in layer.tensors and holder and holder not in inside and not set("[(") & set(holder):
            raise Refused(f"{site} uses the weight of {holder} without calling it: a new bias there would not be read")
        target = Target(
            weight, layer.tensors.get("bias"), layer, owner.rpartition(".")[0], fold, channels, reached.shift
        )
        if target.bias is None:
            self._bias_is_its_own(target)
        return target

    def _bias_is_its_own(self, target: Target) -> None:
        """A bias given to the module would reach every call in it that has none yet."""
        for route in self.facts.routes:
            for op in route.ops:
                if op.kind in self.backward and "bias" not in op.tensors and op.tensors.get("weight") != target.weight:
                    names = self.facts.tensors[op.tensors["weight"]].owners if "weight" in op.tensors else ()
                    if target.holder in {n.rpartition(".")[0] for n in names}:
                        raise Refused(f"{target.op.site} has no bias of its own: {named(op)} there has none either")

    def _every_use(self, target: Target, sources: set[Place]) -> None:
        """Each use of the layer's weight and bias feeds this norm; else the fold would change other outputs."""
        for key, role in ((target.weight, "weight"), (target.bias, "bias")):
            if key is None:
                continue
            name = self.facts.tensors[key].owners[0]
            for place, used_as in self.uses[key]:
                op = self._op(place)
                if place in sources and used_as == role:
                    continue
                if op.kind in self.backward and used_as == role:
                    raise Refused(f"{name} is shared: {named(op)} uses it too, and this norm doesn't follow there")
                raise Refused(f"{name} is also read by {named(op)}")
        if target.weight in self.facts.held and not target.fold.forward:
            raise Refused(
                f"something keeps the output of {target.op.site} beyond the forward (an attribute, a list, a hook's "
                "closure), and would read other numbers after a fold"
            )

    def _unseen(self, target: Target, place: Place, reached: Reached, norm: NormFact) -> None:
        """Hooks that would see a value between the layer and the norm; the graph doesn't show them."""
        ops = [self._op((place[0], i)) for i in (reached.place[1], place[1], *reached.path)]
        calls = [{c.partition("@")[0] for c in op.stack} for op in ops]
        calls[0] |= set(_prefixes(target.holder))
        calls[1] |= set(_prefixes(norm.path))
        around = set.intersection(*calls)
        for path in sorted((set.union(*calls) - around) | {target.holder, norm.path}):
            hooks = self.facts.hooks.get(path)
            if hooks:
                raise Refused(
                    f"{path or 'the model'} has a hook ({hooks[0]}) that may see or change what passes between "
                    f"{target.op.site} and this norm"
                )

    # -------------------------------------------------------------------------------- lookups

    def call_names(self, norm: NormFact) -> tuple[str, ...]:
        """The norm's call sites as a reader names them, without repeats from several routes."""
        return tuple(dict.fromkeys(str(self._op(p).site) for p in norm.calls))

    def _op(self, place: Place) -> Op:
        return self.facts.routes[place[0]].ops[place[1]]


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    for i in range(len(parts) + 1):
        yield ".".join(parts[:i])


def _typed(op: Op) -> str:
    return f"{'x'.join(map(str, op.shape or ()))} {op.dtype}"
