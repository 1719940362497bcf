"""The loader, one batch after the other, as chunks: bound, moved, looked at; its failures with the batch's number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from bnfix.calibration.chunks import Chunk, first_samples, splittable
from bnfix.calibration.values import hollow
from bnfix.errors import BnfixError, CalibrationError, PassError, one_line
from bnfix.running import Call, bind, check_finite, count, feeding, size
from bnfix.running.call import Forward, describe

Mask = str | Callable[[Any], Any] | None


class Reader:
    """One pass over ``data``.

    ``batches`` and ``samples`` count what was read, ``used`` says what of a batch went into the model, ``ended``
    that the data has no more, or that enough was read: then ``cut`` too. ``largest`` are the samples of the largest
    batch, ``counted`` says whether these numbers are more than a guess. ``pure`` counts batches whose labels are all
    alike, ``labels`` the different ones met; what the model takes as an input is no label. ``advice`` is for a forward
    that fails on batches like the first.
    """

    def __init__(
        self,
        data: Iterable[Any],
        model: nn.Module,
        forward: Forward | None = None,
        mask: Mask = None,
        max_samples: int | None = None,
    ) -> None:
        self._model, self._forward, self._mask = model, forward, mask
        self._max = max_samples
        self.batches = self.samples = self.largest = self.pure = 0
        self.used = self.advice = ""
        self.ended = self.cut = False
        self.counted = True
        self.labels: set[int] = set()
        self._copies = _may_overwrite(data)
        try:
            self._data: Iterator[Any] = iter(data)
        except TypeError as error:
            raise TypeError(f"data is what a training loop iterates over, not {type(data).__name__}: {error}") from None
        except Exception as error:  # a loader's own start, workers included
            raise CalibrationError(f"the data can't be gone through: {one_line(error)}") from error

    def __iter__(self) -> Iterator[Chunk]:
        while (chunk := self.next()) is not None:
            yield chunk

    def next(self) -> Chunk | None:
        """The next batch; None where there are no more, or ``max_samples`` have been read.

        Raises:
            CalibrationError: the loader raised; a batch is ambiguous, holds NaN or Inf, or has no mask.
        """
        if self.ended or (self._max is not None and self.samples >= self._max):
            self.cut = not self.ended
            self.ended = True
            return None
        try:
            batch = next(self._data)
        except StopIteration:
            self.ended = True
            return None
        except BnfixError as error:  # one of our own loaders, which knows what to do
            raise CalibrationError(f"the data failed {self._where()}: {error.message}", hint=error.hint) from error
        except Exception as error:  # whatever a dataset, its workers or a collate function raises
            raise CalibrationError(f"the data raised {self._where()}: {one_line(error)}") from error
        chunk = self._chunk(batch)
        if self._max is not None and self.samples + chunk.samples > self._max and splittable(chunk):
            chunk = first_samples(chunk, self._max - self.samples)
        self.batches += 1
        self.samples += chunk.samples
        self.largest = max(self.largest, chunk.samples)
        return chunk

    def samples_of(self, batch: Any) -> int:
        """How many samples a batch holds that is not its turn yet; as many as the largest where that can't be told."""
        try:
            return count(bind(batch, self._model, self._forward).call)
        except (BnfixError, NotImplementedError):  # will be met when its turn comes
            return self.largest

    def _where(self) -> str:
        return f"after batch {self.batches - 1}" if self.batches else "at its first batch"

    def _chunk(self, batch: Any) -> Chunk:
        number = self.batches
        try:
            bound = bind(batch, self._model, self._forward)
        except PassError as error:
            raise CalibrationError(f"batch {number}: {error.message}", hint=error.hint) from error
        except NotImplementedError as error:  # a meta tensor
            raise CalibrationError(f"batch {number} can't be brought to the model: {one_line(error)}") from error
        told = next(filter(None, map(hollow, bound.call.tensors())), "")
        if told:
            raise CalibrationError(f"batch {number} holds a tensor that {told}: it has no values")
        if not self.used:
            self.used = bound.used
            self.advice = "" if self._forward is not None else feeding(batch, bound.call, self._model)
        call = bound.call.private() if self._copies else bound.call
        bad = check_finite(call)
        if bad is not None:
            raise CalibrationError(
                f"batch {number} holds NaN or Inf ({bad})",
                hint="find out where it comes from: statistics keep it for ever",
            )
        samples = count(call)
        if samples == 0:
            shapes = ", ".join(describe(t) for t in call.tensors())
            raise CalibrationError(f"batch {number} is empty ({shapes})", hint="leave such batches out of the data")
        self.counted = self.counted and _is_counted(call)
        self._look_at_labels(batch, call)
        mask = self._masked(batch, call, number)
        if mask is not None and len(mask) != samples and size(call) is not None:
            raise CalibrationError(f"batch {number}: the mask has {len(mask)} rows, and the batch {samples} samples")
        return Chunk(call, samples, (number,) * samples, mask)

    def _masked(self, batch: Any, call: Call, number: int) -> Tensor | None:
        if self._mask is None:
            return None
        try:
            found = batch[self._mask] if isinstance(self._mask, str) else self._mask(batch)
        except Exception as error:  # the user's own function or mapping
            raise _no_mask(self._mask, batch, number, error) from error
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found)
        if not isinstance(found, Tensor) or found.dim() == 0:
            raise CalibrationError(f"batch {number}: the mask is no tensor (N, *positions), but {type(found).__name__}")
        device = next((t.device for t in call.tensors()), torch.device("cpu"))
        return found.to(device, torch.bool, copy=self._copies or callable(self._mask))  # it may fill one buffer

    def _look_at_labels(self, batch: Any, call: Call) -> None:
        values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
        labels = [v for v in values if isinstance(v, Tensor) and v.dim() == 1 and len(v) > 1 and v.dtype == torch.int64]
        if len(labels) == 1 and (call.forward is not None or not _goes_in(labels[0], call)):
            found = set(labels[0].tolist()) if len(labels[0]) < 10_000 else set()
            self.pure += len(found) == 1
            self.labels |= found if len(self.labels) < 1000 else set()


def _no_mask(mask: Any, batch: Any, number: int, error: Exception) -> CalibrationError:
    if not isinstance(mask, str):
        return CalibrationError(f"batch {number}: no mask: {one_line(error)}", hint="mask= is a function of the batch")
    if isinstance(batch, Mapping):
        keys = ", ".join(map(str, batch.keys()))
        return CalibrationError(f"batch {number}: no mask: {one_line(error)}", hint=f"the keys of a batch:  {keys}")
    given = "one tensor" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
    return CalibrationError(
        f"batch {number}: no mask: the batch is {given}, and mask={mask!r} is the key of a dict",
        hint=f"a mask needs batches such as {{'input': x, {mask!r}: m}}, m boolean, true where a position counts\n"
        f"from a file:  np.savez('data.npz', input=x, {mask if mask.isidentifier() else 'mask'}=m)",
    )


def _goes_in(labels: Tensor, call: Call) -> bool:
    return any(t.dtype == labels.dtype and torch.equal(t.to(labels.device), labels) for t in call.tensors())


def _is_counted(call: Call) -> bool:
    """Whether the number of its samples is known: not that of objects, or of what a ``forward`` finds in a batch."""
    tensors = call.tensors()
    return bool(tensors) and (call.forward is None or len({t.shape[:1] for t in tensors}) == 1)


def _may_overwrite(data: Any) -> bool:
    """Whether a batch could be written over with the next one: not in a list, nor by PyTorch's own collating.

    Workers send copies; a ``collate_fn`` of the user's may hand on one buffer, filled anew.
    """
    loader = torch.utils.data.DataLoader
    if isinstance(data, loader) and type(data).__iter__ is loader.__iter__:
        return data.num_workers == 0 and (data.batch_size is None or data.collate_fn is not default_collate)
    return getattr(type(data), "__iter__", None) not in (list.__iter__, tuple.__iter__)  # a list may make its own


def length(data: Any) -> int | None:
    """How many batches ``data`` has, where it says so."""
    try:
        return len(data)
    except Exception:  # noqa: BLE001  # a class of the user's, which may raise anything: what counts is what it gives
        return None
