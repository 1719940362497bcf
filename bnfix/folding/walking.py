"""From a norm to the layers that can take it up: backward to those that feed it, forward to those that it feeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnfix.folding.carrier import Carrier, short
from bnfix.folding.carriers.moving import SPLITS, Moving
from bnfix.folding.fold import Fold
from bnfix.folding.sharing import changed, changed_by_layout, may_share
from bnfix.registry import plugins
from bnfix.types import Op, Route

Place = tuple[int, int]
"""An operation: (route, index)."""

_VALUELESS = frozenset({"_assert_tensor_metadata", "dim", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset"})
"""Operations that ask for shape or dtype alone."""
_NOT_IN_PLACE = SPLITS | {"expand", "expand_as", "unfold"}
"""Views that PyTorch does not let anyone change in place."""


class Refused(Exception):  # noqa: N818  # not an error: the reason that a plan hands on
    """Carries the reason."""


@dataclass
class Reached:
    """A layer at the end of a way: which channel of the norm each of its channels is, -1 for none.

    ``shift`` is False where only the scale goes here; ``path`` are the operations between, ``norms`` those among them
    that are planned to pass their input on.
    """

    place: Place
    labels: Tensor
    shift: bool
    path: set[int] = field(default_factory=set)
    norms: set[str] = field(default_factory=set)


class Walker:
    """Walks one route of facts after another. ``through`` holds norms that are planned to pass on what they get.

    ``through`` leads from a planned norm's operation to the one whose value it will pass on unchanged, ``planned`` to
    the path of the norm.
    """

    def __init__(self, routes: tuple[Route, ...], backward: Mapping[str, Fold], forward: Mapping[str, Fold]) -> None:
        self.routes, self.backward, self.forward = routes, backward, forward
        self.through: dict[Place, int] = {}
        self.planned: dict[Place, str] = {}
        self._carriers = {t: c for c in plugins("bnfix.folding.carriers", Carrier) for t in c.targets}  # type: ignore[type-abstract]

    def op(self, place: Place) -> Op:
        """The operation there."""
        return self.routes[place[0]].ops[place[1]]

    # ------------------------------------------------------------------------------- backward

    def back(self, place: Place) -> list[Reached]:
        """The layers that make up the input of the norm called at ``place``.

        Raises:
            Refused: there is something else among them, or somebody else reads what they give.
        """
        norm = self.op(place)
        source = norm.reads.get("input")
        if source is None:
            raise Refused("its input is a tensor of the model itself, or several values")
        found: dict[int, Reached] = {}
        way = _Way(place[0], found)
        self._pull(way, source, place[1], _channels(norm), True, frozenset(), frozenset())
        if way.split and self._changed(*place, place[1], back=False):
            raise Refused("its output is changed in place, which PyTorch does not allow for a part of a split")
        if way.moved and changed_by_layout(self.routes[place[0]], place[1], self._passing(place[0])):
            raise Refused("its output is changed in place or copied first, by how it lies in memory")
        return list(found.values())

    def _pull(
        self, way: _Way, index: int, user: int, labels: Tensor, shift: bool, path: frozenset[int], norms: frozenset[str]
    ) -> None:
        route = way.route
        while (route, index) in self.through:
            norms |= {self.planned[route, index]}
            path |= {index}
            index = self.through[route, index]
        op = self.op((route, index))
        if op.kind == "input":
            raise Refused("its input is the model's own input")
        if op.within:
            raise Refused(f"{op.site} is called inside {op.within[0]}")
        self._alone(route, index, user, labels)
        if op.kind in self.backward:
            _merge(way.found, Reached((route, index), labels, shift, set(path), set(norms)))
            return
        carrier = self._carriers.get(short(op))
        if carrier is None:
            raise Refused(f"its input comes from {named(op)}, which can't take it up")
        pulls = carrier.back(op, labels, self.routes[route].ops.__getitem__)
        if isinstance(pulls, str):
            raise Refused(f"its input comes from {named(op)}: {pulls}")
        path |= {index}
        way.moved |= isinstance(carrier, Moving)
        reader = index
        if op.target == "getitem":  # one part of a split: those who read the others are somebody else
            reader = op.inputs[0]
            path |= {reader}
            self._own_part(route, op)
        way.split |= short(self.op((route, reader))) in _NOT_IN_PLACE
        for pull in pulls:
            self._pull(way, pull.index, reader, pull.labels, shift and pull.shift, path, norms)

    def _own_part(self, route: int, part: Op) -> None:
        for other in self.routes[route].users(part.inputs[0]):
            if other.index != part.index and (other.target != "getitem" or other.attrs["#1"] == part.attrs["#1"]):
                raise Refused(f"the same part of {named(self.op((route, part.inputs[0])))} is also used elsewhere")

    def _alone(self, route: int, index: int, user: int, labels: Tensor) -> None:
        """What is to be changed of a value goes to ``user`` and to nobody else."""
        others = [(u, read) for u, read in self._consumers(route, index) if u != user]
        strangers = [u for u, read in others if not self._spares(route, u, read, labels)]
        if strangers:
            who = ", ".join(dict.fromkeys(named(self.op((route, u))) for u in strangers))
            raise Refused(f"the output of {_where(self.op((route, index)))} is also used by {who}")

    def _consumers(self, route: int, index: int) -> Iterator[tuple[int, int]]:
        """Who reads a value, directly or through norms that are planned to pass it on; and what of these they read."""
        for user in self.routes[route].users(index):
            if (route, user.index) in self.through:
                yield from self._consumers(route, user.index)
            else:
                yield user.index, index

    def _spares(self, route: int, user: int, index: int, labels: Tensor) -> bool:
        """Whether this reader takes only elements that no channel of the norm belongs to."""
        op = self.op((route, user))
        lent = short(op) in ("reshape_as", "view_as", "expand_as") and op.reads.get("self") != index
        if lent or short(op) in _VALUELESS:
            return True  # it asks for the shape
        carrier = self._carriers.get(short(op))
        if not isinstance(carrier, Moving) or op.inputs != (index,):
            return False
        if short(op) in SPLITS:
            return all(self._spares_part(route, u, index, labels) for u in self.routes[route].users(user))
        ahead = carrier.ahead(op, index, labels, self.routes[route].ops.__getitem__)
        return isinstance(ahead, Tensor) and not bool((ahead >= 0).any())

    def _spares_part(self, route: int, part: Op, index: int, labels: Tensor) -> bool:
        if part.target != "getitem":
            return False
        ahead = self._carriers["getitem"].ahead(part, index, labels, self.routes[route].ops.__getitem__)
        return isinstance(ahead, Tensor) and not bool((ahead >= 0).any())

    def _changed(self, route: int, start: int, after: int, *, back: bool) -> bool:
        return changed(self.routes[route], start, after, self._passing(route), back=back)

    def _passing(self, route: int) -> Callable[[Op], bool]:
        """Which operations may give the memory that they get; a planned norm will."""
        return lambda op: may_share(op) or (route, op.index) in self.through

    # -------------------------------------------------------------------------------- forward

    def ahead(self, place: Place) -> list[Reached]:
        """The layers that everything the norm called at ``place`` gives goes into.

        Raises:
            Refused: something else reads it as well, or its input is changed in place afterwards.
        """
        norm = self.op(place)
        source = norm.reads.get("input")
        if source is None:
            raise Refused("its input is a tensor of the model itself, or several values")
        if self._changed(place[0], source, place[1], back=True):
            raise Refused("its input is changed in place afterwards")
        found: dict[int, Reached] = {}
        self._push(_Way(place[0], found), place[1], _channels(norm), frozenset(), frozenset())
        if not found:
            raise Refused("nothing reads its output")
        return list(found.values())

    def _push(self, way: _Way, index: int, labels: Tensor, path: frozenset[int], norms: frozenset[str]) -> None:
        route = way.route
        for user in dict.fromkeys(u.index for u in self.routes[route].users(index)):
            op = self.op((route, user))
            if short(op) in _VALUELESS:
                continue
            if op.within:
                raise Refused(f"its output goes to {op.site}, which is called inside {op.within[0]}")
            if (route, user) in self.through:
                self._push(way, user, labels, path | {user}, norms | {self.planned[route, user]})
                continue
            if op.kind in self.forward and op.reads.get("input") == index and op.inputs.count(index) == 1:
                _merge(way.found, Reached((route, user), labels, True, set(path), set(norms)))
                continue
            carrier = self._carriers.get(short(op))
            if carrier is None or op.kind == "output":
                raise Refused(f"its output goes to {named(op)}, which can't take it up")
            if short(op) in SPLITS:  # its parts are read one by one
                for part in self.routes[route].users(user):
                    self._carry(way, part, index, labels, path | {user}, norms, carrier)
                continue
            self._carry(way, op, index, labels, path, norms, carrier)

    def _carry(
        self,
        way: _Way,
        op: Op,
        index: int,
        labels: Tensor,
        path: frozenset[int],
        norms: frozenset[str],
        carrier: Carrier,
    ) -> None:
        ahead = carrier.ahead(op, index, labels, self.routes[way.route].ops.__getitem__)
        if isinstance(ahead, str):
            raise Refused(f"its output goes to {named(op)}: {ahead}")
        if bool((ahead >= 0).any()):
            self._push(way, op.index, ahead, path | {op.index}, norms)


@dataclass
class _Way:
    route: int
    found: dict[int, Reached]
    split: bool = False
    moved: bool = False


def _channels(norm: Op) -> Tensor:
    """The labels of what a norm reads and gives: its channels are axis 1.

    Without shapes (a symbolic trace) only its class may tell the rank: then the other axes have length 1.
    """
    shape = norm.shape
    if shape is None:
        rank, channels = norm.attrs.get("rank"), norm.attrs.get("channels")
        if rank is None or channels is None:
            raise Refused("without an input nothing is known of the rank of what it normalises: give one (--input)")
        shape = (1, channels, *(1,) * (rank - 2))
    if len(shape) < 2:
        raise Refused("its input has no channel axis")
    return torch.arange(shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2)).expand(shape)


def _merge(found: dict[int, Reached], new: Reached) -> None:
    """A layer that is reached on two ways takes up what comes on either, where that is for different channels."""
    old = found.get(new.place[1])
    if old is None:
        found[new.place[1]] = new
        return
    both = (old.labels >= 0) & (new.labels >= 0)
    if bool(both.any()) or old.shift != new.shift:
        raise Refused("the same values reach it on two ways")
    labels = torch.where(old.labels >= 0, old.labels, new.labels)
    found[new.place[1]] = Reached(new.place, labels, new.shift, old.path | new.path, old.norms | new.norms)


def lanes(labels: Tensor, axis: int) -> tuple[int, ...] | None:
    """The label of each index along ``axis``; None where others stand elsewhere along the other axes."""
    axis %= labels.dim()
    first = labels
    for other in range(labels.dim()):
        if other != axis:
            first = first.narrow(other, 0, 1)
    return tuple(first.flatten().tolist()) if bool((labels == first).all()) else None


def named(op: Op) -> str:
    """An operation as a reader knows it."""
    if op.kind == "output":
        return "the model's output"
    where = f" in {op.site}" if str(op.site) != "(root)" else ""
    return f"{op.target.removesuffix('.default').removesuffix('.Tensor')}{where}"


def _where(op: Op) -> str:
    return str(op.site) if str(op.site) != "(root)" else named(op)
