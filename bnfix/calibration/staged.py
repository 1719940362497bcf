"""All chunks go from norm to norm together: at each, their moments are merged and the norm gets its statistics.

Never a deadlock: whatever routes the chunks take, as long as one is unfinished, some place has chunks parked, and
the place with the fewest norms before it is served. A norm that other chunks reach only later is iterated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from bnfix.calibration.chunks import Chunk
from bnfix.calibration.ledger import Ledger
from bnfix.calibration.norms import Norm
from bnfix.calibration.ranks import Ranks
from bnfix.calibration.strands import Place, Strand, StuckError, Unwind, contributions
from bnfix.errors import BnfixError, CalibrationError, one_line
from bnfix.stats import Moments

T = TypeVar("T")
Watch = Callable[[Place, Sequence[Strand]], None]
_DONE, _PARKED, _STUCK, _FULL = range(4)


class MemoryFullError(RuntimeError):
    """The device has no memory left for all chunks at once."""


class FailedError(StuckError):
    """The user's forward failed in one of several threads: ``told`` says where, and ``chunk`` alone may well run."""

    def __init__(self, chunk: Chunk, told: BnfixError) -> None:
        super().__init__(told.message)
        self.chunk, self.told = chunk, told


class ElsewhereError(StuckError):
    """It was not on this rank that chunks waited for one another, or failed."""


class Run:
    """One run of all chunks over all norms.

    Args:
        strands: the chunks of this rank; may be none where there are several ranks.
        ledger: takes what is measured, gives what norms are normalised with.
        order: where each place came in a forward that was watched before: of several places with parked chunks the
            earliest is served first, unknown ones before all, so that chunks on a side route catch up with others.
        stop: end the chunks behind the last norm: the first one runs to its end, and the others are ended where it
            met no more norms, as long as all chunks went the same way so far.
        watch: called at each place with the chunks parked there, before they go on.
    """

    def __init__(
        self,
        strands: Sequence[Strand],
        ledger: Ledger,
        ranks: Ranks,
        *,
        order: Mapping[Place, int] | None = None,
        stop: bool = False,
        watch: Watch | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.strands, self.ledger, self.ranks = strands, ledger, ranks
        self.order = order or {}
        self.stop, self.watch, self.progress = stop, watch, progress
        self._error: BaseException | None = None
        self._outer = sys.exc_info()[1]
        self._served = 0

    def through(self) -> None:
        """Bring every chunk to its end.

        Raises:
            CalibrationError: a chunk, or another rank, failed.
            StuckError: the chunks wait for one another, or one failed among the others.
            MemoryFullError: out of memory. In each case all forwards are unwound, on all ranks.
        """
        try:
            self._attempt(lambda: self._advance(self.strands, first=True))
            while (place := self._next()) is not None:
                norm = self.ledger.norms.by_key(place[0])
                self._served += 1
                if self.progress is not None:
                    of = f" of {len(self.order)}" if self._served <= len(self.order) else ""
                    self.progress(f"norm {self._served}{of}: {norm.path or '(root)'}")
                here = [s for s in self.strands if s.place == place]
                said = self._attempt(lambda here=here, place=place: self._contribution(here, place))  # type: ignore[misc]
                merged = self.ranks.merged(said or Moments.empty(norm.channels, norm.mean.device))
                self._settle(norm, place, merged, here)
        except (StuckError, MemoryFullError):
            self._leave(gently=True)  # there will be another attempt: it must not find locks taken
            raise
        except Unwind as unwound:  # out of a forward that is none of the strands': Ctrl-C came as torch left a mode
            raise KeyboardInterrupt from unwound
        finally:
            self._leave()

    def _leave(self, *, gently: bool = False) -> None:
        staying = list(self.strands)
        try:
            while staying:
                staying[0].leave(gently=gently)
                del staying[0]
        finally:
            for strand in staying:  # interrupted once more
                strand.dismiss()

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """``work()``; that it can't be done in this way is kept for :meth:`_next`, where all ranks hear of it."""
        try:
            with memory():
                return work()
        except (StuckError, MemoryFullError) as error:
            if self.ranks.world == 1:
                raise
            self._error = error
            return None

    def _next(self) -> Place | None:
        """The place to be served, agreed on by all ranks; None when all chunks of all ranks are done."""
        at = [(self.order.get(s.place, -1) + 1, len(s.route), *s.place) for s in self.strands if s.place is not None]
        mine = (_DONE, 0, 0, 0, 0, 0)
        if self._error is not None:
            mine = (_STUCK if isinstance(self._error, StuckError) else _FULL, 0, 0, 0, 0, 0)
        elif at:
            here = min(at)
            mine = (_PARKED, *here, self.ledger.norms.by_key(here[2]).var_key)
        said = self.ranks.numbers(mine)
        states = {s[0] for s in said}
        if _FULL in states:  # the same on all ranks, whatever else is wrong on some
            raise self._error if isinstance(self._error, MemoryFullError) else MemoryFullError("another rank")
        if _STUCK in states:
            raise self._error or ElsewhereError("another rank")
        parked = [tuple(s[1:]) for s in said if s[0] == _PARKED]
        if not parked:
            return None
        _, _, key, call, var_key = min(parked)
        self.ledger.norms.meet(key, var_key)
        return key, call

    def _contribution(self, here: Sequence[Strand], place: Place) -> Moments | None:
        if not here:
            return None
        if self.watch is not None:
            self.watch(place, here)
        return contributions(here)

    def _settle(self, norm: Norm, place: Place, merged: Moments, here: Sequence[Strand]) -> None:
        try:
            stats = self.ledger.settle(norm, place, merged)
        except CalibrationError as error:
            where = min((w for s in here if (w := not_finite(s))), key=_number, default="")
            if self.ranks.world > 1:  # all ranks come here: they have the same moments
                said = self.ranks.all_of(where)
                where = next((f"rank {rank}, {w}" for rank, w in enumerate(said) if w), "")
            raise CalibrationError(f"{where}{error.message}", hint=error.hint) from None
        self._attempt(lambda: self._advance(here, stats))

    def _advance(self, strands: Sequence[Strand], stats: object = None, *, first: bool = False) -> None:
        # The chunk that parked last goes on first: what it left is still in the cache. Plain forwards keep their order.
        onward = self.stop or self._served % 2 == 0 or any(s.alone for s in strands)
        turns = strands if onward else strands[::-1]
        if any(s.passes_on for s in strands):
            self._pass(strands, stats)
            return
        for number, strand in enumerate(turns):
            if number and self.stop and not first and self._last(strands[0]):
                strand.leave()
                strand.done, strand.place = True, None
                continue
            strand.resume(stats)  # type: ignore[arg-type]
            if strand.error is not None:
                raise self._failure(strand)

    def _pass(self, strands: Sequence[Strand], stats: object) -> None:
        """All chunks in their order: each begins with what the one before it left in the model."""
        for strand in self.strands:
            if strand in strands:
                strand.resume(stats)  # type: ignore[arg-type]
            else:
                strand.repeat()
            if strand.error is not None:
                raise self._failure(strand)

    def _failure(self, strand: Strand) -> BaseException:
        error, strand.error = strand.error, None  # its traceback holds on to the strand, and to all activations
        assert error is not None
        if not isinstance(error, KeyboardInterrupt) and _interrupted(error, self._outer):
            return KeyboardInterrupt()
        told = _told(strand, error, self.ledger)
        if isinstance(told, BnfixError) and not isinstance(error, BnfixError) and not strand.alone:
            return FailedError(strand.chunk, told)
        return told

    def _last(self, ahead: Strand) -> bool:
        """Whether the norm just left was the last: the chunk ahead met no other, and no chunk ever went another way."""
        return ahead is self.strands[0] and ahead.done and all(s.route == ahead.route for s in self.strands)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of somebody else's says that there is no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "start new thread" in str(error))
    )


@contextmanager
def memory() -> Iterator[None]:
    """Whatever says inside that there is no memory left becomes a :class:`MemoryFullError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryFullError) or not out_of_memory(error):
            raise
        raise MemoryFullError(one_line(error)) from error


def _interrupted(error: BaseException | None, outer: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an exception: what it left undone made others fail on the way out.

    Not one before ``outer``, which the caller was dealing with already: many recalibrate when a training was stopped.
    """
    while error is not None and error is not outer and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None and error is not outer


@contextmanager
def forward_of(chunk: Chunk, behind: Callable[[], str] = lambda: "") -> Iterator[None]:
    """What fails inside names the batch: a :class:`CalibrationError`, or a :class:`MemoryFullError`.

    ``behind`` names the last norm that it came by, if any.
    """
    outer = sys.exc_info()[1]
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{chunk.where}: {error.message}", hint=error.hint) from None
    except Exception as error:  # whatever the user's own forward raises
        if isinstance(error, MemoryFullError):
            raise
        if _interrupted(error, outer):
            raise KeyboardInterrupt from error
        if out_of_memory(error):
            told = f"{chunk.where}: out of memory in the forward of {chunk.samples:,} samples: {one_line(error)}"
            raise MemoryFullError(told) from error
        last = f" behind {path}" if (path := behind()) else ""
        raise CalibrationError(f"{chunk.where}: the forward failed{last}: {one_line(error)}") from error


def not_finite(strand: Strand) -> str:
    """Which of the loader's batches brought NaN or Inf to where the strand is parked; empty if none did."""
    if strand.sums is None:
        return ""
    bad = (~torch.isfinite(strand.sums.s + strand.sums.q)).any(1).nonzero().flatten().tolist()
    return f"{strand.chunk.batch_of(bad, strand.sums.s.shape[0])}: " if bad else ""


def _number(where: str) -> int:
    """The first in "batch 3: ", "batches 3 to 5: "."""
    return int(next((word.strip(":") for word in where.split() if word.strip(":").isdigit()), "0"))


def _told(strand: Strand, error: BaseException, ledger: Ledger) -> BaseException:
    """What went wrong in a chunk, with its batch and its layer."""
    if out_of_memory(error):
        full = MemoryFullError(one_line(error))
        full.__cause__ = error
        return full
    if not isinstance(error, Exception) or isinstance(error, StuckError):
        return error
    if isinstance(error, BnfixError):
        return CalibrationError(f"{strand.chunk.where}: {error.message}", hint=error.hint)
    behind = f" behind {ledger.norms.by_key(strand.route[-1][0]).path}" if strand.route else ""
    told = CalibrationError(f"{strand.chunk.where}: the forward failed{behind}: {one_line(error)}")
    told.__cause__ = error
    return told
