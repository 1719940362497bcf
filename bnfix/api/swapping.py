"""Norms swapped for norms of another kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from bnfix.api.asked import Progress, check_model, silent

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnfix.running import Call
    from bnfix.running.call import Forward
    from bnfix.types import Diagnosis, Finding, Result

To = Literal["group", "layer", "instance", "frozen", "sync", "batch"]
Init = Literal["moment", "ls", "copy", "fresh"]
Chosen = Callable[[tuple[str, ...], "nn.Module"], bool]
FRAGILE = "BN301"
"""The rule that says which norms see too few values a batch."""


def swap(
    model: nn.Module,
    to: To = "group",
    *,
    only: str | Iterable[str] | Callable[[str, nn.Module], bool] | Diagnosis | None = None,
    groups: int | Literal["auto"] = "auto",
    data: Iterable[Any] | None = None,
    example: Any = None,
    init: Init | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    inplace: bool = False,
    dry_run: bool = False,
    forward: Forward | None = None,
    max_samples: int = 512,
    progress: Progress | None = None,
) -> Result:
    """Swap batch norms for norms of another kind: returns a changed copy, ``model`` itself stays as it is.

    A new norm on old weights is another function: with its affine copied or fresh a trained network is near chance.
    With ``data`` the affine of each new norm is fitted to the outputs of the old one, layer by layer in the order of
    their calls, and most of what the model knows is kept; each edit's ``r2`` says how much could be. Before anything
    is returned, the new model has run beside the old one on the example; what was found is in ``notes``. Norms that
    can't be swapped are in ``refusals`` with the reason. Whatever goes wrong, Ctrl-C included, ``model`` is as it was.

    Args:
        model: in any mode; modes, devices, dtypes, ``requires_grad``, hooks and shared norms are kept.
        to: ``"group"``, ``"layer"`` (all channels of a sample together), ``"instance"``: statistics of each sample, no
            difference between training and evaluation. ``"frozen"``: the same function, never to change. ``"sync"`` and
            ``"batch"``: the same norm with statistics over all processes, and back; exact, with their tensors.
        only: which norms: a regular expression, module paths, a function of path and module, ``"fragile"`` (those that
            ``check`` finds to see too few values on ``data``), or a Diagnosis of yours. Default: all.
        groups: of ``"group"``: a number, or for each norm the one of highest ``r2`` that leaves each group 16 values.
        data: what a training loop iterates over, with the transform of evaluation.
        example: as for :func:`bnfix.fold`; default: the first batch of ``data``, else deduced from the layers.
        init: ``"moment"`` gives each channel the mean and variance that it had (default with ``data``), ``"ls"`` is
            least squares; ``"copy"`` takes the old affine (default without data), ``"fresh"`` 1 and 0.
        optimizer: with ``inplace``: its groups go on with the new parameters.
        inplace: change ``model`` itself, all or nothing, after everything was done and tried on a copy.
        dry_run: the same work and the same result, but ``Result.model`` is None and nothing is changed.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch.
        max_samples: read no more of ``data``; less are used where they don't fit into a quarter of the free memory.
        progress: called with a line before each step.

    Raises:
        CalibrationError: the data raises, is empty or holds NaN; the new model gives NaN.
        PassError: the forward fails, or no example was given and none could be deduced.
        TraceError: the model can't be copied; the message says why.
        TypeError, ValueError: wrong arguments.
    """
    import torch

    from bnfix import swaps
    from bnfix.graph import no_footprints, unwrap
    from bnfix.running import preserved

    check_model(model)
    _check(to, groups, init, data, optimizer, inplace, max_samples)
    if inplace:
        _check_inplace(model)
    say = progress or silent
    model, notes = unwrap(model)
    with torch.inference_mode(False), preserved(model), no_footprints(model, forward):
        samples = None
        if data is not None:
            say("reading the data")
            samples = swaps.read(data, model, forward, max_samples)
            notes = (*notes, *([f"of each batch: {samples.used}"] if samples.used != "the batch" else []))
        chosen, why = _chooser(model, only, data, samples, forward, say)
        calibrated = swaps.all_targets()[to].calibrated
        examples, assumed = _examples(model, example, samples, forward, needed=calibrated)
        if init is None and data is None and calibrated:
            why += ("no data was given: the affine is copied, expect a model near chance; with data= it is fitted",)
        options = swaps.Options(
            to=to,
            groups=None if groups == "auto" else groups,
            init=init or ("moment" if data is not None else "copy"),
            chosen=chosen,
            optimizer=optimizer,
            inplace=inplace,
            dry_run=dry_run,
        )
        planned = swaps.plan(model, options, examples, samples.calls if samples else [], say)
    with torch.inference_mode(False):  # parameters made in inference mode could never be trained
        result = planned.finish(model)  # not above: what leaves a model as it was would take this back
    return replace(result, notes=(*notes, *why, *assumed, *result.notes))


def _check(to: str, groups: Any, init: str | None, data: Any, optimizer: Any, inplace: bool, max_samples: int) -> None:
    from bnfix import swaps

    for name, given, known in (
        ("to", to, tuple(swaps.all_targets())),
        ("init", init, ("moment", "ls", "copy", "fresh", None)),
    ):
        if given not in known:
            raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, not {given!r}")
    if groups != "auto" and (type(groups) is not int or groups < 1):
        raise ValueError(f"groups is 'auto' or a positive number, not {groups!r}")
    if groups != "auto" and to != "group":
        raise ValueError(f"groups={groups} is for to='group': a norm of to={to!r} has none to choose")
    if init in ("moment", "ls") and data is None:
        raise ValueError(f"init={init!r} fits the new norms to data, and none was given: data=loader")
    if optimizer is not None and not inplace:
        raise ValueError("optimizer= is for inplace=True: the parameters of a copy belong to no optimizer yet")
    if max_samples < 1:
        raise ValueError(f"max_samples is at least 1, not {max_samples}")


def _check_inplace(model: nn.Module) -> None:
    """Whether ``model`` can be changed itself.

    Raises:
        ValueError: its wrapper keeps lists of the parameters.
    """
    from torch import nn

    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("DDP keeps lists of the parameters: swap in the module before it is wrapped, on every rank")


def _chooser(
    model: nn.Module, only: Any, data: Any, samples: Any, forward: Forward | None, say: Progress
) -> tuple[Chosen | None, tuple[str, ...]]:
    """Which norms are wanted, and what to know of it."""
    from bnfix.types import Diagnosis

    if only is None:
        return None, ()
    if isinstance(only, Diagnosis) or only == "fragile":
        diagnosis = only if isinstance(only, Diagnosis) else _diagnosed(model, data, samples, forward, say)
        sites = {s.partition("@")[0] for f in diagnosis.findings if _asks_for_swap(f) for s in _sites_of(f)}
        note = () if sites else ("no norm was found that a swap would heal",)
        return (lambda paths, _module: bool(sites.intersection(p or "(root)" for p in paths))), note
    if isinstance(only, str):
        try:
            pattern = re.compile(only)
        except re.error as error:
            raise ValueError(f"only={only!r} is no regular expression: {error}") from error
        chosen: Chosen = lambda paths, _module: any(pattern.search(p) for p in paths)  # noqa: E731
    elif callable(only):
        return (lambda paths, module: bool(only(paths[0], module))), ()
    else:
        names = frozenset(only)
        chosen = lambda paths, _module: any(p in names or _under(p, names) for p in paths)  # noqa: E731
    _check_fits(model, only, chosen)
    return chosen, ()


def _under(path: str, names: frozenset[str]) -> bool:
    return any(path.startswith(f"{name}.") for name in names)


def _check_fits(model: nn.Module, only: Any, chosen: Chosen) -> None:
    from bnfix.graph import find_owners, norm_modules

    owners = find_owners(model)
    paths = [(owners.paths(m), m) for m in norm_modules(owners)]
    if not any(chosen(p, m) for p, m in paths):
        more = " …" if len(paths) > 5 else ""
        raise ValueError(f"only={only!r} fits no norm of the model: {', '.join(p[0] for p, _ in paths[:5])}{more}")


def _diagnosed(model: nn.Module, data: Any, samples: Any, forward: Forward | None, say: Progress) -> Diagnosis:
    """What ``check`` finds on the data.

    Raises:
        ValueError: there is none.
        BnfixError: the rule could not be checked: which norms are fragile is not known then.
    """
    from bnfix.api import checking
    from bnfix.errors import BnfixError
    from bnfix.running import replayable

    if data is None:
        raise ValueError("only='fragile' asks how many values a norm sees in a batch: data=loader, as in training")
    say("asking check for fragile norms")
    seen = data if replayable(data) else samples.raw
    diagnosis = checking.check(model, data=seen, forward=forward, select=(FRAGILE,))
    if FRAGILE not in diagnosis.checked:
        reason = next((s.reason for s in diagnosis.skipped if s.code == FRAGILE), "there is no such rule")
        raise BnfixError(f"which norms are fragile is not known, {FRAGILE} was not checked: {reason}")
    return diagnosis


def _asks_for_swap(finding: Finding) -> bool:
    """Errors and warnings that a swap heals; what is told for information does no harm that can be measured."""
    if finding.severity == "info":
        return False
    return finding.fix.verb == "swap" if finding.fix is not None else finding.code == FRAGILE


def _sites_of(finding: Finding) -> tuple[str, ...]:
    return finding.fix.sites if finding.fix is not None and finding.fix.sites else finding.sites


def _examples(
    model: nn.Module, example: Any, samples: Any, forward: Forward | None, *, needed: bool
) -> tuple[list[Call], tuple[str, ...]]:
    """What the model is run on.

    Raises:
        PassError: none was given, none could be deduced, and the target can't do without.
    """
    from bnfix.errors import PassError
    from bnfix.graph import copy_model
    from bnfix.running import as_call, guess_call

    given = example if isinstance(example, list) else [] if example is None else [example]
    calls = [as_call(e, forward) for e in given] + ([samples.first] if samples is not None else [])
    if calls:
        return calls, ()
    try:
        call = guess_call(copy_model(model)[0], batch=2)
    except PassError:
        if needed:
            raise
        return [], ("no example was given, and none could be deduced: the new model was not run",)
    return [call], (f"no example was given: run on a random {call.signature}, as its first layers take it",)
