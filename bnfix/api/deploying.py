"""Fold, export and compare: what brings a model into use."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from bnfix.api.asked import Progress, check_k, check_model, other_calls, read_calls, silent

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from bnfix.running.call import Forward
    from bnfix.types import Export, Facts, Parity, Refusal, Result


def fold(
    model: nn.Module | ExportedProgram,
    example: Any = None,
    *,
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    leave: Literal["norm", "affine"] = "norm",
    verify: bool = True,
    k: float = 8.0,
    inplace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Fold norms into the layers that feed them: returns a changed copy, ``model`` itself stays as it is.

    Every norm is either folded or comes back with the reason why not. Weights are computed in float64
    and rounded once; the result is traced again, each stored number is checked against its exact
    value, and the outputs are compared with the float64 model. A fold that fails its proof is undone
    and reported as a refusal marked ``defect``. Folded models are for inference; everything is traced and run
    without gradients, so a forward that goes another way with gradients on is proven for the way without.

    Args:
        model: in evaluation mode (a norm in training mode is refused, not folded). An exported program gives another
            one, with the sizes that may vary as they were; its own example is the default.
        example: what the model is called with: a tensor, a tuple of positional arguments, a dict of keyword
            arguments or a ``bnfix.Call``; a list of these for several signatures. Facts and proof
            hold for these signatures. None: the first batch of ``data``, else deduced from the layers (see ``notes``);
            where that fails too, what the code alone shows is folded, and ``parity`` is None.
        data: what a training loop would iterate over.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch.
        leave: what becomes of norms that can't be folded: ``"norm"`` leaves them, ``"affine"`` puts a multiply-add per
            channel in their place (a module of bnfix: a model saved whole then needs bnfix to be loaded).
        verify: False leaves out the comparison of outputs (not the check of weights and of the trace).
        k: the outputs may be ``k`` times the model's own rounding noise away from the float64 model.
        inplace: change ``model`` itself, only after everything was proven on a copy.
        dry_run: plan only; ``Result.model`` is None.
        progress: called with a line before each step.

    Raises:
        PassError: the forward fails on the example.
        TraceError: the model can't be copied or traced faithfully; the message says why.
    """
    import torch

    from bnfix import folding
    from bnfix.errors import PassError, TraceError
    from bnfix.graph import all_or_nothing, no_footprints, unwrap
    from bnfix.preparing import prepare
    from bnfix.proving import FoldProof
    from bnfix.running import preserved
    from bnfix.types import Result

    if isinstance(model, torch.export.ExportedProgram):
        from bnfix.api.programs import fold_program

        return fold_program(
            fold,
            model,
            example,
            data=data,
            forward=forward,
            leave=leave,
            verify=verify,
            k=k,
            inplace=inplace,
            dry_run=dry_run,
            progress=progress,
        )
    say = progress or silent
    check_model(model)
    check_k(k)
    if leave not in ("norm", "affine"):
        raise ValueError(f'leave={leave!r}: norms that can\'t be folded are left as "norm" or as "affine"')
    model, notes = unwrap(model)
    unknown: PassError | None = None
    try:
        calls, assumed = read_calls(model, example, data, forward)
    except PassError as error:  # none was given, and none could be deduced
        if example is not None or data is not None or forward is not None:
            raise
        unknown, calls = error, []
        assumed = (
            "no example was given, and none could be deduced: outputs were not compared. Give one to have proof",
        )
    notes = (*notes, *assumed)
    say(f"tracing {', '.join(c.signature for c in calls) or 'without an input'}")
    with preserved(model), no_footprints(model, *(c.forward for c in calls)):
        try:
            prepared = prepare(model, calls, more=lambda: other_calls(model, calls))
        except TraceError as error:
            raise (unknown or error) from error
        facts, plan = prepared.facts, prepared.plan
        calls = list(facts.binding.calls)
        signatures = tuple(c.signature for c in calls)
        notes = (*notes, *facts.notes)
        if facts.written:
            named = ", ".join(facts.written[:3]) + (" …" if len(facts.written) > 3 else "")
            notes = (*notes, f"the forward writes {named}: planned for a first and a second run")
        if dry_run:
            folded = folding.compute(facts, plan.folds)
            refusals = _in_order(facts, (*plan.refusals, *folded.refusals))
            edits = (*prepared.edits, *folding.edits(folded))
            if leave == "affine":
                left = [r for r in refusals if r.site in plan.plain]
                edits += folding.as_affines(facts, left, None)
                refusals = tuple(r for r in refusals if r not in left)
            return Result(None, edits, refusals, None, facts.source, signatures, notes, dry_run=True)
        proof = FoldProof(prepared.model, calls, facts, verify, k, say)
        folds = proof.narrowed(plan.folds)
        best = proof.of(folds)
        undone = proof.undone(plan.folds, folds, best.folded)
        refusals = _in_order(facts, (*plan.refusals, *best.folded.refusals, *undone))
        left = [r for r in refusals if leave == "affine" and r.site in plan.plain]
        if left:
            best = proof.with_affines(best, left)
    left = [r for r in left if r.site in {e.site for e in best.edits}]
    result_model = best.model
    if inplace:
        with all_or_nothing(prepared.surgeon(model)) as surgeon:
            folding.operate(facts, best.folded, surgeon)
            folding.as_affines(facts, left, surgeon)
        result_model = model
    return Result(
        model=result_model,
        edits=(*prepared.edits, *best.edits),
        refusals=tuple(r for r in refusals if r not in left),
        parity=best.parity,
        source=facts.source,
        signatures=signatures,
        notes=notes,
        recipe=prepared.recipe(folding.recipe(facts, best.folded, best.edits)),
    )


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any = None,
    *,
    fold: bool = True,
    opset: int | None = None,
    dynamic: bool = True,
    verify: bool = True,
    k: float = 8.0,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write ``model`` as an ONNX file at ``path``; ``model`` itself is not changed.

    A copy is folded first (unless ``fold=False``), exported by torch's dynamo exporter, checked, and run in ONNX
    Runtime beside the unfolded model on several batch sizes and seeds. A file that fails is not put in
    place: then ``files`` is empty and ``parity.passed`` False.

    Args:
        example: as for :func:`fold`; of several, the first is exported and all are compared.
        opset: version of the ONNX operators; None leaves the choice to torch.
        dynamic: keep the batch size variable, where the model allows it.
        verify: compare with ONNX Runtime; False leaves ``parity`` None.
        k: as for :func:`fold`.

    Raises:
        ExportError: a norm or dropout is in training mode, or the file is not what was asked for. Nothing was written.
        PassError, TraceError: as for :func:`fold`.
        MissingDependencyError: the extra ``onnx`` is not installed.
    """
    from bnfix import parity
    from bnfix.files import check_target
    from bnfix.graph import unwrap

    say = progress or silent
    check_target(path)
    parity.check_export(opset, path)
    check_model(model)
    check_k(k)
    model, notes = unwrap(model)
    calls, assumed = read_calls(model, example, None, forward)
    folded, edits = model, 0
    refusals: tuple[Refusal, ...] = ()
    if fold:
        result = _fold(model, calls, verify=verify, k=k, progress=progress)
        folded, edits, refusals = result.model or model, len(result.edits), result.refusals
    say(f"exporting to {os.fspath(path)}")
    exported = parity.export_onnx(
        folded,
        path,
        calls[0],
        opset=opset,
        dynamic=dynamic,
        verify=verify,
        k=k,
        inputs=calls[1:],
        reference=model,
        refusals=refusals,
        folded=edits,
    )
    return replace(exported, notes=(*notes, *assumed, *exported.notes))


def verify(
    model: nn.Module,
    other: Any,
    inputs: Any,
    *,
    forward: Forward | None = None,
    k: float = 8.0,
    progress: Progress | None = None,
) -> Parity:
    """Whether ``other`` computes what ``model`` does, judged by the model's own rounding noise; changes nothing.

    Args:
        model: right by definition, in evaluation mode.
        other: a module, an exported program, or the path of an ONNX file (of the dynamo or the legacy exporter, or of
            another tool).
        inputs: a list of examples, or one, each as for :func:`fold` (a tuple is one: its positional arguments).
        k: more than ``k`` times the noise fails, more than half of that warns.

    Raises:
        ValueError: no inputs, or a model in training mode.
        PassError: a model fails on an input.
        LoadError: ``other`` is a file that is no ONNX model.
    """
    from bnfix import parity
    from bnfix.graph import unwrap

    check_model(model)
    check_k(k)
    model, _ = unwrap(model)
    calls = inputs if isinstance(inputs, list) else [inputs]
    (progress or silent)(f"comparing on {len(calls)} inputs")
    return parity.verify(model, other, calls, forward=forward, k=k)


_fold = fold  # under a name that the argument `fold` of export does not hide


def _in_order(facts: Facts, refusals: Iterable[Refusal]) -> tuple[Refusal, ...]:
    order = {n.path: i for i, n in enumerate(facts.norms)}
    return tuple(sorted(refusals, key=lambda r: order.get(r.site, len(order))))
