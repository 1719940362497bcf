"""Which norm goes into which layers, and for every other one the reason why not. Reads :class:`Facts`, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bnfix.folding.fold import Fold
from bnfix.registry import plugins
from bnfix.types import Facts, NormFact, Op, Refusal

Place = tuple[int, int]
"""An operation: (route, index)."""


@dataclass(frozen=True)
class Target:
    """A layer that takes a norm up: the keys of its weight and bias (None: it has none yet), and one of its calls."""

    weight: int
    bias: int | None
    op: Op
    holder: str
    """Path of the module whose weight this is."""
    fold: Fold


@dataclass(frozen=True)
class PlannedFold:
    """One norm, the layers it goes into, and the norms that must be folded before it (norm after norm)."""

    norm: NormFact
    op: Op
    targets: tuple[Target, ...]
    requires: frozenset[str] = frozenset()
    calls: tuple[str, ...] = ()
    """The norm's call sites, as a reader names them."""

    def refused(self, reason: str, *, defect: bool = False) -> Refusal:
        """This norm stays after all."""
        return Refusal(self.norm.path, reason, self.calls, defect, self.norm.summary)


@dataclass(frozen=True)
class Plan:
    """Every norm of the facts, either in ``folds`` (in the order to apply them) or in ``refusals``."""

    folds: tuple[PlannedFold, ...]
    refusals: tuple[Refusal, ...]


class _Refused(Exception):  # noqa: N818  # not an error: the reason that a plan hands on
    """Carries the reason."""


def plan(facts: Facts) -> Plan:
    """Decide for each norm: it is folded only if every use of its statistics and of the weights concerned allows it."""
    planner = _Planner(facts)
    folds: list[PlannedFold] = []
    refusals: list[Refusal] = []
    for norm in facts.norms:
        try:
            planned = planner.decide(norm)
        except _Refused as refused:
            refusals.append(Refusal(norm.path, str(refused), planner.call_names(norm), before=norm.summary))
        else:
            folds.append(planned)
            planner.accept(planned)
    return Plan(tuple(folds), tuple(refusals))


@dataclass
class _Planner:
    facts: Facts
    uses: dict[int, list[tuple[Place, str]]] = field(default_factory=dict)
    folds_of: dict[str, Fold] = field(default_factory=dict)
    through: dict[Place, int] = field(default_factory=dict)
    """A planned norm's operation → the operation whose value it will pass on unchanged."""
    planned: dict[Place, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for r, route in enumerate(self.facts.routes):
            for op in route.ops:
                for role, key in op.tensors.items():
                    self.uses.setdefault(key, []).append(((r, op.index), role))
        for fold in plugins("bnfix.folding.folds", Fold):  # type: ignore[type-abstract]
            for kind in fold.kinds:
                self.folds_of[kind] = fold

    # ------------------------------------------------------------------------------ decisions

    def decide(self, norm: NormFact) -> PlannedFold:
        """The plan for one norm. Raises :class:`_Refused` with the reason."""
        self._norm_itself(norm)
        producers = {place: self._producer(place) for place in norm.calls}
        targets: dict[tuple[int, int | None, str], Target] = {}
        for place, source in producers.items():
            op = self._op(source)
            self._alone(source, place)
            target = self._target(op)
            reason = target.fold.refuse(op, self._op(place), self.facts.tensors[target.weight].shape)
            if reason:
                raise _Refused(reason)
            if op.shape != self._op(place).shape or op.dtype != self._op(place).dtype:
                raise _Refused(f"it turns {_typed(op)} into {_typed(self._op(place))}, which {op.site} can't")
            self._unseen(op, self._op(place), norm, target)
            targets.setdefault((target.weight, target.bias, target.holder), target)
        for target in targets.values():
            self._every_use(target, set(producers.values()))
        requires = {
            name for place, name in self.planned.items() if any(self._resolve(place) == s for s in producers.values())
        }
        first = self._op(norm.calls[0])
        return PlannedFold(norm, first, tuple(targets.values()), frozenset(requires), self.call_names(norm))

    def accept(self, planned: PlannedFold) -> None:
        """From here on the norm passes its input on unchanged."""
        for r, index in planned.norm.calls:
            op = self.facts.routes[r].ops[index]
            self.through[r, index] = op.reads["input"]
            self.planned[r, index] = planned.norm.path

    def _norm_itself(self, norm: NormFact) -> None:
        for reason in self.facts.blockers:
            raise _Refused(reason)
        if not norm.calls and norm.extra:
            raise _Refused(f"{norm.cls}: {norm.extra}")
        if not norm.calls:
            tried = ", ".join(r.signature for r in self.facts.routes)
            raise _Refused(f"no forward reached it (tried {tried}): nothing is known of its input")
        for place in norm.calls:
            op = self._op(place)
            if op.attrs.get("training"):
                if "running_mean" not in op.tensors:
                    raise _Refused("it has no running statistics: it normalises with those of each batch")
                raise _Refused("it is in training mode; call model.eval() first")
            if "running_mean" not in op.tensors or "running_var" not in op.tensors:
                raise _Refused("its statistics are computed in the forward, or it has none")
            if op.attrs.get("computed"):
                raise _Refused(f"its {', '.join(op.attrs['computed'])} is computed in the forward")
            if op.within:
                raise _Refused(f"it is called inside {op.within[0]}, where only one of several branches runs")
            if dict(op.tensors) != dict(norm.tensors) and norm.module:
                raise _Refused("a call of it uses other weights or statistics than its own")
            if op.attrs.get("eps") != self._op(norm.calls[0]).attrs.get("eps"):
                raise _Refused("its calls use different eps")
        if not norm.module:
            raise _Refused(
                f"it is a functional call (F.batch_norm) in a forward of {self._op(norm.calls[0]).site}: "
                "there is no module to take out; use nn.BatchNorm there"
            )
        if norm.extra:
            raise _Refused(f"{norm.cls}: {norm.extra}")
        for role, key in norm.tensors.items():
            for place, used_as in self.uses.get(key, ()):
                other = self._op(place)
                if place not in norm.calls and (other.kind != "norm" or used_as != role):
                    raise _Refused(f"its {role} is also read by {_named(other)}")

    def _producer(self, place: Place) -> Place:
        op = self._op(place)
        source = op.reads.get("input")
        if source is None:
            raise _Refused("its input is a tensor of the model itself, or several values")
        found = self._resolve((place[0], source))
        producer = self._op(found)
        if producer.kind == "input":
            raise _Refused("its input is the model's own input")
        if producer.kind not in self.folds_of:
            raise _Refused(f"its input comes from {_named(producer)}, which can't take it up")
        if producer.within:
            raise _Refused(f"{producer.site} is called inside {producer.within[0]}")
        return found

    def _alone(self, source: Place, place: Place) -> None:
        """The producer's value goes to this call of the norm and to nobody else."""
        users = [u for u in self._consumers(source) if u != place]
        if users:
            who = ", ".join(dict.fromkeys(_named(self._op(u)) for u in users))
            raise _Refused(f"the output of {self._op(source).site} is also used by {who}")

    def _target(self, producer: Op) -> Target:
        site = producer.site
        if "weight" in producer.attrs.get("computed", ()):
            raise _Refused(
                f"the weight of {site} is computed in its forward (parametrization, weight_norm, standardised layer)"
            )
        weight = producer.tensors.get("weight")
        if weight is None:
            raise _Refused(f"the weight of {site} is no parameter of the model")
        if "bias" in producer.attrs.get("computed", ()):
            raise _Refused(f"the bias of {site} is computed in its forward")
        owner = self.facts.tensors[weight].owners[0]
        inside = {call.partition("@")[0] for call in producer.stack}
        for name in self.facts.tensors[weight].owners:
            if name.rpartition(".")[0] in inside and name.rpartition(".")[0]:
                owner = name
        target = Target(
            weight, producer.tensors.get("bias"), producer, owner.rpartition(".")[0], self.folds_of[producer.kind]
        )
        if target.bias is None:
            self._bias_is_its_own(target)
        return target

    def _bias_is_its_own(self, target: Target) -> None:
        """A bias given to the module would reach every call in it that has none yet."""
        for route in self.facts.routes:
            for op in route.ops:
                if op.kind in self.folds_of and "bias" not in op.tensors and op.tensors.get("weight") != target.weight:
                    names = self.facts.tensors[op.tensors["weight"]].owners if "weight" in op.tensors else ()
                    if target.holder in {n.rpartition(".")[0] for n in names}:
                        raise _Refused(f"{target.op.site} has no bias of its own: {_named(op)} there has none either")

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
                if op.kind in self.folds_of and used_as == role:
                    raise _Refused(f"{name} is shared: {_named(op)} uses it too, and this norm doesn't follow there")
                raise _Refused(f"{name} is also read by {_named(op)}")
        if target.weight in self.facts.held:
            raise _Refused(
                f"something keeps the output of {target.op.site} beyond the forward (an attribute, a list, a hook's "
                "closure), and would read other numbers after a fold"
            )

    def _unseen(self, producer: Op, op: Op, norm: NormFact, target: Target) -> None:
        """Hooks that would see the value between the layer and the norm; the graph doesn't show them."""
        first = {c.partition("@")[0] for c in producer.stack} | set(_prefixes(target.holder))
        second = {c.partition("@")[0] for c in op.stack} | set(_prefixes(norm.path))
        for path in sorted((first ^ second) | {target.holder, norm.path}):
            hooks = self.facts.hooks.get(path)
            if hooks:
                raise _Refused(
                    f"{path or 'the model'} has a hook ({hooks[0]}) that may see or change what passes between "
                    f"{producer.site} and this norm"
                )

    # -------------------------------------------------------------------------------- lookups

    def call_names(self, norm: NormFact) -> tuple[str, ...]:
        """The norm's call sites as a reader names them, without repeats from several routes."""
        return tuple(dict.fromkeys(str(self._op(p).site) for p in norm.calls))

    def _op(self, place: Place) -> Op:
        return self.facts.routes[place[0]].ops[place[1]]

    def _resolve(self, place: Place) -> Place:
        route, index = place
        while (route, index) in self.through:
            index = self.through[route, index]
        return route, index

    def _consumers(self, place: Place) -> Iterator[Place]:
        """Who reads a value, directly or through norms that are planned to pass it on."""
        for user in self.facts.routes[place[0]].users(place[1]):
            at = (place[0], user.index)
            if at in self.through:
                yield from self._consumers(at)
            else:
                yield at


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    for i in range(len(parts) + 1):
        yield ".".join(parts[:i])


def _named(op: Op) -> str:
    if op.kind == "output":
        return "the model's output"
    where = f" in {op.site}" if str(op.site) != "(root)" else ""
    return f"{op.target.removesuffix('.default').removesuffix('.Tensor')}{where}"


def _typed(op: Op) -> str:
    return f"{'x'.join(map(str, op.shape or ()))} {op.dtype}"
