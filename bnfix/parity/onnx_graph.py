"""What is inside a written ONNX file: checks that need the graph, not a run."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bnfix.errors import ExportError, MissingDependencyError
from bnfix.types import Refusal


def onnx_package() -> Any:
    """The onnx package.

    Raises:
        MissingDependencyError: it, or onnxscript (which torch's exporter writes with), is not installed.
    """
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError(package, "onnx", "exporting to ONNX") from error
    return importlib.import_module("onnx")


def check_file(path: Path) -> None:
    """The full check of onnx: schemas, types and shapes.

    Raises:
        ExportError: the exporter wrote something that is no valid ONNX.
    """
    onnx = onnx_package()
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        line = str(error).strip().splitlines()[0]
        raise ExportError(f"torch's exporter wrote an invalid ONNX file, nothing was kept: {line}") from error


def opset_of(model: Any) -> int:
    """The version of the standard operators that the file asks for."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def norms_left(model: Any, refusals: Sequence[Refusal] = ()) -> tuple[Refusal, ...]:
    """Every BatchNormalization node by the module it came from, with the reason in ``refusals`` where there is one."""
    known = {r.site: r for r in refusals}
    found: dict[str, Refusal] = {}
    nodes = list(_nodes(model))
    makers = {output: node.op_type for node in nodes for output in node.output}
    for node in nodes:
        if node.op_type != "BatchNormalization":
            continue
        site, behind = _site(node), makers.get(node.input[0], "the input")
        reason = f"a BatchNormalization node behind {behind}, which neither bnfix nor torch's exporter folded"
        found[site] = known.get(site) or Refusal(site, reason)
    return tuple(found.values())


def _nodes(model: Any) -> Iterator[Any]:
    """All nodes: those of functions and of subgraphs (branches, loop bodies) too."""
    pending = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    while pending:
        node = pending.pop(0)
        yield node
        for attribute in node.attribute:
            pending += attribute.g.node
            for graph in attribute.graphs:
                pending += graph.node


def _site(node: Any) -> str:
    """The module path: as the exporter noted it, else as the name of the running mean tells it."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = [s for s in ast.literal_eval(entry.value)[:-1] if s]
            if scopes:
                return str(scopes[-1])
    for name in node.input[3:4]:
        if name.endswith(".running_mean"):
            return str(name.removesuffix(".running_mean"))
    return str(node.name or node.output[0])
