"""Statistics of a model, estimated anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from bnfix.api.asked import Progress, check_model, silent

if TYPE_CHECKING:
    from torch import nn

    from bnfix.running.call import Forward
    from bnfix.types import Recalibration

Method = Literal["auto", "staged", "population", "online"]
Certify = Literal["replay", "full"]


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Method = "auto",
    when: Literal["always", "needed"] = "always",
    forward: Forward | None = None,
    select: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    include_frozen: bool = False,
    mask: str | Callable[[Any], Any] | None = None,
    max_samples: int | None = None,
    tol: float | None = None,
    certify: Certify | None = "replay",
    memory_budget: int | str | None = None,
    spill_dir: str | os.PathLike[str] | None = None,
    unbiased: bool = True,
    group: Any = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Recalibration:
    """Set the running statistics of every norm to those of ``data``: changes ``model`` in place, all or nothing.

    Afterwards they are mean and variance of each norm's input when the model runs in evaluation mode over the same
    data: the fixed point of the data seen (precise BN, BN re-estimation; torch's ``update_bn`` only comes near it).
    All modules are in evaluation mode while it runs. Beside them only a ``num_batches_tracked`` is written, where it
    says that hardly anything was averaged yet. Whatever goes wrong, Ctrl-C included, the model is as it was to the
    bit; ``report.undo()`` takes a finished one back. ``torch.compile``, ``DataParallel`` and DDP wrappers are looked
    through. With ``torch.distributed`` set up, every rank calls this with its own share of the data, and all end with
    the same bits.

    Args:
        model: in any mode. Norms in evaluation mode inside a model in training mode count as frozen and stay; in a
            model that is in evaluation mode itself, nothing does. Modes are left as they are.
        data: what a training loop iterates over. Use training data with the transform of evaluation.
        method: ``"staged"``: exact, one pass, the samples go from norm to norm together and so must fit into memory (or
            into ``spill_dir``; else those that fit are used). ``"population"``: one streaming pass, each batch
            normalised with its own statistics, moments pooled. ``"online"``: normalised with what was pooled so
            far, for tiny batches. ``"auto"`` takes staged where all samples fit, and says why in ``report.why``; a
            stream whose batches differ (sorted data) it refuses.
        when: ``"needed"`` leaves the model alone unless its outputs change by more than .25 of their spread and by
            more than 4 times what recalibrations on two halves of the data differ by; also where that can't be told.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch.
        select: which norms: a regular expression, module paths, or a function of path and module. Default: all.
        include_frozen: recalibrate frozen norms too.
        mask: for padded positions: a key of the batch, or a function of it, that gives a boolean tensor
            (N, positions …), True where a position counts.
        max_samples: stop reading there; with several ranks, on each. The last batch is cut, where it can be.
        tol: for the streaming methods: stop once every standard error is at most ``tol`` (of means in standard
            deviations, of variances relative). A stream of unknown length stops at .01.
        certify: ``"replay"`` runs two samples of a chunk again, alone (all of it if in doubt), and compares what each
            norm sees: what chunks that take turns do to one another is found out, and plain passes take over.
            ``"full"`` also measures ``residual`` with plain forwards over the loader's batches (what they disprove is
            done anew, in plain passes), and ``residual_fresh`` where the loader draws anew. None leaves the replay out
            too where it proves nothing: all samples are one batch of the loader's.
        memory_budget: bytes, or such as ``"2GB"``, for what parked samples hold; default: a quarter of what is free on
            the model's device.
        spill_dir: a folder for the activations of parked samples: then all samples fit (Linux, CPU).
        unbiased: store M2/(n - 1), as PyTorch does; False stores M2/n.
        group: process group; None the default one where one is set up, False this process alone. All of its ranks have
            to call, with the same arguments but for the data (which may be empty on some); if one fails, all do.
        dry_run: measure the drift, change nothing.
        progress: called with a line before each step.

    Returns:
        What was measured, with its standard errors, and how good the result is.

    Raises:
        CalibrationError: the data raises, holds NaN or Inf, or is empty; a forward fails; nothing is there to be
            recalibrated. Names batch and layer; the model is as it was.
        TraceError: a module of the model can't be observed (a ScriptModule, a compiled submodule).
        TypeError, ValueError: wrong arguments.
    """
    from bnfix import calibration
    from bnfix.graph import unwrap
    from bnfix.running import parse_bytes

    ranks = calibration.ranks_of(group)
    with ranks.together():
        check_model(model)
        _check_options(method, when, certify, max_samples, tol)
        model, notes = unwrap(model)
        options = calibration.Options(
            method=method,
            when=when,
            forward=forward,
            mask=mask,
            max_samples=max_samples,
            tol=tol,
            certify=certify,
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
            spill_dir=spill_dir,
            unbiased=unbiased,
            dry_run=dry_run,
        )
        return calibration.recalibrate(
            model,
            data,
            options,
            select=select,
            include_frozen=include_frozen,
            ranks=ranks,
            say=progress or silent,
            notes=[note.partition(":")[0] for note in notes],  # there is no other model than the one given
        )


def _check_options(method: str, when: str, certify: str | None, max_samples: int | None, tol: float | None) -> None:
    for name, given, known in (
        ("method", method, ("auto", "staged", "population", "online")),
        ("when", when, ("always", "needed")),
        ("certify", certify, ("replay", "full", None)),
    ):
        if given not in known:
            raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, not {given!r}")
    if max_samples is not None and (not isinstance(max_samples, int) or isinstance(max_samples, bool)):
        raise TypeError(f"max_samples is a number of samples, not {max_samples!r}")
    if tol is not None and (not isinstance(tol, (int, float)) or isinstance(tol, bool)):
        raise TypeError(f"tol is a number, not {tol!r}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is at least 1, not {max_samples}")
    if tol is not None and not 0 < tol < float("inf"):
        raise ValueError(f"tol is a positive number, not {tol}")
