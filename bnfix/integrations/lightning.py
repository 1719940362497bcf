"""Recalibration at the end of a Lightning fit.

::

    from bnfix.integrations.lightning import RecalibrateCallback

    trainer = Trainer(callbacks=[StochasticWeightAveraging(1e-2), RecalibrateCallback()])
    trainer.fit(module)
    trainer.save_checkpoint("final.ckpt")     # the statistics are those of the weights

It runs in ``on_fit_end``, after every callback's ``on_train_end``: averaged weights (``StochasticWeightAveraging``,
``WeightAveraging``, ``EMAWeightAveraging``) are in the module by then. Checkpoints that ``ModelCheckpoint`` wrote
during the fit hold the statistics of their moment: save once more afterwards.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from bnfix.errors import MissingDependencyError

if TYPE_CHECKING:
    from bnfix.types import Recalibration


_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _base() -> type:
    """``Callback`` of the library that is in use, else of the one that is there: it has two names."""
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        with contextlib.suppress(ModuleNotFoundError):
            found: type = importlib.import_module(name).Callback
            return found
    raise MissingDependencyError("lightning", "lightning", "the Lightning callback")


class RecalibrateCallback(_base()):  # type: ignore[misc]
    """Recalibrate the module at the end of a fit; every rank with its own share of the data.

    Args:
        data: what to recalibrate on; default: the trainer's training dataloader, with the augmentation that it has. A
            loader of training data with the transform of evaluation is better.
        when: ``"needed"`` (default) changes nothing unless the outputs change by more than chance, see
            :func:`bnfix.recalibrate`.
        options: handed on to :func:`bnfix.recalibrate`: ``forward``, ``select``, ``max_samples``, ``method`` …

    Attributes:
        report: what was done; None before the end of a fit.

    Raises:
        CalibrationError: at the end of the fit, as :func:`bnfix.recalibrate` does; the trained module is as it was.
    """

    def __init__(self, data: Iterable[Any] | None = None, *, when: str = "needed", **options: Any) -> None:
        super().__init__()
        self.data, self.when, self.options = data, when, options
        self.report: Recalibration | None = None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate ``pl_module``, and say in one line what came of it."""
        import bnfix

        data = self.data if self.data is not None else trainer.train_dataloader
        if data is None:
            from bnfix.errors import CalibrationError

            raise CalibrationError(
                "the trainer has no training dataloader to recalibrate on", hint="RecalibrateCallback(data=loader)"
            )
        with _in_precision(trainer):
            self.report = bnfix.recalibrate(pl_module, data, when=self.when, **self.options)  # type: ignore[arg-type]
        if trainer.is_global_zero:
            _say(f"bnfix: {_verdict(self.report)}")


@contextlib.contextmanager
def _in_precision(trainer: Any) -> Iterator[None]:
    """The precision that the trainer trained in, where it is a context of the forward (autocast)."""
    context: Callable[[], Any] | None = getattr(trainer.precision_plugin, "forward_context", None)
    with context() if context is not None else contextlib.nullcontext():
        yield


def _verdict(report: Recalibration) -> str:
    from bnfix.render import to_concise

    return to_concise(report).strip().splitlines()[-1]


def _say(line: str) -> None:
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"{name}.utilities.rank_zero").rank_zero_info(line)
            return
