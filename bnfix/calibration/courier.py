"""Collectives in a thread of their own.

Ctrl-C comes between two lines of Python. Where it comes between the one that begins a collective and the one that keeps
it in mind, this rank is one collective behind the others from then on: they wait for one another, or gloo ends the
process. It never comes in another thread than the main one.
"""

from __future__ import annotations

import _thread
import queue
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOOK = 0.5
"""Seconds between two looks at whether to say that others are waited for."""
SHORT = 0.005
"""Seconds between two looks at whether a collective has begun."""
_LEFT: list[Any] = []
"""Collectives that nobody waits for any more; their tensors have to stay."""


class Parcel:
    """One gathering of a tensor of one shape from all ranks; ``found`` holds them, in rank order, once it is done."""

    def __init__(self, mine: Tensor) -> None:
        self.mine = mine
        self.found: list[Tensor] = []
        self.error: Exception | None = None
        self.taken = self.begun = self.done = False
        self._here = _thread.allocate_lock()
        self._here.acquire()

    def wait(self, seconds: float) -> bool:
        """Until it is there, or so many seconds; whether it is.

        No threading.Event: Ctrl-C in the middle of its wait leaves its lock taken, and who sets it waits for ever.
        """
        if not self.done:
            self._here.acquire(timeout=seconds)
        return self.done

    def begins(self, seconds: float) -> None:
        """Wait until it is under way."""
        last = time.monotonic() + seconds
        while not self.begun and time.monotonic() < last:
            time.sleep(SHORT)

    def arrived(self) -> None:
        """It is there; in the courier's thread."""
        self.begun = self.done = True
        self._here.release()


class Courier:
    """Brings parcels of one process group, one after the other, in the order in which they are sent first."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device, self._world = group, device, dist.get_world_size(group)
        self._queue: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        _thread.start_new_thread(self._work, ())

    def send(self, parcel: Parcel) -> None:
        """Bring it; once, however often it is sent."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._queue.put(parcel)

    def leave(self, mine: Tensor) -> None:
        """Say this behind what is under way, and wait for nobody."""
        found = self._room(mine)
        _LEFT.append((found, mine, dist.all_gather(found, mine, group=self._group, async_op=True)))

    def end(self) -> None:
        """There are no more."""
        self._queue.put(None)

    def _room(self, mine: Tensor) -> list[Tensor]:
        return [torch.empty_like(mine) for _ in range(self._world)]

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (parcel := self._queue.get()) is not None:
            if parcel.taken:
                continue
            parcel.taken = True
            try:
                found = self._room(parcel.mine)
                work = dist.all_gather(found, parcel.mine, group=self._group, async_op=True)
                parcel.begun = True
                work.wait()
                if self._device.type == "cuda":  # wait() holds up this thread's stream alone
                    torch.cuda.current_stream(self._device).synchronize()
                parcel.found = found
            except Exception as error:  # noqa: BLE001  # whatever a backend raises; who waits for it is told
                parcel.error = error
            finally:
                parcel.arrived()
