"""Forwards parked in fibers: all in the caller's own thread, each on a stack of its own (greenlet).

What one chunk frees, the next takes while it is still in the cache: threads have a heap each, and one of some
dozens of threads finds its own cold. It comes to a third of the time of a MobileNet. The price: they share all that
belongs to a thread (see ``footing``). What enters autocast, a mode or another stream around a norm parks in threads.
"""

from __future__ import annotations

import contextlib
import contextvars
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

from greenlet import getcurrent, greenlet

from bnfix.calibration import patience
from bnfix.calibration.ambient import surroundings
from bnfix.calibration.footing import Way, way_here
from bnfix.calibration.strands import ParkedStrand, StuckError
from bnfix.running import modes_of_thread, set_modes


class NoFootingError(StuckError):
    """A forward is where it can't be left in a thread that others use."""


class FiberStrand(ParkedStrand):
    """A forward in a fiber of the caller's thread."""

    def __init__(self, *args: Any, guard: Guard, ways: frozenset[Way], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard, self._ways = guard, ways
        self._fiber: greenlet | None = None
        self._around = surroundings(self._device)

    def dismiss(self) -> None:
        """End it now: a fiber that nobody holds is unwound."""
        self._leaving, self._gently = True, False
        self._fiber = None

    def _go_on(self) -> None:
        if self._fiber is None:
            self._modes = modes_of_thread()
            self._coordinator = getcurrent()
            self._fiber = greenlet(self._forward)
            self._fiber.gr_context = contextvars.copy_context()
        fiber = self._fiber
        try:
            with self._guard:
                fiber.switch()
        finally:
            if fiber.dead:  # also where Ctrl-C came before its first line
                self.done, self.place, self._fiber = True, None, None
                set_modes(self._modes)
        if self._guard.fired():
            self.error = None
            raise StuckError(f"{self.chunk.where} waits for something that never comes")

    def _give_back(self) -> None:
        if way_here() not in self._ways or surroundings(self._device) != self._around:
            raise NoFootingError(f"{self.chunk.where} takes a way that was not seen before")
        self._coordinator.switch()


class WaitedError(BaseException):
    """Leaves a wait in the user's forward; no ``except Exception`` of theirs stops it."""


def _raise(_number: int, _frame: object) -> None:
    raise WaitedError


class Guard:
    """Ends the wait of a fiber that waits for another one: it has the thread that the other would need.

    A wait in the main thread ends where a signal comes whose handler raises: SIGURG, which does nothing where nobody
    has asked for it. Active inside ``with``, as often as need be.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn, self._active, self._fired, self._ended = 0, False, False, threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="bnfix guard")

    def start(self) -> None:
        """From now on; whoever starts it sees to it beforehand that it ends."""
        signal.signal(signal.SIGURG, _raise)
        self._thread.start()

    @staticmethod
    def possible() -> bool:
        """Whether it could end a wait here: in the main thread, where nobody else uses its signal.

        Not before Python 3.11, where each call of a function is one of C: a fiber that is resumed from another depth
        than it was begun at has other frames below it than it had, and torch, which walks down the stack for each error
        that it raises, ends the process there.
        """
        return (
            sys.version_info >= (3, 11)
            and threading.current_thread() is threading.main_thread()
            and hasattr(signal, "SIGURG")
            and signal.getsignal(signal.SIGURG) is signal.SIG_DFL
        )

    def __enter__(self) -> None:
        self._turn += 1
        self._active = True

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._active = False

    def fired(self) -> bool:
        """Whether the wait just over was ended from here."""
        fired, self._fired = self._fired, False
        if fired:
            with contextlib.suppress(WaitedError):  # should it come only now
                time.sleep(0.01)
        return fired

    def end(self) -> None:
        """No more."""
        self._ended.set()
        try:
            if self._thread.is_alive():
                self._thread.join()
        finally:
            signal.signal(signal.SIGURG, signal.SIG_DFL)

    def _watch(self) -> None:
        left, turn = patience.Patience(self._main), 0
        while not self._ended.wait(patience.LOOK):
            if not self._active or turn != self._turn:
                turn = self._turn
                left.start()
            elif left.ended():
                with self._lock:
                    if self._active and turn == self._turn:
                        self._fired = True
                        signal.pthread_kill(self._main, signal.SIGURG)
                left.start()
