"""One chunk on its way through the model: it stops at each norm and goes on when it is given statistics.

Two kinds behave alike. A :class:`ParkedStrand` parks its forward (in a fiber or a thread of its own, on its own
replica): each operation runs once. A :class:`RerunStrand` keeps nothing: it runs the plain model anew for each norm.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from bnfix.calibration.ambient import Turn
from bnfix.calibration.chunks import Chunk, mask_at
from bnfix.calibration.listening import Listener, Seen, Stats
from bnfix.calibration.norms import Norms, norms_device
from bnfix.calibration.spill import SpilledStrand
from bnfix.errors import CalibrationError
from bnfix.running import give_back
from bnfix.stats import Moments, SampleSums, pool

Using = Callable[[Mapping[int, Stats]], AbstractContextManager[None]]
Place = tuple[int, int]
"""A norm's key, and the how-manieth of its calls in this forward."""


class Unwind(BaseException):
    """Leaves the user's forward; no ``except Exception`` of theirs stops it."""


class StuckError(RuntimeError):
    """A chunk waits for something that only another chunk can give (a lock held across a norm)."""


class Strand:
    """What the two kinds share: where it is, what it contributes there, how it ended."""

    alone = True
    """Whether nothing else runs until its forward has ended."""
    passes_on = False
    """Whether what its forward leaves in the model matters to the next chunk's."""

    def __init__(self, chunk: Chunk, norms: Norms) -> None:
        self.chunk, self.norms = chunk, norms
        self.place: Place | None = None
        self.route: list[Place] = []
        self.done = False
        self.error: BaseException | None = None
        self.sums: SampleSums | None = None
        self.x: Tensor | None = None
        self.mask: Tensor | None = None

    def resume(self, stats: Stats | None) -> None:
        """Go on with these statistics, to the next norm or the end; None at the start."""
        raise NotImplementedError

    def repeat(self) -> None:
        """Run as before, for what that leaves in the model."""

    def leave(self, *, gently: bool = False) -> None:
        """Nothing more is needed of this chunk: end its forward here, or ``gently`` at its end."""
        raise NotImplementedError

    def dismiss(self) -> None:
        """The same, without waiting."""

    def _arrive(self, seen: Seen, calls: dict[int, int]) -> Place:
        """Take what this chunk has to say about the norm's input."""
        key = seen.norm.key
        place = (key, calls[key])
        calls[key] += 1
        self.mask = mask_at(self.chunk, seen.x, seen.norm.path)
        self.sums = self.norms.sums(place, seen.x, self.chunk.samples, self.mask)
        self.x = seen.x
        return place


def contributions(strands: Sequence[Strand]) -> Moments:
    """What chunks parked at one place say together."""
    xs = [s.x for s in strands if s.x is not None]
    sums = [s.sums for s in strands if s.sums is not None]
    masks = [s.mask for s in strands] if any(s.mask is not None for s in strands) else None
    return pool(sums, xs, masks)


class ParkedStrand(Strand):
    """A forward that waits at each norm, on a replica of its own; only one of all runs at a time.

    What differs is how the turn is handed over: ``_go_on`` by the coordinator, ``_give_back`` by the forward.
    """

    alone = False

    def __init__(
        self,
        chunk: Chunk,
        replica: nn.Module,
        norms: Norms,
        turn: Turn,
        spilled: SpilledStrand | None = None,
        *,
        bounded: bool = False,
    ) -> None:
        super().__init__(chunk, norms)
        self._replica, self._turn = replica, turn
        self._device = norms_device(norms)
        self._stats: Stats | None = None
        self._leaving = self._gently = self._begun = False
        self._calls: dict[int, int] = defaultdict(int)
        self._spilled, self._bounded = spilled, bounded

    def resume(self, stats: Stats | None) -> None:
        """Go on; returns when the chunk is parked again, or done.

        Raises:
            StuckError: it is neither, and nothing moves.
        """
        self._begun = True
        self._stats, self.place, self.x, self.sums, self.mask = stats, None, None, None, None
        self._run_on()

    def leave(self, *, gently: bool = False) -> None:
        """End the forward where it is parked; one that is stuck is left behind (it can't write anything).

        ``gently``: it runs on to its end, so that it puts back and gives free what it took.
        """
        self._leaving, self._gently = True, gently
        with contextlib.suppress(StuckError):
            while self._begun and not self.done:  # set free by another one, it may just have parked
                self._run_on()
        self.x, self.sums, self.mask, self.place = None, None, None, None
        if isinstance(self.error, KeyboardInterrupt):  # it came while the forward was unwound
            error, self.error = self.error, None
            raise error

    def _go_on(self) -> None:
        """Let the forward have its turn, until it gives it back."""
        raise NotImplementedError

    def _give_back(self) -> None:
        """Wait in the middle of the forward for the next turn."""
        raise NotImplementedError

    def _run_on(self) -> None:
        """Let the forward go on, in its own surroundings, until it parks or ends."""
        mine = Turn.now(self._device)
        self._turn.put(self._device, mine.flags)
        try:
            self._go_on()
        finally:
            self._turn = Turn.now(self._device)
            mine.put(self._device, self._turn.flags)

    def _forward(self) -> None:
        """The whole forward, from its first turn to its end."""
        try:
            if not self._leaving:
                with Listener(self.norms, self._ask, self._spilled.watch if self._spilled else None):
                    self.chunk.run(self._replica)
        except Unwind:
            pass
        except BaseException as error:  # noqa: BLE001  # the user's forward; handed to the coordinator
            if not self._leaving or isinstance(error, KeyboardInterrupt):
                self.error = error
        finally:
            self.done, self.place, self.x, self.sums = True, None, None, None

    def _ask(self, seen: Seen) -> Stats | None:
        if self._leaving:
            return self._unwound()
        place = self._arrive(seen, self._calls)
        self.place = place
        self.route.append(place)
        del seen
        if self._spilled is not None:
            self._spilled.park()
        if self._bounded:  # takes time, and is worth it where somebody said how much memory there is
            give_back()
        self._give_back()
        return self._unwound() if self._leaving else self._stats

    def _unwound(self) -> Stats | None:
        if not self._gently:
            raise Unwind
        return None


class RerunStrand(Strand):
    """A forward of the plain model that is run again for each norm: nothing is parked.

    It runs to its end each time, since a forward that is cut short may leave locks taken and notes written. What the
    norms before were given stands in the buffers meanwhile, for code that reads them there. ``rewind``, of the first
    chunk, is called each time it begins: all chunks then make one pass, as a user would. Where one ``passes_on`` what
    it remembers, all of them run each time.
    """

    def __init__(
        self,
        chunk: Chunk,
        model: nn.Module,
        norms: Norms,
        turn: Turn,
        using: Using,
        rewind: Callable[[], None] | None = None,
        *,
        passes_on: bool = False,
    ) -> None:
        super().__init__(chunk, norms)
        self.passes_on = passes_on
        self._model, self._turn, self._using, self._rewind = model, turn, using, rewind
        self._given: list[Stats | None] = []
        self._device = norms_device(norms)
        self.forwards = 0

    def resume(self, stats: Stats | None) -> None:
        """Run anew, and listen at the next norm that has no statistics yet."""
        if self.place is not None:
            self._given.append(stats)
        self._run()

    def repeat(self) -> None:
        """Run anew, to where it is."""
        was = self.place
        if was is not None:
            self.route.pop()
        self.done = False
        self._run()
        if self.error is None and self.place != was:
            self.error = CalibrationError("the forward takes another way each time it runs")

    def _run(self) -> None:
        self.place, self.sums, self.x, self.mask = None, None, None, None
        number = -1
        calls: dict[int, int] = defaultdict(int)

        def ask(seen: Seen) -> Stats | None:
            nonlocal number
            number += 1
            if number < len(self._given):
                if seen.norm.key != self.route[number][0]:
                    raise CalibrationError(f"the forward takes another way each time it runs, here to {seen.norm.path}")
                calls[seen.norm.key] += 1
                return self._given[number]
            if self.place is None:
                self.place = self._arrive(seen, calls)
            return None

        if self._rewind is not None:
            self._rewind()
        mine = Turn.now(self._device)
        self._turn.put_all(self._device)
        known = {key: given for (key, _), given in zip(self.route, self._given, strict=True) if given is not None}
        try:
            with self._using(known), torch.no_grad(), Listener(self.norms, ask):
                self.chunk.run(self._model)
        except Exception as error:  # noqa: BLE001  # the user's forward; the coordinator names the chunk
            self.error = error
        finally:
            mine.put(self._device)
        self.forwards += 1
        if self.place is None:
            self.done = True
        else:
            self.route.append(self.place)

    def leave(self, *, gently: bool = False) -> None:
        """Nothing is parked."""
        self.x, self.sums = None, None
