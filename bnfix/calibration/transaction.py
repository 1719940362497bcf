"""The only place that writes statistics into a model: all of them or none, and back again."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bnfix.calibration.listening import Stats
from bnfix.calibration.norms import Norm, Norms
from bnfix.errors import CalibrationError
from bnfix.graph import find_owners
from bnfix.graph.writing import put, surely

_LEFT = 0.01
"""A share of the first values that is none to speak of."""


@dataclass
class Handle:
    """What was written where, and what stood there; ``done`` is False where nothing was written.

    ``copied``: that of a report that was pickled or copied.
    """

    done: bool = False
    copied: bool = False
    _entries: list[tuple[str, Tensor, Tensor, Tensor]] = field(default_factory=list)
    _model: Callable[[], nn.Module | None] = lambda: None
    _owners: tuple[Callable[[], nn.Module | None], ...] = ()  # one an entry

    def _elsewhere(self) -> list[str]:
        """Names of which the model holds another tensor by now.

        Where it was but a wrapper and is gone, the modules with its norms are asked; what is gone with them is not
        missed: who has the tensors then (a state dict) wants them as they were.
        """
        model = self._model()
        alone = [model] * len(self._entries) if model is not None else [find() for find in self._owners]
        held = {id(m): set(find_owners(m).tensors) for m in alone if m is not None}
        pairs = zip(self._entries, alone, strict=True)
        return [name for (name, tensor, _, _), m in pairs if m is not None and id(tensor) not in held[id(m)]]

    def write(self) -> None:
        """All or nothing, Ctrl-C included: until the caller's next line, :meth:`take_back` knows of it."""
        self.done = True
        _write([(tensor, now, before) for _, tensor, before, now in self._entries])

    def take_back(self) -> None:
        """What stood there, whatever stands there now; nothing where nothing was written."""
        if self.done:
            surely(lambda: _write([(tensor, before, now) for _, tensor, before, now in self._entries]))
            self.done = False

    def __reduce__(self) -> tuple[type[Handle], tuple[bool, bool]]:
        """A report that is pickled or copied is to be read: the model belongs to the first."""
        return Handle, (False, self.done or self.copied)

    def undo(self) -> None:
        """Write back what stood there.

        Raises:
            CalibrationError: nothing is written now, or it has moved since: then nothing is changed.
        """
        if self.copied:
            raise CalibrationError(
                "this is a copy of the report, which has no hold of the model", hint="undo the original"
            )
        if not self.done:
            raise CalibrationError("nothing of this recalibration is in the model, so there is nothing to undo")
        if gone := self._elsewhere():
            raise CalibrationError(
                f"{gone[0]} is another tensor by now: undo can't reach it",
                hint="undo first, then convert the model or take layers out of it",
            )
        moved = [name for name, tensor, _, now in self._entries if not _same(tensor, now)]
        if moved:
            raise CalibrationError(
                f"{moved[0]} has changed since ({len(moved)} of {len(self._entries)} buffers): undo would lose that",
                hint="load the checkpoint from before the recalibration",
            )
        _write([(tensor, before, now) for _, tensor, before, now in self._entries])
        self.done = False


def prepared(norms: Norms, stats: Mapping[int, Stats], batches: int, counts: Mapping[int, int]) -> Handle:
    """What writes ``stats`` (by key) into the buffers of ``norms``, and takes it back.

    ``num_batches_tracked`` stays, except where it would deny what is stored now (:func:`_counted`) or ``counts``, the
    largest of all ranks, are others.
    """
    entries: list[tuple[str, Tensor, Tensor, Tensor]] = []
    owners: list[Callable[[], nn.Module | None]] = []
    for norm in norms:
        if norm.key not in stats:
            continue
        pairs = [("running_mean", norm.mean, stats[norm.key][0]), ("running_var", norm.var, stats[norm.key][1])]
        counted = _counted(norm, counts.get(norm.key, 0), batches)
        if norm.tracked is not None and counted != int(norm.tracked):
            pairs.append(("num_batches_tracked", norm.tracked, torch.full_like(norm.tracked, counted)))
        path = f"{norm.path}." if norm.path else ""
        entries += [(f"{path}{name}", tensor, tensor.detach().clone(), now) for name, tensor, now in pairs]
        owners += [weakref.ref(norm.module)] * len(pairs)
    return Handle(False, False, entries, weakref.ref(norms.model), tuple(owners))


def _counted(norm: Norm, before: int, batches: int) -> int:
    """What ``num_batches_tracked`` is to be.

    0 becomes ``batches``: with momentum=None the next training batch would otherwise count for all. With a momentum α,
    n updates leave (1 − α)ⁿ of the first values: a small n says that most of the statistics is still mean 0 and
    variance 1 (BN203), which is not so any more. It becomes that n for which nothing to speak of is left; torch itself
    reads it with momentum=None alone.
    """
    momentum = getattr(norm.module, "momentum", None)
    settled = 0
    if isinstance(momentum, (int, float)) and 0 < momentum < 1 and (1 - momentum) ** before > _LEFT:
        settled = math.ceil(math.log(_LEFT) / math.log(1 - momentum))
    return max(before or batches, settled)


def _write(changes: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """(tensor, what it becomes, what it was): written, or as it was."""
    written = 0
    try:
        for tensor, value, _ in changes:
            written += 1
            put(tensor, value)
    except BaseException:

        def back() -> None:
            for tensor, _, before in changes[:written]:
                put(tensor, before)

        surely(back)
        raise


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a, b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())
