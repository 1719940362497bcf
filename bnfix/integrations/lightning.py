"""Recalibration at the end of a Lightning fit, with ``lightning`` as with ``pytorch_lightning``.

::

    from bnfix.integrations.lightning import RecalibrateCallback

    trainer = Trainer(callbacks=[StochasticWeightAveraging(1e-2), RecalibrateCallback()])
    trainer.fit(module)
    trainer.save_checkpoint("final.ckpt")     # the statistics are those of the weights

Wherever it stands in the list, it runs behind all other callbacks but checkpoints: averaged weights
(``StochasticWeightAveraging``, ``WeightAveraging``, ``EMAWeightAveraging``) are in the module by then, and the copy
that ``WeightAveraging`` keeps for ``trainer.validate`` and for checkpoints gets the new statistics too. What
``ModelCheckpoint`` wrote during the fit, ``last.ckpt`` included, holds the statistics of its moment: save once more.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import bnfix
from bnfix.errors import BnfixError, CalibrationError, MissingDependencyError

if TYPE_CHECKING:
    from bnfix.types import Recalibration

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def _library() -> Any:
    """The library that is in use, else the one that is there: it has two names."""
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise MissingDependencyError("lightning", "lightning", "the Lightning callback")


_pl = _library()


class RecalibrateCallback(_pl.Callback):  # type: ignore[misc, name-defined]
    """Set the running statistics to those of the trained weights when a fit ends; under DDP, with all ranks' data.

    Whatever goes wrong then does not cost the training: the module is as training left it, a warning says why, and
    ``error`` keeps it.

    Args:
        data: what to recalibrate on, or a function of the trainer that returns it. Default: the training dataloader, as
            many batches of it as an epoch has, through the module's transfer hooks, with the augmentation that it has.
            Training data with the transform of evaluation are better. Under DDP each rank goes through its own
            ``data`` (the default is its share already; samples that Lightning repeats for shares of one size count
            twice).
        when: ``"needed"`` changes nothing unless the outputs change by more than chance, see
            :func:`bnfix.recalibrate`; ``"always"``.
        max_samples: stop reading there, on each rank.
        at: ``"train_end"``: on the device and in the process group of the training. ``"fit_end"``: behind
            ``LightningModule.on_train_end`` as well, where the module is back on the CPU.
        options: handed on to :func:`bnfix.recalibrate`. ``forward`` is needed where the module defines none.

    Attributes:
        report: what was done in the last fit; None before its end, or if it failed. With ``ddp_spawn`` it stays in the
            processes of the fit, and the module alone comes back.
        error: what went wrong.

    Raises:
        TypeError, ValueError: wrong arguments; at the start of a fit: the module has no forward, or is sharded.
    """

    def __init__(
        self,
        data: Iterable[Any] | Callable[[Any], Iterable[Any]] | None = None,
        *,
        when: Literal["always", "needed"] = "needed",
        max_samples: int | None = None,
        at: Literal["train_end", "fit_end"] = "train_end",
        **options: Any,
    ) -> None:
        super().__init__()
        if at not in ("train_end", "fit_end"):
            raise ValueError(f"at is 'train_end' or 'fit_end', not {at!r}")
        self.data, self.at = data, at
        self.options = {"when": when, "max_samples": max_samples, **options}
        inspect.signature(bnfix.recalibrate).bind(None, data, **self.options)
        self.report: Recalibration | None = None
        self.error: Exception | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse before the training what could only fail behind it, and stand behind whoever averages weights."""
        if stage != "fit":
            return
        self.report = self.error = None
        if type(trainer.strategy).__name__ in _SHARDED:
            raise ValueError("RecalibrateCallback does not work with models whose parameters are sharded")
        if self.options.get("forward") is None and _has_no_forward(pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no forward of its own to recalibrate with: "
                "RecalibrateCallback(forward=lambda module, batch: module.net(batch[0]))"
            )
        # Hooks run in the order of this list; Lightning keeps checkpoints at its end.
        last = [c for c in trainer.callbacks if any(kind.__name__ == "Checkpoint" for kind in type(c).__mro__)]
        first = [c for c in trainer.callbacks if c is not self and c not in last]
        trainer.callbacks = [*first, self, *last]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate ``pl_module`` unless that comes later."""
        if self.at == "train_end":
            self._recalibrate(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate ``pl_module`` unless that is done."""
        if self.at == "fit_end":
            self._recalibrate(trainer, pl_module)

    def _recalibrate(self, trainer: Any, pl_module: Any) -> None:
        from bnfix.render import to_concise

        say = importlib.import_module(f"{_pl.__name__}.utilities.rank_zero")
        try:
            with trainer.precision_plugin.forward_context(), _at_a_distance(trainer, pl_module):
                self.report = bnfix.recalibrate(pl_module, self._batches(trainer, pl_module), **self.options)
        except (BnfixError, TypeError, ValueError) as error:
            self.error = error
            say.rank_zero_warn(f"bnfix: not recalibrated, the module is as training left it: {error}")
            return
        if self.report.changed:
            _also_averaged(trainer, pl_module)
        say.rank_zero_info(f"bnfix: {to_concise(self.report).strip().splitlines()[-1]}")

    def _batches(self, trainer: Any, pl_module: Any) -> Iterable[Any]:
        if self.data is not None:
            return self.data(trainer) if callable(self.data) else self.data
        loader = trainer.train_dataloader
        if loader is None or isinstance(loader, (list, tuple, dict)):
            what = "no training dataloader" if loader is None else f"{len(loader)} training dataloaders"
            raise CalibrationError(f"the trainer has {what}", hint="RecalibrateCallback(data=loader)")
        return _Epoch(loader, trainer, pl_module.device)


class _Distant:
    """Answers as the trainer does, but is no way from the module to the trainer's loaders, callbacks and loops.

    bnfix looks at all that hangs on a module, to find norms in plain lists and to undo what a forward leaves behind.
    """

    __slots__ = ("_trainer",)

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._trainer(), name)


@contextlib.contextmanager
def _at_a_distance(trainer: Any, pl_module: Any) -> Iterator[None]:
    pl_module.trainer = _Distant(trainer)
    try:
        yield
    finally:
        pl_module.trainer = trainer


class _Epoch:
    """What an epoch of training iterates over, on the module's device."""

    def __init__(self, loader: Iterable[Any], trainer: Any, device: Any) -> None:
        self._loader, self._trainer, self._device = loader, trainer, device
        limit = trainer.num_training_batches
        self._limit = None if limit == float("inf") else int(limit)

    def __iter__(self) -> Iterator[Any]:
        strategy = self._trainer.strategy
        for batch in itertools.islice(self._loader, self._limit):
            yield strategy.batch_to_device(strategy.precision_plugin.convert_input(batch), self._device)

    def __len__(self) -> int:
        if self._limit is None:
            raise TypeError("a stream of unknown length")
        return self._limit


def _has_no_forward(pl_module: Any) -> bool:
    """Whether the forward is that of a base class, which only says that there is none."""
    bases = {"torch.nn.modules.module", *(f"{name}.core.module" for name in _NAMES)}
    return getattr(inspect.unwrap(pl_module.forward), "__module__", None) in bases


def _also_averaged(trainer: Any, pl_module: Any) -> None:
    """The new statistics to the averaged model that ``WeightAveraging`` goes on to validate and to save."""
    from torch import no_grad
    from torch.optim.swa_utils import AveragedModel

    for callback in trainer.callbacks:
        averaged = getattr(callback, "_average_model", None)
        if isinstance(averaged, AveragedModel):
            with no_grad():
                for there, here in zip(averaged.module.buffers(), pl_module.buffers(), strict=True):
                    there.copy_(here)
