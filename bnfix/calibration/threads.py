"""Forwards parked in threads: for models that change the surroundings of a thread around a norm."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from bnfix.calibration import patience
from bnfix.calibration.ambient import Ambient
from bnfix.calibration.strands import ParkedStrand, StuckError


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()  # a lock that any thread may release: ten times cheaper than a semaphore
    gate.acquire()
    return gate


def _open(gate: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # open already: an interrupt came between
        gate.release()


class ThreadStrand(ParkedStrand):
    """A forward in a thread of its own, which begins in the surroundings of the caller's."""

    def __init__(self, *args: Any, ambient: Ambient, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ambient = ambient
        self._go, self._back = _closed_gate(), _closed_gate()
        self._thread: threading.Thread | None = None

    def dismiss(self) -> None:
        """End it without waiting for it; a thread that is stuck stays behind as a daemon."""
        self._leaving, self._gently = True, False
        _open(self._go)

    def _go_on(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._ambient.run, args=(self._work,), daemon=True, name="bnfix")
            self._thread.start()
        _open(self._go)
        left: patience.Patience | None = None
        while not self._back.acquire(timeout=patience.LOOK):
            if left is None:
                left = patience.Patience(self._thread.ident if self._thread.is_alive() else None)
            if left.ended():
                raise StuckError(f"{self.chunk.where} waits for something that never comes")

    def _give_back(self) -> None:
        self._back.release()
        self._go.acquire()

    def _work(self) -> None:
        self._go.acquire()
        try:
            self._forward()
        finally:
            _open(self._back)
