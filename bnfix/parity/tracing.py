"""From a module to an ONNX program in memory: torch's own exporter, asked quietly, its refusals in one line."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from bnfix.errors import ExportError
from bnfix.graph import quiet_export
from bnfix.parity.oracle import FAILURES
from bnfix.running import Call
from bnfix.types import Refusal

RANDOM = ("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.native_dropout", "aten.rrelu")
"""Operations that draw numbers where their argument ``train`` (``training``) is set."""

NORMS = ("aten.batch_norm", "aten._batch_norm_impl_index", "aten.native_batch_norm", "aten.cudnn_batch_norm")


class TranslationError(ExportError):
    """torch can't translate the model as asked; with a fixed batch it may."""


def trace(model: nn.Module, call: Call, *, batch: int | None) -> ExportedProgram:
    """The exported graph of ``model`` (a private copy: tracing leaves marks on it).

    ``batch`` is the size along axis 0 that is to stay variable, in every tensor that has it; None fixes all sizes.

    Raises:
        TranslationError: torch can't trace the model, or not with a variable batch.
    """
    call = call.map(lambda t: t.detach().clone())  # a failing export leaves its marks on the tensors that it was given
    shapes = None if batch is None else _dynamic_shapes(model, call, batch)
    with quiet_export(), torch.no_grad():
        try:
            return torch.export.export(model, call.args, dict(call.kwargs), dynamic_shapes=shapes, strict=False)
        except (*FAILURES, torch._dynamo.exc.UserError) as error:
            raise TranslationError(f"torch.export can't trace the model: {reason(error)}") from error


def to_onnx(program: ExportedProgram, *, opset: int | None, output_names: list[str] | None) -> Any:
    """``program`` as a ``torch.onnx.ONNXProgram``, optimized.

    Raises:
        TranslationError: torch's exporter can't translate it.
    """
    with quiet_export(), torch.no_grad():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                optimize=True,
                verify=False,
                verbose=False,
                opset_version=opset,
                output_names=output_names,
            )
        except (*FAILURES, torch.onnx.OnnxExporterError) as error:
            raise TranslationError(
                f"torch {torch.__version__} can't translate the model to ONNX: {reason(error)}",
                hint="pip install -U torch onnxscript",
            ) from error
    if made is None:
        raise TranslationError(f"torch {torch.__version__} gave no ONNX program")
    return made


def depends_on_the_batch(program: ExportedProgram) -> tuple[Refusal, ...]:
    """Calls of norms that use the statistics of their batch, and of dropout that is active, in every subgraph."""
    found: list[Refusal] = []
    for graph_module in program.graph_module.modules():
        if not isinstance(graph_module, torch.fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            name = str(node.target)
            if node.op != "call_function" or not name.startswith((*RANDOM, *NORMS)):
                continue
            if _argument(node, "training") or _argument(node, "train"):
                what = "uses the statistics of its batch" if name.startswith(NORMS) else "is active: it draws numbers"
                found.append(Refusal(_site(node), f"{name.split('.')[1]} {what}"))
    return tuple(found)


def reason(error: BaseException) -> str:
    """What went wrong at the bottom of a chain of exceptions, in one line without colours."""
    seen = error
    while seen.__cause__ is not None:
        seen = seen.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(seen)).strip()
    lines = [part.strip() for part in text.splitlines() if part.strip()] or [type(seen).__name__]
    fixed = re.search(r"constant \((\d+)\)", text)
    return f"its forward makes the batch a constant ({fixed[1]})" if fixed else lines[0][:300]


def _dynamic_shapes(model: nn.Module, call: Call, batch: int) -> dict[str, Any]:
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)

    def spec(value: Any) -> Any:
        return {0: Dim.DYNAMIC} if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch else None

    return {name: tree_map(spec, value) for name, value in bound.arguments.items()}


def _argument(node: Any, name: str) -> bool:
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(name, argument.default_value)
            return bool(value)
    return False


def _site(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0] or "(root)") if stack else "(root)"
