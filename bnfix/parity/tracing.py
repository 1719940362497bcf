"""From a module to an ONNX program in memory: torch's own exporter, asked quietly, its refusals in one line."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from bnfix.errors import ExportError
from bnfix.graph import quiet_export
from bnfix.running import FAILURES, Call
from bnfix.types import Refusal

RANDOM = ("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.native_dropout", "aten.rrelu")
"""Operations that draw numbers where their argument ``train`` (``training``) is set."""

FRESH = re.compile(r"aten\.(conv|linear|batch_norm|layer_norm|group_norm|add\.Tensor$|addmm)")
"""Operations whose result is always a tensor of its own, never a view of what they read."""

INPLACE = ("relu_", "relu6_", "hardtanh_", "leaky_relu_", "silu_", "hardswish_", "hardsigmoid_", "elu_", "mish_")

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
            program = torch.export.export(model, call.args, dict(call.kwargs), dynamic_shapes=shapes, strict=False)
        except (*FAILURES, torch._dynamo.exc.UserError) as error:
            raise TranslationError(f"torch.export can't trace the model: {reason(error)}") from error
    _out_of_place(program)
    return program


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
    name_batch(made.model)
    return made


def name_batch(model: Any) -> None:
    """Call the sizes of the inputs along axis 0 that may vary ``batch``, wherever torch's ``s77`` stands.

    A second symbol, of an input whose batch needs not be that of the first, is ``batch_NAME``.
    """
    ir = importlib.import_module("onnx_ir")
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        first = value.shape[0] if value.shape is not None and len(value.shape) else None
        if isinstance(first, ir.SymbolicDim) and first.value is not None:
            names.setdefault(str(first.value), f"batch_{value.name}" if names else "batch")
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    for value in [*model.graph.inputs, *(output for node in nodes for output in node.outputs)]:
        for axis, size in enumerate(value.shape if value.shape is not None else ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                renamed = pattern.sub(lambda m: names[m[1]], str(size.value))
                if renamed != size.value:
                    value.shape[axis] = ir.SymbolicDim(renamed)


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


def _out_of_place(program: ExportedProgram) -> None:
    """In-place activations whose input nobody else reads, as the same operation with a result of its own.

    torch's exporter decomposes in-place ones step by step, with a symbolic batch: half of its time on a MobileNetV2.
    """
    graph = program.graph_module.graph
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not node.args:
            continue
        read = node.args[0]
        name = target._schema.name.removeprefix("aten::")
        alone = isinstance(read, torch.fx.Node) and read.op == "call_function" and list(read.users) == [node]
        if name in INPLACE and alone and FRESH.match(str(read.target)):
            node.target = getattr(getattr(torch.ops.aten, name[:-1]), target._overloadname)
    program.graph_module.recompile()


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
