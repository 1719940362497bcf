"""An ONNX file as something that can be called like the model that it came from."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnfix.errors import LoadError, MissingDependencyError, PassError

LEVELS = ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL")
"""Both must compute the same: what the optimizer breaks and what it repairs are seen."""

TYPES: Mapping[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bool)": torch.bool,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
}


@dataclass(frozen=True)
class Slot:
    """An input of a file: None in ``shape`` is a size that may vary; ``dims`` holds their names in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...] | None
    dims: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.sizes or 'any'} {_short(self.dtype)}"

    @property
    def sizes(self) -> str:
        """The shape for a reader: ``Nx3x224x224``, where N is any batch; other sizes that may vary are ``?``."""
        free = ("N" if axis == 0 else "?" for axis in range(len(self.shape or ())))
        return "x".join(f if s is None else str(s) for s, f in zip(self.shape or (), free, strict=True))

    @property
    def sample(self) -> str:
        """As :attr:`sizes`, without a batch that may vary: ``3x224x224``."""
        return self.sizes.removeprefix("Nx")

    def admits(self, tensor: Tensor) -> bool:
        """Whether kind and rank fit: only then it can be this input at all."""
        same_kind = _kind(tensor.dtype) == _kind(self.dtype)
        return same_kind and (self.shape is None or len(self.shape) == tensor.dim())

    def misfit(self, tensor: Tensor) -> str:
        """Why ``tensor`` can't be fed here although it is meant for it; empty if it can."""
        wrong = self.wrong_axes(tensor)
        if not wrong:
            return ""
        if wrong[0] == 0:
            return f"the file's batch is frozen to {(self.shape or ())[0]}"
        which = f"axis {wrong[0]}" if len(wrong) == 1 else f"axes {' and '.join(map(str, wrong))}"
        return f"the file takes {self.name} as {self.sizes}, not {_sizes(tensor)} ({which})"

    def wrong_axes(self, tensor: Tensor) -> list[int]:
        """The axes along which ``tensor`` has not the size that the file fixes."""
        pairs = enumerate(zip(self.shape or (), tensor.shape, strict=False))
        return [axis for axis, (wanted, got) in pairs if wanted is not None and wanted != got]


class OnnxModel:
    """Sessions of ONNX Runtime over one file, one for each of :data:`LEVELS` that is asked for, one thread each.

    Raises:
        LoadError: ONNX Runtime can't open the file.
        MissingDependencyError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], providers: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self._ort = runtime()
        if not self.path.is_file():
            raise LoadError(f"{path}: no such file")
        wanted = list(providers or ["CPUExecutionProvider"])
        unknown = [p for p in wanted if p not in self._ort.get_available_providers()]
        if unknown:
            raise ValueError(f"ONNX Runtime here has no {unknown[0]}, only {self._ort.get_available_providers()}")
        self._wanted = wanted
        self._sessions: dict[str, Any] = {}
        first = self._session(LEVELS[1])
        self.providers: tuple[str, ...] = tuple(first.get_providers())
        self.inputs = tuple(self._slot(i) for i in first.get_inputs())
        self.outputs = tuple(str(o.name) for o in first.get_outputs())

    def order(self, named: Mapping[str, Tensor]) -> dict[str, str]:
        """Which of the example's tensors (by the name that forward gives them) each input of the file is.

        By name where names tell, by position, kind and rank otherwise: exporters rename inputs and prune unused ones.

        Raises:
            PassError: some input can't be any of the tensors.
        """
        spelled = {spelling(name): name for name in named}
        found = {s.name: spelled[spelling(s.name)] for s in self.inputs if spelling(s.name) in spelled}
        found = {slot: name for slot, name in found.items() if self._by_name[slot].admits(named[name])}
        rest = [name for name in named if name not in found.values()]
        for slot in self.inputs:
            if slot.name in found:
                continue
            match = next((name for name in rest if slot.admits(named[name])), None)
            if match is None:
                given = ", ".join(f"{n}: {_described(t)}" for n, t in named.items()) or "nothing"
                raise PassError(
                    f"{self.path.name} takes {slot}; the example gives {given}",
                    hint="give every input that the file takes, in the order of forward's parameters",
                )
            found[slot.name] = match
            rest = rest[rest.index(match) + 1 :]
        return found

    def misfit(self, named: Mapping[str, Tensor], order: Mapping[str, str]) -> str:
        """Why these inputs can't be run by this file, in one line; empty if they can."""
        return next((why for s in self.inputs if (why := s.misfit(named[order[s.name]]))), "")

    def run(self, named: Mapping[str, Tensor], order: Mapping[str, str], level: str) -> list[Tensor]:
        """The outputs of the file, in its order.

        Raises:
            PassError: ONNX Runtime failed, or an input would lose information on its way.
        """
        feed = {s.name: _cast(named[order[s.name]], s).numpy() for s in self.inputs}
        try:
            values = self._session(level).run(None, feed)
        except _errors(self._ort) as error:
            raise PassError(f"ONNX Runtime failed on {self.path.name} ({level}): {_said(error)}") from error
        for name, value in zip(self.outputs, values, strict=True):
            if not hasattr(value, "__array__"):
                raise PassError(f"{self.path.name}: output {name} is a {type(value).__name__}, not a tensor")
        return [torch.from_numpy(value) if value.ndim else torch.tensor(value.item()) for value in values]

    def rounds(self, named: Mapping[str, Tensor], order: Mapping[str, str]) -> tuple[str, ...]:
        """Notes on inputs that are rounded to a coarser type than the example has."""
        return tuple(
            f"the file takes {s.name} as {_short(s.dtype)}: the {_short(t.dtype)} input is rounded"
            for s in self.inputs
            if (t := named[order[s.name]]).is_floating_point() and torch.finfo(s.dtype).eps > torch.finfo(t.dtype).eps
        )

    @property
    def _by_name(self) -> dict[str, Slot]:
        return {s.name: s for s in self.inputs}

    def _session(self, level: str) -> Any:
        if level not in self._sessions:
            self._sessions[level] = self._opened(level)
        return self._sessions[level]

    def _opened(self, level: str) -> Any:
        options = self._ort.SessionOptions()
        options.graph_optimization_level = getattr(self._ort.GraphOptimizationLevel, level)
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            return self._ort.InferenceSession(os.fspath(self.path), options, providers=self._wanted)
        except _errors(self._ort) as error:
            raise LoadError(f"ONNX Runtime can't open {self.path.name}: {_said(error)}") from error

    def _slot(self, value: Any) -> Slot:
        if value.type not in TYPES:
            raise LoadError(f"{self.path.name}: the input {value.name} is a {value.type}, which bnfix can't feed")
        shape = tuple(d if isinstance(d, int) else None for d in value.shape)
        dims = tuple(d if isinstance(d, str) else "" for d in value.shape)
        return Slot(str(value.name), TYPES[value.type], shape, dims)


def runtime() -> ModuleType:
    """The onnxruntime package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "onnx", "running an ONNX file") from error


def opens(model: Any) -> bool:
    """Whether ONNX Runtime can open ``model``, a proto in memory."""
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except _errors(ort):
        return False
    return True


def _errors(ort: ModuleType) -> tuple[type[Exception], ...]:
    state = ort.capi.onnxruntime_pybind11_state
    named = (getattr(state, n) for n in dir(state))
    own = tuple(e for e in named if isinstance(e, type) and issubclass(e, Exception))
    return (*own, RuntimeError, ValueError)


def match_outputs(expected: Sequence[str], file_names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """The file's outputs under the model's names: by name where all agree, else by position.

    Where the numbers differ, what has the same name is matched, and the rest keeps the file's name.
    """
    spelled = {spelling(name): name for name in expected}
    by_name = all(spelling(n) in spelled for n in file_names)
    if by_name or len(expected) != len(file_names):
        return {spelled.get(spelling(n), n): v for n, v in zip(file_names, values, strict=True)}
    return dict(zip(expected, values, strict=True))


def spelling(name: str) -> str:
    """``x['a']`` and ``x_a`` are the same input; ONNX names hold word characters only."""
    return re.sub(r"\W+", "_", name).strip("_")


def _cast(tensor: Tensor, slot: Slot) -> Tensor:
    cast = tensor.detach().cpu().to(slot.dtype)
    if not tensor.is_floating_point() and not torch.equal(cast.to(tensor.dtype), tensor.detach().cpu()):
        raise PassError(f"the file takes {slot.name} as {_short(slot.dtype)}, which can't hold the example's values")
    return cast.contiguous()


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "integer"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: Tensor) -> str:
    return f"{_sizes(tensor)} {_short(tensor.dtype)}"


def _sizes(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _said(error: Exception) -> str:
    """What ONNX Runtime says, without its prefix and codes, in one line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)[:300]
