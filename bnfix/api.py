"""One short function per verb; the verbs are the public names. Here, and only here, rooms of one floor meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from bnfix.formats import Loaded
    from bnfix.running import Call
    from bnfix.running.call import Forward
    from bnfix.types import Export, Facts, FileInfo, Parity, Refusal, Result

Progress = Callable[[str], None]


def fold(
    model: nn.Module,
    example: Any = None,
    *,
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
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
        model: in evaluation mode (a norm in training mode is refused, not folded).
        example: what the model is called with: a tensor, a tuple of positional arguments, a dict of keyword
            arguments or a ``bnfix.Call``; a list of these for several signatures. Facts and proof
            hold for these signatures. None: the first batch of ``data``, else deduced from the layers (see ``notes``).
        data: what a training loop would iterate over.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch.
        verify: False leaves out the comparison of outputs (not the check of weights and of the trace).
        k: the outputs may be ``k`` times the model's own rounding noise away from the float64 model.
        inplace: change ``model`` itself, only after everything was proven on a copy.
        dry_run: plan only; ``Result.model`` is None.
        progress: called with a line before each step.

    Raises:
        PassError: the forward fails on the example.
        TraceError: the model can't be copied or traced faithfully; the message says why.
    """
    from bnfix import folding
    from bnfix.graph import Surgeon, gather, no_footprints, unwrap
    from bnfix.proving import FoldProof
    from bnfix.running import preserved
    from bnfix.types import Result

    say = progress or _silent
    _check(model, k)
    model, notes = unwrap(model)
    calls, assumed = _calls(model, example, data, forward)
    notes = (*notes, *assumed)
    signatures = tuple(c.signature for c in calls)
    say(f"tracing {', '.join(signatures)}")
    with preserved(model), no_footprints(model, *(c.forward for c in calls)):
        facts = gather(model, calls)
        plan = folding.plan(facts)
        if facts.written:
            named = ", ".join(facts.written[:3]) + (" …" if len(facts.written) > 3 else "")
            notes = (*notes, f"the forward writes {named}: planned for a first and a second run")
        if dry_run:
            folded = folding.compute(facts, plan.folds)
            refusals = _in_order(facts, (*plan.refusals, *folded.refusals))
            edits = folding.edits(folded)
            return Result(None, edits, refusals, None, facts.source, signatures, notes, dry_run=True)
        proof = FoldProof(model, calls, facts, verify, k, say)
        folds = proof.narrowed(plan.folds)
        best = proof.of(folds)
        undone = proof.undone(plan.folds, folds, best.folded)
    result_model = best.model
    if inplace:
        folding.operate(facts, best.folded, Surgeon())
        result_model = model
    return Result(
        model=result_model,
        edits=best.edits,
        refusals=_in_order(facts, (*plan.refusals, *best.folded.refusals, *undone)),
        parity=best.parity,
        source=facts.source,
        signatures=signatures,
        notes=notes,
        recipe=folding.recipe(facts, best.folded),
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

    say = progress or _silent
    check_target(path)
    parity.check_export(opset, path)
    _check(model, k)
    model, notes = unwrap(model)
    calls, assumed = _calls(model, example, None, forward)
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

    _check(model, k)
    model, _ = unwrap(model)
    calls = inputs if isinstance(inputs, list) else [inputs]
    (progress or _silent)(f"comparing on {len(calls)} inputs")
    return parity.verify(model, other, calls, forward=forward, k=k)


def info(path: str | os.PathLike[str]) -> FileInfo:
    """What a file is, by its content: nothing is unpickled, nothing in it is run, torch is not imported.

    Raises:
        LoadError: the file can't be read.
    """
    from bnfix.formats import sniff

    return sniff(path)


def load(
    path: str | os.PathLike[str],
    *,
    arch: Any = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Any:
    """The model in a file, or one that ``timm:resnet50``, ``torchvision:resnet18`` or ``pkg.mod:callable`` names.

    Args:
        arch: for a file of weights, the architecture they go into: a spec, a class, a factory or a module.
        arch_kwargs: what the architecture is built with.
        trust: load a pickled module, which runs its own code. One that names system functions is refused all the same.

    Returns:
        The module, in evaluation mode where bnfix built it (a pickled one as it was saved); for an ONNX file its path.

    Raises:
        LoadError: the file isn't what was asked for, or does not fit; the message says what to do.
    """
    from bnfix import formats

    return formats.load(path, arch=arch, arch_kwargs=arch_kwargs, trust=trust).value


def open_model(
    path: str | os.PathLike[str],
    *,
    arch: Any = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Loaded:
    """As :func:`load`, in evaluation mode, with what a person should know: wrappers opened, prefixes, shapes."""
    from torch import nn

    from bnfix import formats

    loaded = formats.load(path, arch=arch, arch_kwargs=arch_kwargs, trust=trust)
    if isinstance(loaded.value, nn.Module) and any(m.training for m in loaded.value.modules()):
        loaded.value.eval()
        note = "the module was saved in training mode: it is used in evaluation mode"
        loaded = replace(loaded, notes=(*loaded.notes, note))
    return loaded


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    source: FileInfo | None = None,
    inplace: bool = False,
) -> Path:
    """Write ``model`` to ``path``, whole or not at all; with the ``recipe`` of a Result, ``load`` reads it again.

    The suffix chooses the format: ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` or ``.safetensors``.

    Raises:
        BnfixError: the target can't be written, or is the input ``source`` and ``inplace`` was not given.
        ValueError: an unknown suffix.
    """
    from bnfix import formats

    return formats.save(model, path, recipe=recipe, source=source, inplace=inplace)


def examples(
    loaded: Loaded,
    *,
    input: Sequence[str] | None = None,
    data: str | None = None,
    forward: str | None = None,
    file: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Call], tuple[str, ...]]:
    """What the command line runs a model on: the calls, and the lines that say what was assumed.

    ``input`` holds shapes, ``data`` names batches, ``forward`` is a Python expression. Without any: what the ONNX
    ``file`` to compare with takes, the shape that the architecture states, or one deduced from the layers. Where
    one input came out, a second batch size and a second spatial size join it if the model accepts them.
    """
    from bnfix import formats, parity
    from bnfix.graph import copy_model, unwrap
    from bnfix.running import as_call, batch_call, guess_call, variations
    from bnfix.running.call import fit_call

    model, _ = copy_model(unwrap(loaded.value)[0])  # type: ignore[arg-type]
    way = _forward(forward)
    notes: list[str] = []
    if input:
        calls = [as_call(formats.load_input(text, seed=seed + i), way) for i, text in enumerate(input)]
    elif data:
        batch = next(iter(formats.load_data(data, seed=seed)), None)
        if batch is None:
            raise ValueError(f"--data {data} holds no batch")
        calls = [batch_call(batch, model, way)]
    elif file is not None and (taken := parity.file_call(model, file, seed=seed)) is not None:
        calls = [taken]
        notes.append(f"input {taken.signature}, as {file} takes it; another one: --input")
    elif loaded.input_hint is not None:
        shape, source = loaded.input_hint
        calls = [as_call(formats.load_input("x".join(map(str, (1, *shape))), seed=seed), way)]
        notes.append(f"input {calls[0].signature}, by {source}; another one: --input")
    else:
        (progress or _silent)("looking for an input that the model accepts")
        calls = [guess_call(model, seed=seed)]
        notes.append(f"no --input given: a random {calls[0].signature}, as the first layers take it")
    calls = [fit_call(call, model) for call in calls]
    if len(calls) == 1 and way is None:
        more, refused = variations(model, calls[0])
        calls += more
        notes += refused
    return calls, tuple(notes)


_fold = fold  # under a name that the argument `fold` of export does not hide


def _forward(text: str | None) -> Forward | None:
    """The user's own ``lambda m, b: …``, evaluated with torch at hand: it is their command line."""
    if text is None:
        return None
    import torch

    try:
        value = eval(text, {"torch": torch})  # the user's own command line, nothing from a file
    except SyntaxError as error:
        raise ValueError(f"--forward {text!r} is no Python expression: {error.msg}") from error
    if not callable(value):
        raise ValueError(f"--forward {text!r} is no function; write 'lambda m, b: m(b)'")
    found: Forward = value
    return found


def _check(model: Any, k: float) -> None:
    from torch import nn

    if not isinstance(model, nn.Module):
        given = type(model).__name__
        way = (
            "load it first: bnfix.load(path, arch=...)"
            if isinstance(model, (str, os.PathLike, dict))
            else "pass the module"
        )
        raise TypeError(f"model is an nn.Module, not {given}; {way}")
    if not 0 < k < float("inf"):
        raise ValueError(f"k is a positive number, not {k}")


def _calls(
    model: nn.Module, example: Any, data: Iterable[Any] | None, forward: Forward | None
) -> tuple[list[Call], tuple[str, ...]]:
    """The examples as calls, and what was assumed where none was given."""
    from bnfix.graph import copy_model
    from bnfix.running import as_call, batch_call, guess_call

    if isinstance(example, list):
        if not example:
            raise ValueError("the list of examples is empty")
        return [as_call(e, forward) for e in example], ()
    if example is not None:
        return [as_call(example, forward)], ()
    if data is not None:
        batch = next(iter(data), None)
        if batch is None:
            raise ValueError("data holds no batch")
        return [batch_call(batch, model, forward)], ()
    call = guess_call(copy_model(model)[0])
    return [call], (f"no example was given: traced on a random {call.signature}, as its first layers take it",)


def _in_order(facts: Facts, refusals: Iterable[Refusal]) -> tuple[Refusal, ...]:
    order = {n.path: i for i, n in enumerate(facts.norms)}
    return tuple(sorted(refusals, key=lambda r: order.get(r.site, len(order))))


def _silent(_: str) -> None:
    """Progress that nobody asked for."""
