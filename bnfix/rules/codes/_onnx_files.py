"""Small ONNX files for the examples of rules; they go when Python ends."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bnfix-rules-")


def norm_file(name: str, *, training: bool = False, batch: bool = False, eps: float = 1e-5) -> str:
    """Convolution, BatchNormalization: in training mode, or with mean and variance of the batch.

    Weights are those of :func:`twin`. Returns the path.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = twin()
    norm: Any = model[1]
    tensors = {"w": model[0].weight, "scale": norm.weight, "shift": norm.bias}
    if not batch:
        tensors |= {"mean": norm.running_mean, "var": norm.running_var}
    arrays = [numpy_helper.from_array(t.detach().numpy(), n) for n, t in tensors.items()]
    outputs = ["y", "mean_out", "var_out"] if training else ["y"]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"])]
    if batch:
        nodes += [
            helper.make_node("ReduceMean", ["c"], ["wide"], axes=[0, 2, 3], keepdims=1),
            helper.make_node("ReduceMean", ["c"], ["mean"], axes=[0, 2, 3], keepdims=0),
            helper.make_node("Sub", ["c", "wide"], ["centred"]),
            helper.make_node("Mul", ["centred", "centred"], ["square"]),
            helper.make_node("ReduceMean", ["square"], ["var"], axes=[0, 2, 3], keepdims=0),
        ]
    extra: dict[str, Any] = {"training_mode": 1} if training else {}
    statistics = ["c", "scale", "shift", "mean", "var"]
    nodes.append(helper.make_node("BatchNormalization", statistics, outputs, name="bn", epsilon=eps, **extra))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, 6, 6]) for n, c in (("x", 3), ("y", 4))]
    graph = helper.make_graph(nodes, "example", ends[:1], ends[1:], arrays)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    path = Path(_folder().name) / f"{name}.onnx"
    onnx.save(proto, str(path))
    return str(path)


def twin() -> Any:
    """The model that the files are made of, always the same."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return model
