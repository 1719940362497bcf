"""One watch while it runs: steps, the norms touched in each, and which steps are measured."""

from __future__ import annotations

import weakref
from collections import Counter
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfix.errors import WatchError, one_line
from bnfix.loop.frames import Spot, WayIn, position, user_spot, way_in
from bnfix.loop.hooks import Attached
from bnfix.loop.measuring import measure
from bnfix.loop.samples import version_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnfix.loop.doors import Door
    from bnfix.loop.loads import Loads
    from bnfix.loop.optimizers import Held
    from bnfix.loop.ranks import Ranks
    from bnfix.loop.samples import Forward, Record
    from bnfix.loop.tally import Tally
    from bnfix.types import Finding

_FIRST = 16
"""So many steps are measured at the beginning; after that every 16th, and beyond 256 every 64th."""
_ENOUGH, _HUNGRY = 12, 64
"""Norms that are updated several times a step get so many measured steps out of the first so many."""
_PENDING = 8
_MOST_FORWARDS = 16


def measured(step: int) -> bool:
    """Whether a step is one of those that are measured: the same ones on every rank and in every run."""
    return step < _FIRST or step % (16 if step < 256 else 64) == 0


class Session:
    """What the hooks of one watch share."""

    def __init__(self, root: nn.Module, ranks: Ranks, end: CodeType | None) -> None:
        self.attached = Attached()
        self.ranks = ranks
        self.tallies: list[Tally] = []
        self.doors: list[Door] = []
        self.touched: list[Tally] = []
        self.window = 0
        """The step that is running; steps are counted from 0."""
        self.measured = 0
        self.stepped = False
        """An optimizer has taken its step and no forward has come since."""
        self.active = False
        self.sampling = True
        self.by_version = True
        """No optimizer was ever heard of: steps are recognised by weights that changed."""
        self.declared: str | None = None
        self.expected: Counter[str] = Counter()
        self.claimed: set[int] = set()
        """The norms whose parameters some optimizer holds."""
        self.forwards = 0
        self.every_batch = ranks.world > 1
        self.most_forwards = _MOST_FORWARDS
        self.records: list[tuple[Tally, Record]] = []
        self.spots: dict[int, tuple[Spot | None, WayIn]] = {}
        self.judge: Callable[[], tuple[Finding, ...]] | None = None
        """With strict=True: the errors so far."""
        self.errors: dict[str, Finding] = {}
        self.strict_loads: Loads | None = None
        self.broken = ""
        """Why the watch stopped before its end."""
        self._root = weakref.ref(root)
        self._end = end
        self._forward: CodeType | None = getattr(getattr(root, "forward", None), "__code__", None)
        self._owners: list[Held] = []
        self._waiting = 0
        self._versions = 0
        self._seen_versions: dict[int, int] = {}

    def newcomers(self) -> int:
        """Norms that were put into the model since the watch began."""
        root = self._root()
        known = {id(t.module()) for t in self.tallies}
        norms = (m for m in root.modules() if isinstance(m, _BatchNorm)) if root is not None else iter(())
        return sum(id(m) not in known and m._buffers.get("running_mean") is not None for m in norms)

    def training(self) -> bool:
        """Whether the model as a whole is in training mode."""
        root = self._root()
        return root is not None and root.training

    def root_called(self, _module: nn.Module, _args: object) -> None:
        """In front of each forward of the whole model."""
        self.forwards += 1

    def heard(self, held: Held) -> None:
        """A step of an optimizer, guarded."""
        try:
            self.stepped_by(held)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is not the training's fault
            self.give_up(error)

    def stepped_by(self, held: Held) -> None:
        """An optimizer took a step."""
        self.by_version = False
        self.claimed |= held.norms
        if self.stepped:  # several optimizers, one after the other, are one step
            self._owners.append(held)
        elif self.active or self._moved():
            self._close([held])

    def _moved(self) -> bool:
        """Whether statistics have changed though no hook was called: in a compiled graph."""
        now = sum(version_of(t.module(), "num_batches_tracked") for t in self.tallies)
        before, self._versions = self._versions, now
        return now != before

    def look_for_a_step(self, tally: Tally) -> None:
        """No optimizer of torch is in sight. Have the weights changed since this norm's last forward?"""
        probe = tally.probe()
        if probe is None:
            return
        version = probe._version
        before = self._seen_versions.get(tally.index)
        if before is not None and version != before:
            self._close([])
            self.turn()
            self.touched.append(tally)
            self._seen_versions.clear()
        self._seen_versions[tally.index] = version

    def _close(self, owners: list[Held]) -> None:
        # Statistics are read here, before a DDP forward can bring those of rank 0.
        self.close_open()
        self._owners = owners
        self.stepped = True

    def close_open(self) -> None:
        """Read the statistics behind the last forwards."""
        if self.sampling:
            for tally, record in self.records:
                if record.open is not None and record.window == self.window:
                    record.close(tally.module(), self.undisturbed(record.open))

    def undisturbed(self, forward: Forward) -> bool:
        """Whether nobody can have replaced the statistics since: DDP sends those of rank 0 in front of a forward."""
        return self.ranks.rank == 0 or forward.call == self.forwards

    def turn(self) -> None:
        """The first forward after a step: fold what the step had, begin the next."""
        self.stepped = self.active = False
        owners = self._owners
        owned: frozenset[int] = frozenset().union(*(h.norms for h in owners))
        anybody = not owners or any(h.any for h in owners)
        for tally in self.touched:
            own = tally.index in owned
            own = own or (anybody and tally.index not in self.claimed)
            if self.sampling and tally.record is not None and tally.record.window == self.window:
                tally.record.own, tally.record.carried = own, tally.carried
            tally.fold(own, self.sampling)
        self.touched.clear()
        for door in self.doors:
            door.fold(self.window)
        self.window += 1
        if self.sampling:
            self.measured += 1
            self._waiting += 1
            if self._waiting >= _PENDING or self.judge is not None:
                self.flush()
            for tally in self.tallies:
                tally.settle()
        if self.ranks.due(self.window):
            self.flush()
            self.ranks.publish(self.window)
        # Where optimizers take turns, or norms are called in some steps only, the first ones are not enough.
        hungry = self.window < _HUNGRY and any(t.multi and t.fed < _ENOUGH for t in self.tallies)
        self.sampling = hungry or measured(self.window)

    def flush(self) -> None:
        """Turn what was noted into sums; with strict=True, judge."""
        records, self.records, self._waiting = self.records, [], 0
        if records:
            measure(records, self.spots, self.ranks)
        self.judge_now()

    def judge_now(self) -> None:
        """With strict=True: look for errors; they are raised where they happen next."""
        if self.judge is not None and not self.errors:
            self.errors = {site.partition("@")[0]: f for f in self.judge() for site in f.sites}

    def raise_if_due(self, tally: Tally, evaluation: bool = False) -> None:
        """With strict=True: an error was found here before, and the same line comes again.

        Raises:
            WatchError: always, if so.
        """
        finding = self.errors.get(tally.path)
        if finding is not None and (evaluation or tally.n > 1):
            raise WatchError(f"{finding.code} {finding.name}: {finding.message}", finding=finding)

    def place(self, forward: Forward, frame: FrameType | None) -> None:
        """Where a forward comes from."""
        forward.place, inside = position(frame, self._end, self._forward)
        forward.inside = inside and self.forwards > 0
        place = forward.place
        if place not in self.spots and len(self.spots) < 4096:
            self.spots[place] = user_spot(frame), way_in(frame)

    def give_up(self, error: Exception) -> None:
        """Something went wrong in a hook: an error of the guard's must not end somebody's training.

        Raises:
            WatchError: that is what strict=True is for.
        """
        if isinstance(error, WatchError):
            raise error
        self.attached.remove()
        self.broken = f"the watch gave up in step {self.window}: {one_line(error)}; what follows is from before"
        self.records, self.stepped = [], False

    def end(self, *, failed: bool = False) -> None:
        """The loop is over: what is still open is read, what was noted is summed.

        ``failed``: by an exception. What DDP did in the step that did not end may be the reason.
        """
        self.close_open()
        for door in self.doors if failed else ():
            door.fold(self.window)
        if self.stepped:
            self.turn()
        judge, self.judge = self.judge, None
        self.flush()
        self.judge = judge
        if self.ranks.world > 1:
            self.ranks.publish(self.window)
