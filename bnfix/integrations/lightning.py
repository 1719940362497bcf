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
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

import bnfix
from bnfix.api.calibrating import _check_options
from bnfix.calibration import ranks_of
from bnfix.calibration.norms import find_norms
from bnfix.calibration.recalibration import LOOKED
from bnfix.errors import CalibrationError, MissingDependencyError, one_line
from bnfix.graph import find_owners
from bnfix.integrations.first_batch import Look, compiled
from bnfix.render import to_concise
from bnfix.running import replayable
from bnfix.types import Recalibration

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def _library() -> Any:
    """The library that is in use, else the one that is there: it has two names."""
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise MissingDependencyError("lightning", "lightning", "the Lightning callback")


_pl = _library()


def _say() -> Any:
    """``rank_zero_warn`` and ``rank_zero_info`` of the library that is in use."""
    return importlib.import_module(f"{_pl.__name__}.utilities.rank_zero")


class RecalibrateCallback(_pl.Callback):  # type: ignore[misc, name-defined]
    """Set the running statistics to those of the trained weights when a fit ends; under DDP, with all ranks' data.

    Whatever goes wrong then does not cost the training: the module is as training left it, a warning says why, and
    ``error`` keeps it.

    What ``training_step`` does to a batch before the network gets it, bnfix can't know: without ``data`` and
    ``forward``, what the first norm sees of the first batch in ``training_step`` is compared with what it sees when
    bnfix gives that batch to ``forward``. If these are apart by more than augmentation explains, a warning says so at
    once, and the end of the fit changes nothing.

    Args:
        data: what to recalibrate on, or a function of the trainer that returns it. Default: the training dataloader, as
            many batches of it as an epoch has, with the augmentation that it has. Training data with the transform of
            evaluation are better. Batches go through the transfer hooks of the module or datamodule either way. Under
            DDP each rank goes through its own ``data`` (the default is its share already; samples that Lightning
            repeats for shares of one size count twice).
        when: ``"needed"`` changes nothing unless the outputs change by more than chance, see
            :func:`bnfix.recalibrate`; ``"always"``.
        max_samples: stop reading there, on each rank.
        at: ``"train_end"``: on the device and in the process group of the training. ``"fit_end"``: behind
            ``LightningModule.on_train_end`` as well, where the module is back on the CPU.
        options: handed on to :func:`bnfix.recalibrate`. ``forward`` is needed where the module defines none, and where
            ``training_step`` does something to the batch first: ``forward=lambda m, b: m(m.prepare(b[0]))``.

    Attributes:
        report: what was done in the last fit; None before its end, or if it failed. With ``ddp_spawn`` it stays in the
            processes of the fit, and the module alone comes back.
        error: what went wrong.

    Raises:
        TypeError, ValueError: wrong arguments; at the start of a fit: the module has no forward, or is sharded.
        CalibrationError: at the start of the training: the module has no norm with running statistics, or none that
            ``select`` names.
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
        if data is not None and not callable(data):
            _check_iterable(data)
        select = options.get("select")
        if select is not None and not isinstance(select, str) and not callable(select):
            options["select"] = tuple(select)  # an iterator would be empty the second time
        self.data, self.at = data, at
        self.options = {"when": when, "max_samples": max_samples, **options}
        asked = inspect.signature(bnfix.recalibrate).bind(None, data, **self.options)
        asked.apply_defaults()
        _check_options(*(asked.arguments[name] for name in ("method", "when", "certify", "max_samples", "tol")))
        self.report: Recalibration | None = None
        self.error: Exception | None = None
        self._looked = False
        self._look: Look | None = None
        self._unlike: CalibrationError | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse before the training what could only fail behind it, and stand behind whoever averages weights."""
        if stage != "fit":
            return
        self._close()
        self.report = self.error = self._unlike = None
        self._looked = False
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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a module without norms, now that ``setup`` and ``configure_model`` have made all of its layers."""
        with _at_a_distance(trainer, pl_module):
            _check_norms(pl_module, self.options.get("select"), self.options.get("include_frozen", False))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look at what ``forward`` makes of the first batch, and listen to what ``training_step`` makes of it."""
        self._close()  # the module's own hook skipped what was left of the last epoch
        if self._looked:
            return
        self._looked = True
        if self.data is None and self.options.get("forward") is None:
            try:
                self._look = _look(trainer, pl_module, batch)
            except Exception:  # noqa: BLE001  # the batch can't be bound, or run: told at the end, where it matters
                self._look = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the two, and say at once what the end of the fit will refuse."""
        look = self._close()
        if look is None:
            return
        try:
            apart = look.apart()
        except Exception:  # noqa: BLE001  # inputs that can't be compared, of a norm of somebody's own, cost nothing
            return
        if apart is not None:
            self._unlike = _unlike(look, *apart)
            _say().rank_zero_warn(f"bnfix: this fit will not be recalibrated: {self._unlike}")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Listen no more."""
        self._close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate ``pl_module`` unless that comes later."""
        self._close()
        if self.at == "train_end":
            self._recalibrate(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate ``pl_module`` unless that is done."""
        if self.at == "fit_end":
            self._recalibrate(trainer, pl_module)

    def _close(self) -> Look | None:
        look, self._look = self._look, None
        if look is not None:
            look.close()
        return look

    def _recalibrate(self, trainer: Any, pl_module: Any) -> None:
        say = _say()
        try:
            with ranks_of(self.options.get("group")).together():  # a rank without data, or a verdict, speaks for all
                data = self._batches(trainer, pl_module)
                if self._unlike is not None:
                    raise self._unlike
            with trainer.precision_plugin.forward_context(), _at_a_distance(trainer, pl_module):
                self.report = bnfix.recalibrate(pl_module, data, **self.options)
        except Exception as error:  # noqa: BLE001  # whatever it is must not cost the training; it is said, and kept
            self.error = error
            say.rank_zero_warn(f"bnfix: not recalibrated, the module is as training left it: {error}")
            return
        if self.report.changed:
            _also_averaged(trainer, pl_module)
        if self.report.never_called:
            say.rank_zero_warn(_unreached(self.report.never_called))
        say.rank_zero_info(f"bnfix: {to_concise(self.report).strip().splitlines()[-1]}")

    def _batches(self, trainer: Any, pl_module: Any) -> Iterable[Any]:
        loader, limit = self.data, math.inf
        if loader is None:
            loader, limit = trainer.train_dataloader, trainer.num_training_batches
            if loader is None or isinstance(loader, (list, tuple, dict)):
                what = "no training dataloader" if loader is None else f"{len(loader)} training dataloaders"
                raise CalibrationError(f"the trainer has {what}", hint="RecalibrateCallback(data=loader)")
        elif callable(loader):
            try:
                loader = loader(trainer)
            except Exception as error:  # whatever a function of the user's raises
                raise CalibrationError(f"the data function raised {one_line(error)}") from error
        _check_iterable(loader)
        kind = _Epoch if replayable(loader) else _Once
        return kind(loader, pl_module, trainer.strategy, None if limit == math.inf else int(limit))


def _look(trainer: Any, pl_module: Any, batch: Any) -> Look:
    """What ``forward`` makes of ``batch``, run as at the end of the fit; it listens to training_step from then on."""
    with trainer.precision_plugin.forward_context(), _at_a_distance(trainer, pl_module):
        found = Look(pl_module, batch)
    if getattr(pl_module, "_compiler_ctx", None) is None and not compiled(pl_module):
        found.listen()
    return found


def _unlike(look: Look, d: float, ratio: float) -> CalibrationError:
    return CalibrationError(
        "training_step feeds the network with something else than the batches as they come: in the first one "
        f"{look.path} saw means {d:.2g} standard deviations away from those of forward(batch), and variances "
        f"{ratio:.2g} times as large (median channel)",
        hint=f"bnfix called forward with {look.used}\n"
        "do to a batch what training_step does:  RecalibrateCallback(forward=lambda m, b: m(m.prepare(b[0])))\n"
        "or pass a loader whose batches are prepared:  RecalibrateCallback(loader)",
    )


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
    """The module by itself: with no way to the trainer's things, logging nothing, its methods as its class has them."""
    own, before = vars(pl_module), getattr(pl_module, "_compiler_ctx", None) or {}
    swapped = [name for name in _STEPS if f"original_{name}" in before]  # by Lightning, for torch.compile(module)
    kept = {name: own[name] for name in ("log", *swapped) if name in own}
    pl_module.trainer = _Distant(trainer)
    own["log"] = _log_nothing  # these forwards are none of the training's; at its end Lightning would not have it
    for name in swapped:
        own.pop(name, None)
        if getattr(pl_module, name) != before[f"original_{name}"]:
            own[name] = before[f"original_{name}"]
    try:
        yield
    finally:
        pl_module.trainer = trainer
        for name in ("log", *swapped):
            own.pop(name, None)
        own.update(kept)


def _log_nothing(*_: Any, **__: Any) -> None:
    """In place of ``LightningModule.log``."""


class _Epoch:
    """Batches as training gets them: on the module's device, through the hooks of module or datamodule."""

    def __init__(self, loader: Iterable[Any], pl_module: Any, strategy: Any, limit: int | None) -> None:
        self._loader, self._module, self._strategy, self._limit = loader, pl_module, strategy, limit
        self._device = pl_module.device

    def __iter__(self) -> Iterator[Any]:
        return map(self._moved, itertools.islice(self._loader, self._limit))

    def __len__(self) -> int:
        return len(self._loader) if self._limit is None else self._limit  # type: ignore[arg-type]  # or a TypeError

    def _moved(self, batch: Any) -> Any:
        if isinstance(batch, bnfix.Call):  # a call as it is to be made: no batch, which hooks would know
            return batch
        batch = self._strategy.precision_plugin.convert_input(batch)
        batch = self._module._on_before_batch_transfer(batch)
        return self._strategy.batch_to_device(batch, self._device)


class _Once(_Epoch):
    """The same of an iterator: what has a ``__next__`` is known not to start anew."""

    def __iter__(self) -> Iterator[Any]:
        self._batches = super().__iter__()
        return self

    def __next__(self) -> Any:
        return next(self._batches)


def _check_iterable(data: Any) -> None:
    if not hasattr(type(data), "__iter__") and not hasattr(type(data), "__getitem__"):
        raise TypeError(f"data is what a training loop iterates over, not {type(data).__name__}")


def _check_norms(pl_module: Any, select: Any, include_frozen: bool) -> None:
    """Refuse what is certain to fail in the end, and nothing else.

    Raises:
        CalibrationError: there is no norm with running statistics, and no two tensors of one size that calls of
            ``batch_norm`` could use as such; or ``select`` names none.
    """
    owners = find_owners(pl_module)
    held = [
        t for m in owners.modules.values() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
    ]
    if any(map(is_lazy, held)):  # the first batch will tell
        return
    sizes = [t.numel() for t in held if t.is_floating_point() and not t.requires_grad]
    if not find_norms(pl_module, select, include_frozen, owners).known and len({*sizes}) == len(sizes):
        raise CalibrationError("the model has no norm with running statistics: nothing to recalibrate", hint=LOOKED)


def _has_no_forward(pl_module: Any) -> bool:
    """Whether the forward is that of a base class, which only says that there is none."""
    bases = {"torch.nn.modules.module", *(f"{name}.core.module" for name in _NAMES)}
    return getattr(inspect.unwrap(pl_module.forward), "__module__", None) in bases


def _unreached(names: tuple[str, ...]) -> str:
    """The warning about norms that forward does not call."""
    first = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"bnfix: no forward reached {first}: the statistics there are still those of the training. If training_step "
        "calls more than forward does:  RecalibrateCallback(forward=lambda m, b: m.head(m(b[0])))"
    )


def _also_averaged(trainer: Any, pl_module: Any) -> None:
    """The new statistics to the averaged model that ``WeightAveraging`` goes on to validate and to save."""
    for callback in trainer.callbacks:
        averaged = getattr(callback, "_average_model", None)
        if isinstance(averaged, AveragedModel):
            with torch.no_grad():
                for there, here in zip(averaged.module.buffers(), pl_module.buffers(), strict=True):
                    there.copy_(here)
