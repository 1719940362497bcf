"""Several processes that hold shards of the same data: every figure is exchanged, all end with the same bits.

Each exchange begins with a *head* of fixed size, in which a rank says what it is about to exchange, or that it has
failed and why. So a failure, wherever it happens (in the loader, between two exchanges, by Ctrl-C), reaches the
others at their next exchange, whichever that is: none waits for one that has given up.
"""

from __future__ import annotations

import math
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnfix.calibration.courier import LOOK, Courier, Parcel
from bnfix.calibration.messages import Head, Kind
from bnfix.errors import CalibrationError
from bnfix.stats import Moments, merge_all

PATIENCE = 30.0
"""Seconds after which a rank that waits for the others to begin says so."""
SOON = 2.0
"""The same for one that was interrupted, and waits for the others to tell them."""


WAITS = (
    "waits for the others: every rank has to call recalibrate, each with its share of the data; for this process "
    "alone:  group=False"
)
TELLS = "has failed, and waits for the others to tell them; Ctrl-C once more leaves at once"


class Ranks:
    """This process alone."""

    world, rank = 1, 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong inside on one rank goes wrong on all, and all leave together."""
        yield

    def alike(self, facts: Mapping[str, object]) -> None:
        """Make sure that all ranks were asked for the same.

        Raises:
            CalibrationError: a fact differs; names it, and the ranks.
        """

    def all_of(self, value: Any) -> list[Any]:
        """What each rank says (anything that can be pickled), in rank order."""
        return [value]

    def numbers(self, values: Sequence[int]) -> list[list[int]]:
        """The same for a few integers: cheaper."""
        return [list(values)]

    def each(self, value: int) -> list[int]:
        """One integer of each rank, in rank order."""
        return [said[0] for said in self.numbers([value])]

    def merged(self, moments: Moments) -> Moments:
        """The moments of all ranks, merged in rank order; the same bits on each."""
        return moments

    def agree(self, error: BaseException | None = None) -> None:
        """All ranks go on, or none does.

        Raises:
            BaseException: this rank's own error.
            CalibrationError: another rank's; names it.
        """
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, and with it all activations

    @contextmanager
    def or_undone(self, undo: Callable[[], None]) -> Iterator[None]:
        """``undo()`` unless the block succeeds on all ranks; the last exchange inside :meth:`together`."""
        try:
            yield
        except BaseException:
            undo()
            raise


@dataclass
class _Flight:
    """A collective under way, and what follows from it; both may come about twice."""

    parcel: Parcel
    then: Callable[[list[Tensor]], None]


class Group(Ranks):
    """The ranks of a ``torch.distributed`` process group."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.device = _device(group)
        self._courier = Courier(group, self.device)
        self._flight: _Flight | None = None
        self._heads: list[Head] = []
        self._owed = 0  # bytes that all ranks have agreed to exchange next
        self._over = False  # all ranks know how it ended: nothing more is exchanged

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong inside on one rank goes wrong on all, and all leave together.

        Raises:
            BaseException: this rank's own error.
            CalibrationError: another rank's, or another rank is gone; each names it.
        """
        try:
            self._exchange(Kind.JOIN)
            yield
            if not self._over:
                self._exchange(Kind.CLOSE)
        except BaseException as error:
            self._tell(error)
            raise
        finally:
            self._courier.end()

    def alike(self, facts: Mapping[str, object]) -> None:
        """Make sure that all ranks were asked for the same."""
        said = self.all_of({name: str(value) for name, value in facts.items()})
        for name, value in said[0].items():
            other = next((rank for rank, them in enumerate(said) if them[name] != value), None)
            if other is not None:
                raise CalibrationError(
                    f"the ranks were asked for different things: {name} is {value} on rank 0, "
                    f"{said[other][name]} on rank {other}"
                )

    def all_of(self, value: Any) -> list[Any]:
        """What each rank says, in rank order."""
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        found = [said.cpu().numpy().tobytes() for said in self._exchange(Kind.OBJECT, payload=packed)]
        if not all(any(said) for said in found):  # a rank that failed in between sends zeros
            self.agree()
        return [pickle.loads(said) for said in found]

    def numbers(self, values: Sequence[int]) -> list[list[int]]:
        """The same for a few integers."""
        self._exchange(Kind.NUMBERS, values)
        return [list(said.values) for said in self._heads]

    def merged(self, moments: Moments) -> Moments:
        """The moments of all ranks, merged in rank order."""
        home, channels = moments.mean.device, moments.mean.numel()
        shards = self._exchange(Kind.MOMENTS, payload=moments.packed().view(torch.uint8))
        return merge_all([Moments.unpack(said.view(torch.float64).to(home), channels) for said in shards])

    def agree(self, error: BaseException | None = None) -> None:
        """All ranks go on, or none does."""
        try:
            if error is not None:
                self._tell(error)
                raise error
        finally:
            del error
        self._exchange(Kind.AGREE)

    @contextmanager
    def or_undone(self, undo: Callable[[], None]) -> Iterator[None]:
        """``undo()`` unless the block succeeds on all ranks; the last exchange inside :meth:`together`."""
        try:
            yield
            self._exchange(Kind.CLOSE)
        except BaseException:
            # Ctrl-C in the last exchange: where it succeeded, the others have kept what they wrote.
            self._quietly(self._land)
            if any(h.kind is not Kind.CLOSE for h in self._heads):
                undo()
            raise

    def _exchange(self, kind: Kind, values: Sequence[int] = (), payload: Tensor | None = None) -> list[Tensor]:
        """What each rank's ``payload`` (bytes) is; the heads are kept.

        Raises:
            CalibrationError: a rank failed, is gone, or is about to exchange something else.
        """
        size = 0 if payload is None else payload.numel()
        self._collect(Head(kind, size, values).packed(), self._read, joining=kind is Kind.JOIN)
        self._check(kind)
        if payload is None:
            return []
        mine = torch.zeros(self._owed, dtype=torch.uint8, device=self.device)
        mine[:size] = payload
        found = self._collect(mine, self._paid)
        return [said[: h.size] for said, h in zip(found, self._heads, strict=True)]

    def _read(self, found: list[Tensor]) -> None:
        self._heads = [Head.unpack(said) for said in torch.stack(found).cpu()]
        kinds = {h.kind for h in self._heads}
        self._over = Kind.FAILED in kinds or len(kinds) > 1 or kinds == {Kind.CLOSE}
        self._owed = 0 if self._over else max(h.size for h in self._heads)

    def _paid(self, _: list[Tensor]) -> None:
        self._owed = 0

    def _check(self, kind: Kind) -> None:
        failed = [(rank, h.text) for rank, h in enumerate(self._heads) if h.kind is Kind.FAILED]
        if failed:
            which = ", ".join(str(rank) for rank, _ in failed)
            raise CalibrationError(
                f"rank{'s' * (len(failed) > 1)} {which} of {self.world} failed, so every rank's model is as it was: "
                f"{failed[0][1]}"
            )
        if len({(h.kind, len(h.values), h.size if kind is Kind.MOMENTS else 0) for h in self._heads}) > 1:
            self._over = True
            raise CalibrationError(
                "the ranks went different ways; every rank's model is as it was",
                hint="the model and all arguments but the data have to be the same on all ranks",
            )

    def _collect(self, mine: Tensor, then: Callable[[list[Tensor]], None], *, joining: bool = False) -> list[Tensor]:
        parcel = Parcel(mine.to(self.device))
        self._flight = _Flight(parcel, then)
        if joining:
            try:
                self._land(PATIENCE, WAITS)
            except BaseException as error:
                self._leave_word(parcel, error)
                raise
        else:
            self._land()
        return parcel.found

    def _land(self, patience: float = math.inf, word: str = "") -> None:
        """Wait for the collective under way, if any, and say ``word`` if it takes long; may be called twice.

        Raises:
            CalibrationError: another rank is gone.
        """
        flight = self._flight
        if flight is None:
            return
        parcel = flight.parcel
        self._courier.send(parcel)
        said = time.monotonic() + patience
        while not parcel.wait(LOOK):
            if time.monotonic() > said:
                said = math.inf
                warnings.warn(f"rank {self.rank} of {self.world} {word}", stacklevel=2)
        if parcel.error is not None:
            self._over, self._flight = True, None
            raise CalibrationError(
                f"rank {self.rank} of {self.world} lost the others; its model is as it was: {parcel.error}",
                hint="see what the first rank that ended has to say",
            ) from parcel.error
        flight.then(parcel.found)
        self._flight = None

    def _leave_word(self, parcel: Parcel, error: BaseException) -> None:
        """Not to begin, after all: the others hear of it when they come, however long that takes."""
        if not self._over:
            self._courier.send(parcel)
            parcel.begins(SOON)
            self._courier.leave(Head.of(error).packed().to(self.device))
        self._over, self._flight = True, None

    def _tell(self, error: BaseException) -> None:
        """Tell the others, at the exchange that they are at or come to, that this rank has failed."""

        def told() -> None:
            self._land(SOON, TELLS)
            if self._owed and not self._over:
                self._collect(torch.zeros(self._owed, dtype=torch.uint8), self._paid)
            if not self._over:
                self._collect(Head.of(error).packed(), self._read)

        self._quietly(told)
        self._over = True

    def _quietly(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (RuntimeError, ValueError, CalibrationError):  # the others are gone; there is an error to raise already
            self._over, self._flight = True, None


def _device(group: Any) -> torch.device:
    """Where tensors have to be for a group's collectives: on the CPU wherever it takes them there."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return torch.device("cpu") if "cpu" in kinds else torch.device(kinds[0], torch.accelerator.current_device_index())


def ranks_of(group: Any) -> Ranks:
    """The ranks that take part: those of ``group``, of the default group where one is set up, or this process alone.

    ``False`` means this process alone in any case.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: this process is not in it.
    """
    if group is False:
        return Ranks()
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise ValueError("group= is given, but torch.distributed is not set up: init_process_group() first")
        return Ranks()
    if group is not None and not isinstance(group, dist.ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not in the group: call recalibrate on its members only")
        raise TypeError(f"group is a process group, None or False, not {type(group).__name__}")
    return Group(group) if dist.get_world_size(group) > 1 else Ranks()
