"""ONNX: a protobuf, walked field by field without the onnx library, for what a reader wants to know of it."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bnfix.formats.advice import GAP, example_arch
from bnfix.formats.base import Format, Probe
from bnfix.formats.names import printable
from bnfix.types import FileInfo, NormInfo

MAX_FIELDS = 2_000_000
_IR_VERSION, _PRODUCER, _GRAPH, _OPSETS = 1, 2, 7, 8  # ModelProto
_NODE, _INITIALIZER = 1, 5  # GraphProto
_TYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
          10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"}  # fmt: skip

_BITS = {dtype: int(re.sub(r"\D", "", dtype) or 8) for dtype in _TYPES.values()}


class Onnx(Format):
    """An ONNX model; the value of loading it is its path, which ONNX Runtime reads."""

    order = 40
    kinds = frozenset(["onnx"])
    containers = frozenset(["protobuf"])

    def recognise(self, file: Probe) -> FileInfo | None:
        if file.head[:1] not in (b"\x08", b"\x12", b"\x3a", b"\x42"):  # the first field of a ModelProto, in any order
            return None
        with file.path.open("rb") as stream:
            try:
                fields = list(_fields(stream, 0, file.size))
            except _CutOffError:
                return _cut_off(file)
            except ValueError:
                return None
            version = next((v for n, v in fields if n == _IR_VERSION and isinstance(v, int)), None)
            graph = next((v for n, v in fields if n == _GRAPH and isinstance(v, range)), None)
            if version is None or graph is None or not 1 <= version <= 99:
                return None
            try:
                return _describe(file, stream, version, graph, fields)
            except (ValueError, _CutOffError) as error:
                return file.info(
                    "damaged", "protobuf", f"a damaged ONNX model: {error}", advice="copy or download it again"
                )

    def read(self, info: FileInfo, *, trust: bool) -> Any:
        return Path(info.path)


def _cut_off(file: Probe) -> FileInfo | None:
    """A ModelProto whose graph is longer than the file; other bytes that look like a protobuf are nothing known."""
    with file.path.open("rb") as stream:
        seen: list[tuple[int, int | range]] = []
        try:
            for item in _fields(stream, 0, 1 << 62):
                seen.append(item)
                if isinstance(item[1], range) and item[1].stop > file.size:
                    break
        except (ValueError, _CutOffError):
            return None
    version = next((v for n, v in seen if n == _IR_VERSION), None)
    if isinstance(version, int) and 1 <= version <= 99 and seen[-1][0] == _GRAPH:
        title = "an ONNX model, cut off"
        return file.info("truncated", "protobuf", title, advice="copy or download it again")
    return None


def _describe(
    file: Probe, stream: BinaryIO, version: int, graph: range, fields: list[tuple[int, int | range]]
) -> FileInfo:
    opset = 0
    for number, value in fields:
        if number == _OPSETS and isinstance(value, range):
            parts = dict(_fields(stream, value.start, value.stop))
            domain = _text(stream, parts.get(1))
            opset = int(parts[2]) if domain in ("", "ai.onnx") and isinstance(parts.get(2), int) else opset  # type: ignore[arg-type]
    producer = printable(_text(stream, next((v for n, v in fields if n == _PRODUCER), None)))
    ops: Counter[str] = Counter()
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    norms: list[str] = []
    external = 0
    for number, value in list(_fields(stream, graph.start, graph.stop)):
        if not isinstance(value, range):
            continue
        if number == _NODE:
            inputs, op = _node(stream, value)
            ops[printable(op)] += 1
            if op == "BatchNormalization" and len(inputs) == 5:
                norms.append(inputs[3])
        elif number == _INITIALIZER:
            name, shape, dtype, outside = _initializer(stream, value)
            shapes[name] = (shape, dtype)
            external += outside
    numel = {name: _product(shape) for name, (shape, _) in shapes.items()}
    return file.info(
        "onnx",
        "protobuf",
        f"an ONNX model (opset {opset})",
        loadable=True,
        tensors=len(shapes),
        parameters=sum(numel.values()),
        bytes=sum((n * _BITS.get(shapes[name][1], 8) + 7) // 8 for name, n in numel.items()),
        dtypes=dict(Counter(dtype for _, dtype in shapes.values()).most_common()),
        norms=tuple(
            NormInfo(n.removesuffix(".running_mean"), numel.get(n, 0), shapes.get(n, ((), ""))[1], True) for n in norms
        ),
        facts={"opset": opset, "ir_version": version, "producer": producer, "nodes": sum(ops.values()),
               "ops": dict(ops.most_common(12)), "external_tensors": external},
        advice=_verify_line(file.shown),
    )  # fmt: skip


def _verify_line(path: str) -> str:
    """Compared with the weights beside it that have its name, where there are such."""
    stem = os.path.splitext(path)[0]
    weights = next((stem + s for s in (".pt", ".pth", ".safetensors", ".ckpt") if os.path.isfile(stem + s)), None)
    words = ["bnfix", "verify", weights or "weights.pt", path, "--arch", example_arch(path)]
    return f"compare it with the weights that it was made of, for example{GAP}{shlex.join(words)}"


def _node(stream: BinaryIO, where: range) -> tuple[list[str], str]:
    inputs, op = [], ""
    for number, value in _fields(stream, where.start, where.stop):
        if number == 1:
            inputs.append(_text(stream, value))
        elif number == 4:
            op = _text(stream, value)
    return inputs, op


def _initializer(stream: BinaryIO, where: range) -> tuple[str, tuple[int, ...], str, bool]:
    dims: list[int] = []
    dtype, name, outside = "", "", False
    for number, value in _fields(stream, where.start, where.stop):
        if number == 1 and isinstance(value, range):
            stream.seek(value.start)
            while stream.tell() < value.stop:
                dims.append(_varint(stream))
        elif number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 2 and isinstance(value, int):
            dtype = _TYPES.get(value, f"type {value}")
        elif number == 8:
            name = _text(stream, value)
        elif number == 14:
            outside = value == 1
    return name, tuple(dims), dtype, outside


# ---------------------------------------------------------------------------------------- the wire format


class _CutOffError(Exception):
    pass


def _fields(stream: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int | range]]:
    """Field numbers of a message with their value: a number, or where in the file the bytes lie."""
    position = start
    for count in range(MAX_FIELDS + 1):
        if position == stop:
            return
        if count == MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS:,} fields")
        stream.seek(position)
        tag = _varint(stream)
        number, wire = tag >> 3, tag & 7
        value: int | range
        if number == 0 or number > 10_000:
            raise ValueError("no protobuf")
        if wire == 0:
            value = _varint(stream)
            position = stream.tell()
        elif wire == 2:
            length = _varint(stream)
            position = stream.tell() + length
            value = range(stream.tell(), position)
        elif wire in (1, 5):
            position = stream.tell() + (8 if wire == 1 else 4)
            value = range(stream.tell(), position)
        else:
            raise ValueError("no protobuf")
        if position > stop:
            raise _CutOffError("a field reaches beyond its end")
        yield number, value


def _varint(stream: BinaryIO) -> int:
    result = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise _CutOffError("it ends within a number")
        result |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return result
    raise ValueError("no protobuf")


def _text(stream: BinaryIO, where: int | range | None) -> str:
    if not isinstance(where, range):
        return ""
    if len(where) > 4096:
        raise ValueError("a name of more than 4096 bytes")
    stream.seek(where.start)
    return stream.read(len(where)).decode("utf-8", "replace")


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
