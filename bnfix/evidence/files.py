"""Files and exported programs as evidence, and a model or file beside a reference."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bnfix import formats, parity
from bnfix.errors import BnfixError, LoadError
from bnfix.evidence.gathering import Say, of_model
from bnfix.evidence.weights import MEAN, VAR, of_weights
from bnfix.formats.names import wrapped_by_training
from bnfix.graph import drawn_example, from_exported, norm_states, unwrap
from bnfix.running import Call
from bnfix.running.call import Forward
from bnfix.types import Evidence, NormState

_COUNTER = "num_batches_tracked"


def of_program(program: ExportedProgram, example: Any = None, *, say: Say = lambda _line: None) -> Evidence:
    """An exported program: its graph says in which mode each norm is. It is run on ``example``, or on its own inputs.

    It is made a module again, and traced as one; where that fails, ``facts_missing`` says why.
    """
    try:
        module = from_exported(program)
        call = example if example is not None else Call(*drawn_example(program))
    except BnfixError as error:
        weights = of_weights(program.state_dict)
        return replace(weights, program=True, facts_missing=f"the program can't be read: {error.message}")
    found = of_model(module, call, say=say)
    # What torch's class would say is not there: a norm in training mode stays a call with its buffers.
    norms = tuple(n if n.tracks is not None else replace(n, frozen_class=False) for n in found.norms or ())
    return replace(found, norms=norms, program=True, facts_training=None)


def of_onnx(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    inputs: Sequence[Any] = (),
    *,
    forward: Forward | None = None,
) -> Evidence:
    """An ONNX file: its norms; with a ``model`` in evaluation mode and ``inputs``, whether it computes the same.

    Raises:
        LoadError: the file is no ONNX model.
        PassError: no input fits, or the model is in training mode.
        MissingDependencyError: onnx, or for the comparison ONNX Runtime, is not installed.
    """
    facts = parity.onnx_facts(path)
    if model is not None and inputs:
        facts = replace(facts, parity=parity.verify(unwrap(model)[0], path, list(inputs), forward=forward))
    return Evidence(onnx=facts)


def of_file(
    path: str | os.PathLike[str],
    example: Any = None,
    *,
    trust: bool = False,
    say: Say = lambda _line: None,
) -> Evidence:
    """Whatever a file holds: weights (their values alone), an ONNX model, an exported program, a pickled module.

    Nothing is unpickled but by torch's safe loader, unless ``trust`` is given. With an architecture, load the model
    first and take :func:`of_model`.

    Raises:
        LoadError: it can't be read as any of these; the message says what it is and what to do.
    """
    info = formats.sniff(path)
    if info.kind == "onnx":
        return of_onnx(path)
    if info.kind in ("exported_program", "pickled_module", "torchscript"):
        value = formats.load(path, trust=trust).value
        if isinstance(value, ExportedProgram):
            return of_program(value, example, say=say)
        if isinstance(value, nn.Module):
            return of_model(value, example, say=say)
    tensors, notes = formats.weights(path, trust=trust)
    return of_weights(tensors, notes)


def with_reference(evidence: Evidence, of: Any, against: Any, *, trust: bool = False) -> Evidence:
    """``evidence`` of ``of`` beside a reference: its norms by the names of ``of``, and whether other weights differ.

    Both are a module, tensors by name, or a file of weights (or of a pickled module, with ``trust``). Names are
    compared without what training wrappers (``module.``, ``_orig_mod.``) put before them.

    Raises:
        LoadError: the reference can't be read, or has no norm in common with ``of``.
    """
    mine, _ = _table(of, trust)
    theirs, norms = _table(against, trust)
    rename = wrapped_by_training(mine)
    paths = {_plain(rename, p): p for n in evidence.norms or () for p in n.paths}
    other = wrapped_by_training(theirs)
    found = []
    for norm in norms:
        path = next((paths[p] for p in (_plain(other, p) for p in norm.paths) if p in paths), None)
        if path is not None:
            found.append(replace(norm, path=path, paths=(path,)))
    if not found and evidence.norms:
        first = norms[0].path if norms else "none at all"
        raise LoadError(
            f"the reference has no norm of the same name: {first} there, {evidence.norms[0].path} here",
            hint="compare two states of one model",
        )
    return replace(evidence, against=tuple(found), weights_moved=_moved(mine, rename, theirs, other))


def of_pair(subject: Any, against: Any, example: Any = None, *, trust: bool = False, **options: Any) -> Evidence:
    """A model, its weights or a file of it beside a reference: what is known of ``subject``, and both compared.

    An ONNX file is compared with the model ``against`` by running both on ``example``. ``options`` are those of
    :func:`of_model`, where ``subject`` is a module.

    Raises:
        LoadError: a file can't be read, or the two have no norm in common.
    """
    if isinstance(subject, (str, os.PathLike)) and formats.sniff(subject).kind == "onnx":
        if not isinstance(against, nn.Module):
            raise LoadError(
                f"{os.fspath(subject)} is an ONNX model: it is compared with a model of torch",
                hint="bnfix verify weights.pt model.onnx --arch timm:resnet50",
            )
        examples = example if isinstance(example, list) else [] if example is None else [example]
        return of_onnx(subject, against, examples, forward=options.get("forward"))
    return with_reference(of(subject, example, trust=trust, **options), subject, against, trust=trust)


def of(subject: Any, example: Any = None, *, trust: bool = False, **options: Any) -> Evidence:
    """Whatever ``subject`` is: a module, an exported program, tensors by name, or a file of any of these or of ONNX.

    ``options`` are those of :func:`of_model`, and count where ``subject`` is a module.
    """
    say: Say = options.get("say", lambda _line: None)
    if isinstance(subject, nn.Module):
        return of_model(unwrap(subject)[0], example, **options)
    if isinstance(subject, ExportedProgram):
        return of_program(subject, example, say=say)
    if isinstance(subject, Mapping):
        return of_weights(subject)
    return of_file(subject, example, trust=trust, say=say)


def _table(value: Any, trust: bool) -> tuple[Mapping[str, Any], tuple[NormState, ...]]:
    """Tensors by name, and norms, of a module, a mapping or a file."""
    if isinstance(value, (str, os.PathLike)):
        info = formats.sniff(value)
        if info.kind in ("pickled_module", "exported_program"):
            value = formats.load(value, trust=trust).value
        elif info.kind == "onnx":
            raise LoadError(f"{info.path} is an ONNX model: a reference is a file of weights, or a model of torch")
        else:
            value = formats.weights(value, trust=trust)[0]
    if isinstance(value, nn.Module):
        value = unwrap(value)[0]
        named = [*value.named_parameters(), *value.named_buffers()]
        return {k: v for k, v in named if not torch.nn.parameter.is_lazy(v)}, norm_states(value)
    held = value.state_dict if isinstance(value, ExportedProgram) else value
    tensors = {k: v for k, v in held.items() if isinstance(k, str)}
    return tensors, of_weights(tensors).norms or ()


def _plain(rename: Any, path: str) -> str:
    return str(rename(f"{path}.")).removesuffix(".")


def _moved(mine: Mapping[str, Any], rename: Any, theirs: Mapping[str, Any], other: Any) -> bool | None:
    """Whether any tensor but the statistics differs; None where there are none to compare."""
    reference = {other(k): v for k, v in theirs.items()}
    compared = False
    for key, tensor in mine.items():
        twin = reference.get(rename(key))
        last = key.rpartition(".")[2]
        if last in (MEAN, VAR, _COUNTER) or not isinstance(tensor, Tensor) or not isinstance(twin, Tensor):
            continue
        if tensor.shape != twin.shape or not tensor.is_floating_point() or tensor.is_meta or twin.is_meta:
            continue
        compared = True
        if not torch.equal(tensor.detach().cpu(), twin.detach().cpu().to(tensor.dtype)):
            return True
    return False if compared else None
