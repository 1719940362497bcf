"""What is wrong with a model, with evidence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from bnfix.api.asked import Progress, check_model, silent
from bnfix.errors import BnfixError, TraceError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from bnfix.rules import Baseline, Selection
    from bnfix.running.call import Forward
    from bnfix.types import Diagnosis, Evidence


def check(
    model: nn.Module | ExportedProgram | Mapping[str, Tensor] | str | os.PathLike[str],
    example: Any = None,
    *,
    data: Iterable[Any] | None = None,
    role: Literal["train", "val"] = "train",
    val_data: Iterable[Any] | None = None,
    against: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    mask: str | Callable[[Any], Any] | None = None,
    max_samples: int | None = None,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    per_layer_ignores: Mapping[str, str | Iterable[str]] | None = None,
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
    baseline: Diagnosis | Baseline | str | os.PathLike[str] | None = None,
    forward: Forward | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> Diagnosis:
    """Find what is wrong with the norms of ``model``: changes nothing, to the bit.

    A rule runs where its evidence is there; every other one is listed in ``skipped`` with what it needs, and how many
    they are stands in the verdict. Statistics come from ``model`` itself, the graph from ``example``, everything about
    batches from ``data``.

    Args:
        model: in any mode. Or an exported program; or a state_dict, or a file that holds one: then values alone are
            judged; or the path of an ONNX file, or (with ``trust``) of a pickled module.
        example: as for ``fold``. None: the first batch of ``data``; without either, no graph.
        data: what a training loop iterates over. A part of it is read, once.
        role: what ``data`` is. Batches are judged where they are trained on; a validation loader is sorted and has a
            small last batch by right.
        val_data: the data of deployment, to be compared with what the statistics come from (BN306).
        against: the model or weights that this one was averaged or converted from (BN207, BN208); of an ONNX file the
            model that it was exported from, to be compared with on ``example`` or ``data`` (BN504).
        mask: as for ``recalibrate``.
        max_samples: read no more than this; None: as many as the rules need.
        select: codes (``"BN204"``) or their beginnings (``"BN2"``); default: all that are not off by default.
        ignore: codes that are not wanted; goes before ``select``. A module says so itself by ``module.bnfix_ignore``.
        per_layer_ignores: patterns of module paths (``"backbone.*"``) with the codes that are not wanted there.
        thresholds: by code, such as ``{"BN301": {"name": 0.5}}``; ``bnfix.explain`` names them.
        baseline: an earlier diagnosis, or the JSON report of one: what it holds is told no more.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch.
        trust: load a file that holds a pickled module, which runs its own code.
        progress: called with a line before each step.

    Raises:
        ValueError: a code or a threshold that there is not; names those that are near.
        PassError: the forward fails on the example.
        CalibrationError: the data raises, is empty, or holds NaN or Inf.
        LoadError: ``model`` is a path, and that file is neither of the two.
    """
    from bnfix import rules
    from bnfix.api.fixing import python_line, with_lines

    if role not in ("train", "val"):
        raise ValueError(f'role is what data is, "train" or "val", not {role!r}')
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is at least 1, not {max_samples}")
    selection, limits = _asked(select, ignore, per_layer_ignores or {}, thresholds or {})
    known = baseline if baseline is None or isinstance(baseline, rules.Baseline) else rules.read_baseline(baseline)
    bound = {"data": data, "val_data": val_data, "mask": mask, "max_samples": max_samples, "forward": forward}
    how = {name: value for name, value in bound.items() if value is not None}
    gathered = _evidence(model, example, against, trust, progress or silent, role=role, **how)
    found = rules.judge(replace(gathered, options=limits), selection)
    if gathered.onnx is not None:
        found = replace(found, norms=len(gathered.onnx.norms))
    if known is not None:
        found = known.without_known(found)
    return with_lines(found, lambda _, fix: python_line(fix))


def explain(code: str) -> str:
    """The page of a rule (``"BN204"`` or ``"stale-stats"``) in Markdown: what it finds, why, and what heals it.

    Raises:
        ValueError: there is no such rule; names those that are near.
    """
    from bnfix import rules

    rule = rules.rule_of(code)
    if rule is None:
        near = rules.near_codes(code) or [f"{r.code} {r.name}" for r in rules.all_rules()]
        raise ValueError(f"there is no rule {code!r}; there is {', '.join(near)}")
    return rules.page_of_rule(rule)


def _asked(
    select: str | Iterable[str],
    ignore: str | Iterable[str],
    by_site: Mapping[str, str | Iterable[str]],
    thresholds: Mapping[str, Mapping[str, float]],
) -> tuple[Selection, Mapping[str, Mapping[str, float]]]:
    from bnfix import rules

    selection = rules.Selection(_codes(select), _codes(ignore), {p: _codes(c) for p, c in by_site.items()})
    try:
        for name, asked in (("select", selection.select), ("ignore", selection.ignore)):
            rules.check_codes(asked, name)
        for pattern, asked in selection.by_site.items():
            rules.check_codes(asked, f"per_layer_ignores {pattern!r}")
        return selection, rules.check_thresholds(thresholds, "thresholds")
    except BnfixError as error:  # wrong arguments, in Python
        raise ValueError(str(error)) from error


def _codes(given: str | Iterable[str]) -> tuple[str, ...]:
    listed = given.split(",") if isinstance(given, str) else given
    return tuple(code.strip() for code in listed)


def _evidence(model: Any, example: Any, against: Any, trust: bool, say: Progress, **how: Any) -> Evidence:
    """Everything there is to judge by, whatever form the model has."""
    import torch

    from bnfix import evidence, formats
    from bnfix.graph import unwrap

    if isinstance(model, (str, os.PathLike)):
        if formats.sniff(model).kind == "onnx":
            return _of_onnx(model, example, against, **how)
        _check_alone(how, "a file")
        found = evidence.of_file(model, example, trust=trust, say=say)
    elif isinstance(model, Mapping):
        _check_alone(how if example is None else {**how, "example": example}, "a state_dict")
        found = evidence.of_weights(model)
    elif isinstance(model, torch.export.ExportedProgram):
        found = _of_program(model, example, say, **how)
    elif isinstance(model, torch.jit.ScriptModule):
        found = _of_script(model, example, say, **how)
    else:
        check_model(model)
        model, notes = unwrap(model)
        found = evidence.of_model(model, example, say=say, **how)
        found = replace(found, notes=(*notes, *found.notes))
    return found if against is None else evidence.with_reference(found, model, against, trust=trust)


def _check_alone(how: Mapping[str, Any], what: str) -> None:
    given = [name for name in ("example", "data", "val_data") if name in how]
    if given:
        raise ValueError(f"{given[0]} goes with a model, and {what} is none yet: bnfix.load(path, arch=...)")


def _of_onnx(path: str | os.PathLike[str], example: Any, against: Any, **how: Any) -> Evidence:
    """An ONNX file, compared with the model ``against`` where there is one and something to run both on."""
    from bnfix import evidence
    from bnfix.api.asked import read_calls

    if against is None or (example is None and "data" not in how):
        return evidence.of_onnx(path)
    check_model(against)
    calls, notes = read_calls(against, example, how.get("data"), how.get("forward"))
    found = evidence.of_onnx(path, against, calls)
    return replace(found, notes=(*found.notes, *notes))


def _of_program(program: ExportedProgram, example: Any, say: Progress, **how: Any) -> Evidence:
    from bnfix import evidence
    from bnfix.graph import from_exported

    found = evidence.of_program(program, example, say=say)
    if "data" not in how:
        return found
    measured = evidence.of_model(from_exported(program), example, say=say, **how)
    return replace(found, data=measured.data, notes=tuple(dict.fromkeys((*found.notes, *measured.notes))))


def _of_script(model: Any, example: Any, say: Progress, **how: Any) -> Evidence:
    """A TorchScript program as a module where torch can convert it, else its values: a traced one has no settings."""
    from bnfix import evidence
    from bnfix.graph import from_script
    from bnfix.running import as_call

    call = None
    if "data" in how:  # read once: the conversion looks at the first batch of it, and a generator has no other
        reading = {name: how.get(name) for name in ("forward", "mask", "max_samples")}
        how["data"] = evidence.sample_of(model, how["data"], progress=say, **reading)
        call = how["data"].chunks[0].call
    if example is not None:
        call = as_call(example[0] if isinstance(example, list) else example, how.get("forward"))
    why = "the graph of TorchScript takes example= (on the command line: --input)"
    if call is not None:
        try:
            return evidence.of_model(from_script(model, call), example, say=say, **how)
        except TraceError as error:
            why = f"the graph can't be had: {error.message}"
    found = evidence.of_weights(model.state_dict())
    return replace(found, facts_missing=why, notes=(*found.notes, f"values alone were judged: {why}"))
