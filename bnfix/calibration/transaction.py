"""The only place that writes statistics into a model: all of them or none, and back again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bnfix.calibration.listening import Stats
from bnfix.calibration.norms import Norms
from bnfix.errors import CalibrationError
from bnfix.graph import find_owners


@dataclass
class Handle:
    """What was written where, and what stood there; ``done`` is False where nothing was written."""

    done: bool = False
    _entries: list[tuple[str, Tensor, Tensor, Tensor]] = field(default_factory=list)
    _model: Callable[[], nn.Module | None] = lambda: None

    def undo(self) -> None:
        """Write back what stood there.

        Raises:
            CalibrationError: nothing is written now, or it has moved since: then nothing is changed.
        """
        if not self.done:
            raise CalibrationError("nothing of this recalibration is in the model, so there is nothing to undo")
        model = self._model()
        if model is not None:  # else it was but a wrapper: whoever has its layers has these tensors
            held = find_owners(model).tensors
            gone = [name for name, tensor, _, _ in self._entries if id(tensor) not in held]
            if gone:
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


def commit(norms: Norms, stats: Mapping[int, Stats], batches: int) -> Handle:
    """Write ``stats`` (by key) into the buffers of ``norms``: all or nothing, Ctrl-C included.

    ``num_batches_tracked`` stays, except that 0 becomes ``batches``: with momentum=None the next training batch would
    otherwise count for all.
    """
    entries: list[tuple[str, Tensor, Tensor, Tensor]] = []
    for norm in norms:
        if norm.key not in stats:
            continue
        pairs = [("running_mean", norm.mean, stats[norm.key][0]), ("running_var", norm.var, stats[norm.key][1])]
        if norm.tracked is not None and int(norm.tracked) == 0:
            pairs.append(("num_batches_tracked", norm.tracked, torch.full_like(norm.tracked, batches)))
        path = f"{norm.path}." if norm.path else ""
        entries += [(f"{path}{name}", tensor, tensor.detach().clone(), now) for name, tensor, now in pairs]
    _write([(tensor, now, before) for _, tensor, before, now in entries])
    return Handle(True, entries, weakref.ref(norms.model))


def _write(changes: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """(tensor, what it becomes, what it was): written, or as it was."""
    written = 0
    try:
        for tensor, value, _ in changes:
            written += 1
            put(tensor, value)
    except BaseException:
        for tensor, _, before in changes[:written]:
            put(tensor, before)
        raise


def put(tensor: Tensor, value: Tensor) -> None:
    """Write ``value`` into a tensor, also into one that was made in inference mode."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a, b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())
