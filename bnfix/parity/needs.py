"""What export and verify need, asked before any work is done: packages, and an opset that can be written and run."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bnfix.errors import ExportError
from bnfix.parity.onnx_graph import onnx_package
from bnfix.parity.sessions import opens, runtime

NATIVE_OPSET = 18
"""What torch's dynamo exporter writes itself. Others are converted: newer ones always, older ones often not."""

LOWEST_OPSET = 7
"""The oldest that was ever got: a lone convolution. Most models end at 14 to 18; that is known after the conversion."""

CONVERTS_DOWN = (2, 8)
"""torch 2.7 writes nothing below 18, whatever is asked for and whatever the model."""


def check_export(opset: int | None = None, path: str | os.PathLike[str] | None = None) -> None:
    """Whether an export can succeed at all; costs the import of the packages and next to nothing else.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: no file of ``opset`` can be written, or ONNX Runtime can't run one.
        ValueError: ``path`` does not end in .onnx.
    """
    if path is not None and Path(path).suffix.lower() != ".onnx":
        raise ValueError(f"{os.fspath(path)}: an ONNX file ends in .onnx")
    onnx = onnx_package()
    runtime()
    if opset is None:
        return
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    lowest = LOWEST_OPSET if version >= CONVERTS_DOWN else NATIVE_OPSET
    highest = int(onnx.defs.onnx_opset_version())
    if not lowest <= opset <= highest:
        some = f", and some models from {lowest} on" if lowest < NATIVE_OPSET else ""
        raise ExportError(
            f"opset {opset} can't be written: torch {version[0]}.{version[1]} with onnx {onnx.__version__} "
            f"writes {NATIVE_OPSET} to {highest}{some}",
            hint=f"ask for opset {NATIVE_OPSET}, or for none",
        )
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "tried", ends[:1], ends[1:])
    runs = opens(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))
    if not runs:
        raise ExportError(
            f"ONNX Runtime {runtime().__version__} can't run a file of opset {opset}",
            hint=f"pip install -U onnxruntime, or ask for opset {NATIVE_OPSET}",
        )


def check_verify() -> None:
    """Whether an ONNX file can be run here.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    runtime()
