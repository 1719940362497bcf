"""The norms of an ONNX file: which are in training mode, and which normalise with statistics of the batch."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bnfix.errors import LoadError, MissingDependencyError, one_line
from bnfix.parity.onnx_graph import _site, opset_of
from bnfix.types import OnnxFacts, OnnxNorm

ROLES = ("X", "scale", "B", "mean", "var")
"""The inputs of BatchNormalization."""

_DICE = ("Random", "Multinomial", "Bernoulli")
_SAME = frozenset({"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand"})
_TO_DEVIATION = _SAME | {"Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Pow", "Max", "Clip"}
_TYPICAL = ((0, 2), (0, 2, 3), (0, 2, 3, 4))
_DEPTH = 12


def onnx_facts(path: str | os.PathLike[str]) -> OnnxFacts:
    """What the file at ``path`` says of its norms; nothing is run, and no weights outside of the file are read.

    Raises:
        LoadError: no ONNX model, or a damaged one.
        MissingDependencyError: the package onnx is not installed.
    """
    try:
        onnx = importlib.import_module("onnx")
        inliner = importlib.import_module("onnx.inliner")
    except ImportError as error:
        raise MissingDependencyError("onnx", "onnx", "looking into an ONNX file") from error
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
        if model.functions:
            model = inliner.inline_local_functions(model)
    except Exception as error:  # protobuf and the inliner have no errors of their own in common
        raise LoadError(f"{os.fspath(path)} can't be read as ONNX: {one_line(error, 200)}") from error
    opset = opset_of(model)
    norms: list[OnnxNorm] = []
    batch: list[str] = []
    for graph in _graphs(model.graph, frozenset()):
        mine = [n for n in graph.nodes if n.op_type == "BatchNormalization" and n.domain in ("", "ai.onnx")]
        norms += [_norm(node, graph, opset) for node in mine]
        batch += _taken_apart(onnx, model, graph)
    return OnnxFacts(os.fspath(path), tuple(norms), opset, tuple(dict.fromkeys(batch)))


@dataclass
class _Graph:
    """One graph of the file, the model's or that of a branch, with what is known in it without any input."""

    nodes: list[Any]
    constants: set[str]
    makers: dict[str, Any] = field(default_factory=dict)
    initializers: dict[str, Any] = field(default_factory=dict)


def _graphs(proto: Any, known: Iterable[str]) -> Iterator[_Graph]:
    graph = _Graph(list(proto.node), {*known, *(i.name for i in proto.initializer)})
    graph.constants |= {i.values.name for i in proto.sparse_initializer}
    graph.initializers = {i.name: i for i in proto.initializer}
    for node in graph.nodes:  # in the order in which they run, as the standard demands
        inner = [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]
        read = [i for i in node.input if i]
        fixed = node.op_type == "Constant" or (bool(read) and graph.constants.issuperset(read) and not inner)
        if fixed and not node.op_type.startswith(_DICE):
            graph.constants |= set(node.output)
        graph.makers.update({o: node for o in node.output if o})
        for sub in inner:
            yield from _graphs(sub, graph.constants)
    yield graph


def _norm(node: Any, graph: _Graph, opset: int) -> OnnxNorm:
    given = {a.name: a for a in node.attribute}
    if opset >= 14:
        training = "training_mode" in given and given["training_mode"].i == 1
    elif opset >= 7:
        training = sum(bool(o) for o in node.output) > 1  # the statistics come out as well: so it was told apart then
    else:
        training = not ("is_test" in given and given["is_test"].i)
    computed = tuple(r for r, name in zip(ROLES[1:], node.input[1:], strict=False) if name not in graph.constants)
    return OnnxNorm(_path(node), training, computed, given["epsilon"].f if "epsilon" in given else 1e-5)


# ------------------------------------------------------------------- batch statistics, operation by operation


def _taken_apart(onnx: Any, model: Any, graph: _Graph) -> Iterator[str]:
    """Sites where (x − mean(x)) is divided by a deviation, both over the batch and all positions, of data."""
    ranks: dict[str, int] | None = None
    for node in graph.nodes:
        if node.op_type != "ReduceMean" or node.input[0] in graph.constants:
            continue
        axes = _axes(onnx, node, graph)
        if not axes or (0 not in axes and min(axes) >= 0):
            continue
        ranks = _ranks(onnx, model) if ranks is None else ranks
        over = _over_batch(axes, ranks.get(node.input[0]))
        if over is None:
            continue
        x = _through(node.input[0], graph)
        for centred in _users(node.output[0], "Sub", graph):
            if _through(centred.input[0], graph) != x or _through(centred.input[1], graph) != node.output[0]:
                continue
            scaled = next((n for n in _users(centred.output[0], ("Div", "Mul"), graph)
                           if _is_scaled(onnx, n, centred.output[0], x, axes, graph)), None)  # fmt: skip
            # Of one value a channel, subtracting the mean is what speech does to its features: a norm has weights too.
            if scaled is not None and (over or _has_weights(scaled, graph)):
                yield _path(node)


def _is_scaled(onnx: Any, node: Any, centred: str, x: str, axes: tuple[int, ...], graph: _Graph) -> bool:
    """Whether ``node`` takes what is centred times or through a deviation over the same axes."""
    others = [i for i in node.input if _through(i, graph) != centred]
    pending = [(i, 0) for i in others]
    while pending:
        name, depth = pending.pop()
        maker = graph.makers.get(name)
        if maker is None or name in graph.constants or depth > _DEPTH:
            continue
        if maker.op_type == "ReduceMean" and _axes(onnx, maker, graph) == axes:
            square = graph.makers.get(_through(maker.input[0], graph))
            if square is not None and square.op_type in ("Mul", "Pow"):
                of = {_through(i, graph) for i in square.input if i not in graph.constants}
                if len(of) == 1 and (of == {x} or _is_centred(onnx, of.pop(), x, axes, graph)):
                    return True
        elif maker.op_type in _TO_DEVIATION:
            pending += [(i, depth + 1) for i in maker.input]
    return False


def _is_centred(onnx: Any, name: str, x: str, axes: tuple[int, ...], graph: _Graph) -> bool:
    maker = graph.makers.get(name)
    if maker is None or maker.op_type != "Sub" or _through(maker.input[0], graph) != x:
        return False
    mean = graph.makers.get(_through(maker.input[1], graph))
    return mean is not None and mean.op_type == "ReduceMean" and _axes(onnx, mean, graph) == axes


def _has_weights(scaled: Any, graph: _Graph) -> bool:
    for user in _users(scaled.output[0], ("Mul", "Add"), graph):
        for name in user.input:
            weight = graph.initializers.get(name)
            if weight is not None and max(weight.dims, default=1) > 1:
                return True
    return False


def _over_batch(axes: tuple[int, ...], rank: int | None) -> bool | None:
    """True for all axes but one, the batch among them; False for the batch alone, of two axes; None for others."""
    if rank is None:
        return True if axes in _TYPICAL else None
    whole = {a % rank for a in axes}
    if 0 not in whole or len(whole) != rank - 1:
        return None
    return rank > 2


def _axes(onnx: Any, node: Any, graph: _Graph) -> tuple[int, ...]:
    for attribute in node.attribute:
        if attribute.name == "axes":
            return tuple(sorted(int(a) for a in attribute.ints))
    name = node.input[1] if len(node.input) > 1 else ""
    value = graph.initializers.get(name)
    maker = graph.makers.get(name)
    if value is None and maker is not None and maker.op_type == "Constant":
        value = next((a.t for a in maker.attribute if a.name == "value"), None)
    return () if value is None else tuple(sorted(int(a) for a in onnx.numpy_helper.to_array(value).ravel()))


def _ranks(onnx: Any, model: Any) -> dict[str, int]:
    with contextlib.suppress(Exception):  # whatever it can't infer; shapes are what the file says then
        model = onnx.shape_inference.infer_shapes(model)
    infos = [*model.graph.value_info, *model.graph.input]
    return {i.name: len(i.type.tensor_type.shape.dim) for i in infos if i.type.tensor_type.HasField("shape")}


def _through(name: str, graph: _Graph) -> str:
    """The value behind operations that only change how it is written."""
    for _ in range(_DEPTH):
        maker = graph.makers.get(name)
        if maker is None or maker.op_type not in _SAME:
            break
        name = maker.input[0]
    return name


def _path(node: Any) -> str:
    """The module path; the legacy exporter writes ``/layer1/layer1.0/layer1.0.3/Add`` for ``layer1.0.3``."""
    site = _site(node)
    if not site.startswith("/") or site.count("/") < 2:
        return site
    path: list[str] = []
    for scope in site.split("/")[1:-1]:
        if path and scope.startswith(f"{path[-1]}."):
            path.pop()
        path.append(scope)
    return ".".join(path)


def _users(name: str, kinds: str | tuple[str, ...], graph: _Graph) -> list[Any]:
    wanted = (kinds,) if isinstance(kinds, str) else kinds
    return [n for n in graph.nodes if n.op_type in wanted and any(_through(i, graph) == name for i in n.input)]
