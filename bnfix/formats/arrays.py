"""Arrays in files: ``.npy``, ``.npz``, ``.safetensors``, read without unpickling; as samples, or as one call."""

from __future__ import annotations

import importlib
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnfix.errors import LoadError
from bnfix.running import Call

ARRAYS = (".npy", ".npz", ".safetensors")
MAX_INPUT = 1 << 34
"""Bytes of one file of inputs, unpacked: one call needs no more, a bomb does."""

_PLACED = re.compile(r"arr_(0|[1-9]\d*)")


def is_arrays(text: str) -> bool:
    """Whether ``text`` is the name of a file of arrays, there or not."""
    return Path(text).suffix.lower() in ARRAYS


def load_call(path: Path) -> Call:
    """What is in the file as the arguments of one call.

    Names are those of the forward's parameters. What NumPy named itself (``np.savez(path, x, y)``: ``arr_0`` and
    ``arr_1``) and the one array of a ``.npy`` file are positional.

    Raises:
        LoadError: no such file, no arrays in it, an empty one, or too much.
    """
    if not path.is_file():
        raise LoadError(f"there is no file {path}", hint="in Python:  np.savez('inputs.npz', image=image, mask=mask)")
    _check_size(path)
    arrays = _read(path)
    if not arrays:
        raise LoadError(f"{path} holds no arrays", hint="in Python:  np.savez('inputs.npz', image=image, mask=mask)")
    empty = next((k for k, v in arrays.items() if not v.numel()), None)
    if empty is not None:
        raise LoadError(f"{path}: {empty} is empty: its shape is {tuple(arrays[empty].shape)}")
    if path.suffix.lower() == ".npy":
        return Call(tuple(arrays.values()))
    if path.suffix.lower() == ".safetensors":
        return Call((), arrays)
    placed = {int(match[1]): v for k, v in arrays.items() if (match := _PLACED.fullmatch(k))}
    missing = next((i for i in range(len(placed)) if i not in placed), None)
    if missing is not None:
        raise LoadError(f"{path} holds arr_{max(placed)}, and no arr_{missing}")
    named = {k: v for k, v in arrays.items() if not _PLACED.fullmatch(k)}
    return Call(tuple(placed[i] for i in range(len(placed))), named)


def load_samples(path: Path) -> Tensor | dict[str, Tensor]:
    """What is in the file, samples along the first axis: one array as it is, several by name.

    Raises:
        LoadError: no arrays, an empty one, or arrays of different lengths.
    """
    arrays = _read(path)
    if not arrays:
        raise LoadError(f"{path} holds no arrays")
    shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in list(arrays.items())[:4])
    if any(v.dim() and not v.numel() for v in arrays.values()):
        raise LoadError(f"{path} is empty: there are no samples in {shapes}")
    lengths = {v.shape[0] if v.dim() else None for v in arrays.values()}
    if None in lengths or len(lengths) > 1:
        raise LoadError(f"{path}: the first axis holds the samples, and here it does not: {shapes}")
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
        if path.suffix.lower() == ".npz" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                size = max(size, sum(m.file_size for m in file.infolist()))
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise LoadError(f"{path} can't be read: {error}") from error
    if size > MAX_INPUT:
        raise LoadError(f"{path} holds {size / 2**30:,.0f} GiB: too much for one input (at most {MAX_INPUT >> 30} GiB)")


def _read(path: Path) -> dict[str, Tensor]:
    return _safetensors(path) if path.suffix.lower() == ".safetensors" else _numpy(path)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise LoadError(f"{path} can't be read: {error}") from error
    return found


def _numpy(path: Path) -> dict[str, Tensor]:
    np = importlib.import_module("numpy")
    _check_beginning(path)
    try:
        with np.load(path, allow_pickle=False) if path.suffix.lower() == ".npz" else _plain(np, path) as file:
            return {name: _tensor(np, file[name], f"{path}: {name}") for name in file}
    except LoadError:
        raise
    except Exception as error:  # damaged archives fail in numpy, zipfile and zlib, each with errors of its own
        pickled = "pickle" in str(error).lower() or "Object arrays" in str(error)
        reason = "holds Python objects, which bnfix does not unpickle" if pickled else f"can't be read: {error}"
        raise LoadError(f"{path} {reason}") from error


def _check_beginning(path: Path) -> None:
    """NumPy takes whatever begins like no array for a pickle, and says so."""
    try:
        with path.open("rb") as file:
            head = file.read(6)
    except OSError as error:
        raise LoadError(f"{path} can't be read: {error.strerror or error}") from error
    if not head.startswith((b"\x93NUMPY", b"PK", b"\x80")):  # an array, several, a pickle
        held = "is empty" if not head else f"is no NumPy file: it begins with {head!r}"
        raise LoadError(f"{path} {held}", hint="in Python:  np.save('x.npy', array)")


class _OneArray(dict[str, Any]):
    def __enter__(self) -> _OneArray:
        return self

    def __exit__(self, *_: object) -> None: ...


def _plain(np: Any, path: Path) -> _OneArray:
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise LoadError(f"{path} is no NumPy array")
    return _OneArray(array=found)


def _tensor(np: Any, array: Any, where: str) -> Tensor:
    native = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="), copy=False).reshape(array.shape)
    if native.dtype == np.float64:  # NumPy's default type, seldom meant: a model's is torch's
        native = native.astype(np.float32)
    try:
        return torch.from_numpy(native.copy() if not native.flags.writeable else native)
    except TypeError as error:
        raise LoadError(f"{where} is of type {array.dtype}, which torch has not") from error
