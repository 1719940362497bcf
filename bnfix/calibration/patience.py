"""How long a forward may do nothing before it counts as stuck."""

from __future__ import annotations

import time

PATIENCE = 5.0
"""Seconds without any work done after which a chunk that neither parks nor ends is stuck."""
MORE_PATIENCE = 30.0
"""The same where its thread does nothing but other threads of the process work."""
LOOK = 0.25
"""Seconds between two looks at a chunk that runs."""


class Patience:
    """Looks at one thread every :data:`LOOK` seconds, until it has done nothing for too long.

    Args:
        thread: its identifier; None where it can't be told yet.
    """

    def __init__(self, thread: int | None) -> None:
        clocked = thread is not None and hasattr(time, "pthread_getcpuclockid")
        self._timer = time.pthread_getcpuclockid(thread) if clocked else None  # type: ignore[arg-type]
        self.start()

    def start(self) -> None:
        """From now on."""
        self._own, self._process, self._waited = self._clock(), time.process_time(), 0.0

    def ended(self) -> bool:
        """Whether that was one look too many."""
        now = self._clock()
        self._waited += LOOK  # not by the clock: a process that was stopped for an hour has waited for one look
        if now - self._own > 0.02 * self._waited:  # it works
            self.start()
            return False
        # Others may work for it, or for something else altogether.
        idle = time.process_time() - self._process <= 0.02 * self._waited
        return self._waited > (PATIENCE if idle else MORE_PATIENCE)

    def _clock(self) -> float:
        """CPU time of the thread, or of the process where that can't be told."""
        if self._timer is None:
            return time.process_time()
        try:
            return time.clock_gettime(self._timer)
        except OSError:  # it has just ended
            return 0.0
