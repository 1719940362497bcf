"""``export``: a model to an ONNX file that was checked, run and compared before it is put in its place."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bnfix.errors import BnfixError, ExportError, PassError
from bnfix.files import check_target
from bnfix.graph import quiet_export
from bnfix.parity.modes import norms_without_statistics, training_modules
from bnfix.parity.needs import check_export
from bnfix.parity.onnx_graph import check_file, norms_left, onnx_package, opset_of
from bnfix.parity.oracle import _private_copy, record
from bnfix.parity.outputs import nesting
from bnfix.parity.probes import accepted, batch_size, probe_calls
from bnfix.parity.sessions import LEVELS, OnnxModel, spelling
from bnfix.parity.tracing import TranslationError, depends_on_the_batch, to_onnx, trace
from bnfix.parity.verify import direct_calls, named_inputs, verify_file
from bnfix.running import Call
from bnfix.types import Export, Parity, Refusal

EXTERNAL_FROM = 1_500_000_000
"""Bytes of weights from which they go into a file of their own: protobuf ends at 2 GB."""


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    call: Call,
    *,
    opset: int | None = None,
    dynamic: bool = True,
    verify: bool = True,
    k: float = 8.0,
    inputs: Sequence[Call] = (),
    reference: nn.Module | None = None,
    refusals: Sequence[Refusal] = (),
    folded: int = 0,
    providers: Sequence[str] | None = None,
) -> Export:
    """Write ``model`` as an ONNX file at ``path``; the model is left as it was.

    The file is made beside its place, checked (onnx's full check, opset, other batch sizes), compared
    with ``reference`` on probes derived from ``call`` and on ``inputs``, and only then moved there. One that
    fails the comparison is not kept: then ``files`` is empty and the notes say so.

    Args:
        opset: version of the ONNX operators; None leaves the choice to torch.
        dynamic: keep the batch variable (where the model allows it; otherwise the notes say why not).
        verify: compare; False leaves ``parity`` None.
        reference: what the file is compared with; the model itself by default (give the unfolded original).
        refusals: norms that were left on purpose and why, to name those that are found in the file.
        folded: how many norms were folded before, for the report.

    Raises:
        ExportError: the model is in training mode or depends on its batch, torch can't export it, or the file is not
            what was asked for. Nothing was written.
        MissingDependencyError: onnx, onnxscript or onnxruntime is absent.
        ValueError: ``path`` does not end in .onnx.
    """
    check_export(opset, path)
    onnx = onnx_package()
    check_target(path)
    _refuse(training_modules(model), "in training mode", "model.eval()")
    _refuse(
        norms_without_statistics(model),
        "without statistics",
        "train it with track_running_stats=True, or use a norm without batch statistics (GroupNorm)",
    )
    target = Path(path).resolve()
    notes: list[str] = []
    if call.forward is not None:
        call = direct_calls(model, call)[0]
        notes.append("the file holds the model itself: what the given forward does around it is not in it")
    size = batch_size(call)
    structure, names = _outputs(model, call)
    tried = probe_calls(call, sorted({1, 2, 5, size or 1}))
    probes, rejected = accepted(model, tried if dynamic else [p for p in tried if batch_size(p) == size])
    probes = [call, *probes]
    sizes = sorted({batch_size(p) or 0 for p in probes})
    if dynamic and size is not None and rejected and len(sizes) == 1:
        notes.append(f"the model itself runs with a batch of {size} only: so does the file")
    wanted = dynamic and len(sizes) > 1
    with _beside(target) as folder:
        file = folder / target.name
        reasons: list[str] = []
        for free in (True, False) if wanted else (False,):
            try:
                program = _program(model, _traced(call, probes) if free else call, opset, names, dynamic=free)
                _save(program, file, opset)
                opened = OnnxModel(file, providers)
                misfits = _misfits(model, opened, probes) if free else ()
            except TranslationError as error:
                if not free:
                    raise ExportError(error.message, hint=error.hint) from error
                reasons.append(error.message)
                continue
            if not misfits:
                break
            reasons.append(misfits[0])
        if reasons:
            notes.append(f"the batch is frozen to {size}: {reasons[0]}")
            probes = [p for p in probes if batch_size(p) == size]
        proto = onnx.load(str(file), load_external_data=False)
        notes += _fixed_sizes(model, opened, [call, *inputs])
        if structure != "tensor":
            notes.append(f"the model returns {structure}; the file's outputs are {', '.join(opened.outputs)}")
        parity: Parity | None = None
        if verify:
            parity = verify_file(reference or model, opened, [*probes, *inputs], k=k)
        result = Export(
            path=os.fspath(path),
            opset=opset_of(proto),
            norms_left=norms_left(proto, refusals),
            parity=parity,
            folded=folded,
            inputs=tuple(map(str, opened.inputs)),
            outputs=opened.outputs,
            notes=tuple(notes),
        )
        if parity is not None and parity.verdict == "failed":
            notes.append(f"{target.name} was NOT written: it does not compute what the model does")
            return replace(result, notes=tuple(notes))
        moved = _move(folder, target)
    return replace(result, files=tuple(os.path.join(os.path.dirname(result.path), name) for name in moved))


def _refuse(found: Sequence[Refusal], what: str, hint: str) -> None:
    if found:
        shown = "; ".join(f"{r.site}: {r.reason}" for r in found[:3])
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ExportError(f"the model has layers {what}, nothing was written: {shown}{more}", hint=hint)


def _program(model: nn.Module, call: Call, opset: int | None, names: list[str] | None, *, dynamic: bool) -> Any:
    program = trace(_private_copy(model), call, batch=batch_size(call) if dynamic else None)
    _refuse(
        depends_on_the_batch(program),
        "whose output depends on more than the input",
        "F.dropout(x, training=self.training), F.batch_norm(..., training=self.training), then model.eval()",
    )
    if names is not None and len(names) != len(program.graph_signature.user_outputs):
        names = None  # outputs that are no tensors: the exporter's own names
    return to_onnx(program, opset=opset, output_names=names)


def _save(program: Any, file: Path, opset: int | None) -> None:
    weights = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None)
    with quiet_export():
        program.save(str(file), external_data=weights > EXTERNAL_FROM)
    check_file(file)
    got = opset_of(onnx_package().load(str(file), load_external_data=False))
    if opset is not None and got != opset:
        raise ExportError(
            f"opset {opset} was asked for, torch's exporter wrote opset {got}: nothing was written",
            hint=f"ask for opset {got}, or for none",
        )


def _fixed_sizes(model: nn.Module, opened: OnnxModel, calls: Sequence[Call]) -> list[str]:
    """What is fixed in the file although the calls come in several sizes (the batch aside)."""
    found: list[str] = []
    for call in calls:
        try:
            given = [named_inputs(model, direct) for direct in direct_calls(model, call)]
            orders = [(named, opened.order(named)) for named in given]
        except PassError:  # an input of another kind: the comparison says so
            continue
        for named, order in orders:
            for slot in opened.inputs:
                tensor = named[order[slot.name]]
                axes = [axis for axis in slot.wrong_axes(tensor) if axis > 0]
                if axes:
                    image = tensor.dim() == 4 and axes[0] >= 2
                    size = slot.sizes.split("x", 2)[2] if image else slot.sizes
                    what = "image size" if image else f"size of {slot.name}"
                    found.append(f"the {what} is fixed at {size} in this file")
    return list(dict.fromkeys(found))


def _misfits(model: nn.Module, opened: OnnxModel, probes: Sequence[Call]) -> tuple[str, ...]:
    """Why the file does not run with every batch size that the model runs with."""
    found: list[str] = []
    for probe in probes:
        named = named_inputs(model, probe)
        order = opened.order(named)
        why = opened.misfit(named, order)
        try:
            why = why or ("" if opened.run(named, order, LEVELS[1]) else "no outputs")
        except PassError as error:
            why = error.message
        found += [f"with a batch of {batch_size(probe)}: {why}"] if why else []
    return tuple(found)


def _traced(call: Call, probes: Sequence[Call]) -> Call:
    """The call to trace with: torch.export takes sizes of 0 and 1 for constants."""
    return next((p for p in probes if (batch_size(p) or 0) > 1), call)


def _outputs(model: nn.Module, call: Call) -> tuple[str, list[str] | None]:
    """The nesting of the outputs, and names for them: ``out['logits']`` → ``logits``, ``out[0]`` → ``out_0``.

    No names where they would collide: then torch's exporter chooses.

    Raises:
        PassError: the model's own forward fails on the example.
    """
    seen: list[str] = []
    handle = model.register_forward_hook(lambda _m, _i, output: seen.append(nesting(output)))
    try:
        outputs = record(model, call).outputs
    finally:
        handle.remove()
    inputs = {spelling(n) for n in named_inputs(model, call)}
    names = [spelling(re.sub(r"^out(\['|\.)(?=\D)", "", name)) for name in outputs]
    names = [f"out_{n}" if n in inputs else n for n in names]
    return seen[0], names if len(set(names)) == len(names) and not inputs & set(names) else None


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` for what is not finished; gone afterwards, whatever happens."""
    folder = target.parent / f".bnfix-{secrets.token_hex(6)}"
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        raise BnfixError(f"{target.name} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> list[str]:
    """Everything in ``folder`` to beside ``target``, the model last; on failure the old files are back."""
    names = sorted((p.name for p in folder.iterdir()), key=lambda n: n == target.name)
    backup = folder / "replaced"
    backup.mkdir()
    done: list[str] = []
    try:
        for name in names:
            final = target.parent / name
            if final.exists():
                shutil.copymode(final, folder / name)
                _keep(final, backup / name)
            done.append(name)
            with open(folder / name, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(folder / name, final)
    except BaseException:
        for name in done:
            if (backup / name).exists():
                os.replace(backup / name, target.parent / name)
            elif not (folder / name).exists():
                (target.parent / name).unlink(missing_ok=True)
        raise
    return names[::-1]


def _keep(file: Path, copy: Path) -> None:
    try:
        os.link(file, copy)
    except OSError:  # a file system without hard links
        shutil.copy2(file, copy)
