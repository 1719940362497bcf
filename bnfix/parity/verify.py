"""``verify``: a model against another module, an exported program, or an ONNX file of whatever exporter."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bnfix.errors import PassError
from bnfix.parity.compare import compare, compare_sites, worse
from bnfix.parity.modes import training_modules
from bnfix.parity.oracle import Recorded, Reference, record, references
from bnfix.parity.outputs import named_tensors
from bnfix.parity.rule import K_FAILS
from bnfix.parity.sessions import LEVELS, OnnxModel, Slot, match_outputs
from bnfix.running import Call, as_call, preserved
from bnfix.running.call import Forward
from bnfix.types import Parity


def verify(
    reference: nn.Module,
    other: nn.Module | ExportedProgram | str | os.PathLike[str],
    inputs: Sequence[Any],
    *,
    forward: Forward | None = None,
    k: float = K_FAILS,
    providers: Sequence[str] | None = None,
) -> Parity:
    """Changes nothing: whether ``other`` computes what ``reference`` does, on every one of ``inputs``.

    Args:
        reference: the model that is right by definition, in eval mode.
        other: a module, an exported program, or the path of an .onnx file (written by any tool).
        inputs: a list of examples: each a tensor, a tuple of arguments, a dict of keyword arguments or a Call.
        forward: how a batch is fed to a model, if not by calling it.
        k: how many times the reference's own rounding noise is too much.
        providers: execution providers of ONNX Runtime; the CPU by default.

    Raises:
        PassError: a model is in training mode, its forward fails, or no input fits the file.
        LoadError: the file can't be opened by ONNX Runtime.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    calls = _calls(inputs, forward)
    _refuse_training(reference, "the model")
    if isinstance(other, ExportedProgram):
        return _verify_program(reference, other, calls, k)
    if isinstance(other, nn.Module):
        return _verify_module(reference, other, calls, k)
    if isinstance(other, (str, os.PathLike)):
        return verify_file(reference, other, calls, k=k, providers=providers)
    raise TypeError(f"other is a module, an ExportedProgram or the path of an .onnx file, not {type(other).__name__}")


def verify_file(
    reference: nn.Module,
    path: str | os.PathLike[str] | OnnxModel,
    calls: Sequence[Call],
    *,
    k: float = K_FAILS,
    providers: Sequence[str] | None = None,
) -> Parity:
    """:func:`verify` for an ONNX file: run with all of ONNX Runtime's optimizations and with none; both must pass.

    ``path`` may be a file that is open already; ``providers`` are its own then.
    """
    file = path if isinstance(path, OnnxModel) else OnnxModel(path, providers)
    direct = [d for call in calls for d in direct_calls(reference, call)]
    named = [named_inputs(reference, call) for call in direct]
    orders = [file.order(tensors) for tensors in named]
    misfits = [file.misfit(tensors, order) for tensors, order in zip(named, orders, strict=True)]
    fitting = [i for i, why in enumerate(misfits) if not why]
    reasons = list(dict.fromkeys(why for why in misfits if why))
    if not fitting:
        pairs = ((slot, t[order[slot.name]]) for t, order in zip(named, orders, strict=True) for slot in file.inputs)
        first = next((slot, slot.wrong_axes(t)) for slot, t in pairs if slot.wrong_axes(t))
        raise PassError(f"no input fits {file.path.name}: {reasons[0]}", hint=_next_input(*first))
    notes = [f"{why}: {misfits.count(why)} of {len(direct)} inputs were not judged" for why in reasons]
    notes += file.rounds(named[fitting[0]], orders[fitting[0]])
    refs = references(reference, [direct[i] for i in fitting])
    parities = []
    for level in LEVELS:
        runs = [
            match_outputs(list(ref.draws[0].outputs), file.outputs, file.run(named[i], orders[i], level))
            for ref, i in zip(refs, fitting, strict=True)
        ]
        found = versions("torch", "onnx", "onnxruntime")
        label, where = file.path.name, file.providers
        parities.append(compare(refs, runs, k=k, candidate=label, notes=notes, versions=found, providers=where))
    return worse(parities[0], parities[1], LEVELS)


def _next_input(slot: Slot, wrong: Sequence[int]) -> str:
    if wrong == [0]:
        return f"give inputs of {slot.sizes}, or export the model again with a batch that may vary"
    return f"give inputs of {slot.sample}{'' if slot.sample == slot.sizes else ', any batch'}"


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of ``packages``; those that are absent are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def direct_calls(model: nn.Module, call: Call) -> list[Call]:
    """What ``model`` itself is called with inside ``call.forward``; ``call`` where there is none.

    Raises:
        PassError: the forward never calls the model, or fails.
    """
    if call.forward is None:
        return [call]
    seen: list[Call] = []
    with preserved(model), torch.no_grad():
        handle = model.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(Call(args, dict(kwargs))), with_kwargs=True
        )
        try:
            record(model, call)
        finally:
            handle.remove()
    if not seen:
        raise PassError("the given forward never calls the model itself", hint="forward=lambda m, b: m(b[0])")
    return seen


def named_inputs(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """The tensors of ``call`` by the names of forward's parameters, in their order.

    Raises:
        PassError: the call does not fit forward's parameters.
    """
    try:
        bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise PassError(f"{call.signature} does not fit forward: {error}") from error
    found: dict[str, Tensor] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        spread: Mapping[str, Any] = value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        for key, item in spread.items():
            found.update(named_tensors(item, key))
    return found


def _calls(inputs: Sequence[Any], forward: Forward | None) -> list[Call]:
    if isinstance(inputs, (Tensor, tuple, Mapping, Call)):
        raise TypeError(f"inputs is a list of examples: [example], not a {type(inputs).__name__}")
    calls = [as_call(example, forward) for example in inputs]
    if not calls:
        raise ValueError("inputs is empty: nothing can be verified")
    return calls


def _refuse_training(model: nn.Module, what: str) -> None:
    found = training_modules(model)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise PassError(
            f"{what} is in training mode ({found[0].site}: {found[0].reason}{more}): its outputs are not repeatable",
            hint="model.eval()",
        )


def _verify_module(reference: nn.Module, other: nn.Module, calls: Sequence[Call], k: float) -> Parity:
    _refuse_training(other, "the other model")
    refs = references(reference, calls)
    runs = [record(other, call) for call in calls]
    parity = compare(refs, runs, k=k, candidate=type(other).__name__, versions=versions("torch"))
    if parity.verdict != "failed":
        return parity
    return _with_divergence(parity, reference, other, refs, runs)


def _with_divergence(
    parity: Parity, reference: nn.Module, other: nn.Module, refs: Sequence[Reference], runs: Sequence[Recorded]
) -> Parity:
    """``parity`` with the first layer that is too far off, where both have the same layers under the same names."""
    from dataclasses import replace

    leaves = {path: type(m) for path, m in reference.named_modules() if path and not any(m.children())}
    if leaves != {path: type(m) for path, m in other.named_modules() if path and not any(m.children())}:
        return parity
    bad = next(r for r, run in zip(refs, runs, strict=True) if not compare([r], [run], k=parity.k).passed)
    ref = references(reference, [bad.call], sites=list(leaves))
    found = compare_sites(ref, [record(other, bad.call, list(leaves))], k=parity.k)
    return replace(parity, first_divergence=next((o.name for o in found if o.verdict == "failed"), None))


def _verify_program(reference: nn.Module, program: ExportedProgram, calls: Sequence[Call], k: float) -> Parity:
    module = program.module()
    direct = [d for call in calls for d in direct_calls(reference, call)]
    runs: list[Recorded] = []
    judged: list[Call] = []
    misfits: list[str] = []
    for call in direct:
        try:
            runs.append(record(module, call))
            judged.append(call)
        except PassError as error:
            misfits.append(error.message)
    if not judged:
        raise PassError(f"no input fits the exported program: {misfits[0]}", hint="export it with a dynamic batch")
    notes = [f"{len(misfits)} of {len(direct)} inputs were not judged: {misfits[0]}"] if misfits else []
    refs = references(reference, judged)
    return compare(refs, runs, k=k, candidate="the exported program", notes=notes, versions=versions("torch"))
