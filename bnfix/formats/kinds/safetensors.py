"""safetensors: a JSON header with names, types and shapes, then the bytes. Nothing in it can run."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.errors import LoadError
from bnfix.formats import advice, recipes
from bnfix.formats.base import Format, Probe, Weights
from bnfix.formats.described import described
from bnfix.formats.fitting import put
from bnfix.formats.names import printable, wrapped_by_training
from bnfix.formats.pickles.contents import TensorSpec
from bnfix.types import FileInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_HEADER = 100_000_000  # the library's own bound
_DTYPES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
           "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "F64": "float64", "I64": "int64",
           "U64": "uint64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
           "F8_E8M0": "float8_e8m0fnu"}  # fmt: skip

_REFUSED = re.compile(r"I/O error: (.+) \(os error (\d+)\)")
"""What the library makes of an OSError: it raises its own, with the text in it."""


class SafeTensors(Format):
    """Weights in a safetensors file; a recipe and the names of shared tensors lie in its metadata."""

    order = 30
    kinds = frozenset(["safetensors"])
    containers = frozenset(["safetensors"])
    suffixes = (".safetensors",)

    def recognise(self, file: Probe) -> FileInfo | None:
        if len(file.head) < 9 or file.head[8:9] != b"{" or not re.match(rb'\{\s*["}]', file.head[8:64]):
            return None
        (length,) = struct.unpack("<Q", file.head[:8])
        if length > MAX_HEADER:
            return None
        try:
            tensors, metadata = _header(file.read(8, length), length, file.size)
        except ValueError as error:
            title = f"a safetensors file, cut off or damaged: {error}"
            return file.info("truncated", "safetensors", title, advice="copy or download it again")
        text = metadata.get(recipes.METADATA_KEY)
        recipe = recipes.from_text(text, file.shown) if text else None
        folded = recipes.has_folds(recipe)
        shared = {alias: kept for alias, kept in metadata.items() if kept in tensors and alias not in tensors}
        tensors |= {alias: tensors[kept] for alias, kept in shared.items()}
        numbers = described(tensors, wrapped_by_training(tensors))
        return file.info(
            "safetensors",
            "safetensors",
            "weights in a safetensors file",
            loadable=True,
            recipe=recipe,
            facts={
                printable(k): printable(v, 200)
                for k, v in list(metadata.items())[:16]
                if k != recipes.METADATA_KEY and k not in shared
            },
            advice=advice.export_line(file.shown, folded=folded)
            if folded or not numbers["norms"]
            else advice.fold_line(file.shown),
            **numbers,
        )

    def read(self, info: FileInfo, *, trust: bool) -> Any:
        tensors, metadata = _content(info)
        tensors |= {a: tensors[k] for a, k in metadata.items() if k in tensors and a not in tensors}
        text = metadata.get(recipes.METADATA_KEY)
        return Weights(tensors, recipes.from_text(text, info.path) if text else None)

    def write(
        self, path: Path, model: nn.Module, recipe: str | None, *, whole: bool, calls: Sequence[Any] = ()
    ) -> None:
        state = model.state_dict()
        objects = [name for name, value in state.items() if not hasattr(value, "dtype")]
        if objects:
            what = f"{objects[0]} of type {type(state[objects[0]]).__name__}"
            raise LoadError(
                f"safetensors holds tensors only, and the state_dict has {what}",
                hint="write a .pt file:  -o weights.pt",
            )
        tensors, metadata = _unshared(state)
        if recipe is not None:
            metadata[recipes.METADATA_KEY] = recipe
        _dump(tensors, path, metadata)

    def update(self, info: FileInfo, path: Path, model: nn.Module, *, trust: bool) -> bool:
        tensors, metadata = _content(info)
        aliases = {a: tensors[k] for a, k in metadata.items() if k in tensors and a not in tensors}
        table = tensors | aliases
        if not put(model, table) or any(table[a] is not kept for a, kept in aliases.items()):
            return False
        _dump({name: table[name] for name in tensors}, path, metadata)
        return True


def _content(info: FileInfo) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(info.path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise LoadError(f"{info.path} can't be loaded: {error}", hint="copy or download it again") from error


def _dump(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, str(path), metadata={"format": "pt", **metadata})
    except (SafetensorError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        if (refused := _REFUSED.search(str(error))) is not None:  # a full disk: another format does not help
            raise OSError(int(refused[2]), refused[1]) from error
        raise LoadError(
            f"the weights can't be written as safetensors: {error}", hint="write a .pt file:  -o weights.pt"
        ) from error


def _header(raw: bytes, length: int, size: int) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Names, shapes and types, and the metadata; ValueError where they don't fit the file."""
    if len(raw) < length:
        raise ValueError("it ends within its header")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is no JSON") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its header is not as the format wants it")
    tensors: dict[str, TensorSpec] = {}
    end = 0
    for name, entry in header.items():
        try:
            begin, stop = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError("its header is not as the format wants it") from error
        if (
            not isinstance(dtype, str)
            or not all(type(v) is int and v >= 0 for v in (*shape, begin, stop))
            or begin > stop
        ):
            raise ValueError("its header is not as the format wants it")
        tensors[name] = TensorSpec(shape, _DTYPES.get(dtype, dtype.lower()), (begin, stop))
        end = max(end, stop)
    if 8 + length + end > size:
        raise ValueError(f"{8 + length + end:,} bytes are announced, {size:,} are there")
    return tensors, metadata


def _unshared(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each memory once, and in the metadata the other names for it, in the form of ``safetensors.torch.save_model``."""
    kept: dict[tuple[Any, ...], str] = {}
    used: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    for name, value in state.items():
        tensor = value.detach()
        if tensor.layout != _strided() or tensor.is_meta or tensor.numel() == 0:
            tensors[name] = tensor
            continue
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        if same in kept:
            shared[name] = kept[same]
            continue
        kept[same] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().data_ptr() not in used
        used.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor if whole else tensor.clone().contiguous()
    return tensors, shared


def _strided() -> torch.layout:
    import torch

    return torch.strided
