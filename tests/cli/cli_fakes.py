"""A stand-in for ``bnfix.api``: it records what it was asked and returns constructed values."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from bnfix.errors import LoadError
from bnfix.types import Edit, Export, FileInfo, OutputParity, Parity, Refusal, Result

EDIT = Edit("fold", "bn", "BatchNorm2d(8, eps=1e-05)", "Identity()", ("bn",), ("conv",), ("conv.bias",), 0.5, 1.0)
REFUSAL = Refusal("head.bn", "conv has 2 users: head.add, aux")


def parity(verdict: str = "passed") -> Parity:
    output = OutputParity("output", 1e-6, 1e-7, 1.3, 1e-7, verdict == "passed", verdict)  # type: ignore[arg-type]
    return Parity((output,), verdict == "passed", verdict, signatures=("1x3x8x8",))  # type: ignore[arg-type]


def info(path: str, kind: str = "state_dict") -> FileInfo:
    return FileInfo(str(path), kind, "zip", 1000, f"a {kind}", True, 4, 100, 400, {"float32": 4})


class Named(nn.Module):
    """A module that is equal to its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __eq__(self, other: object) -> bool:
        return other == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class FakeApi(ModuleType):
    """``calls`` holds (name, arguments, keyword arguments) in order; ``returns`` overrides what a verb gives back."""

    def __init__(self) -> None:
        super().__init__("bnfix.api")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.fold_result = Result(Named("folded"), (EDIT,), (), parity())
        self.parity = parity()
        self.kind = "state_dict"
        self.fails: dict[str, BaseException] = {}

    def _record(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append((name, args, kwargs))
        if kwargs.get("progress"):
            kwargs["progress"](f"step of {name}")
        if name in self.fails:
            raise self.fails[name]

    def asked(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the only call of ``name``."""
        (found,) = [(args, kwargs) for called, args, kwargs in self.calls if called == name]
        return found

    def open_model(self, path: str, **kwargs: Any) -> Any:
        self._record("open_model", path, **kwargs)
        arch = kwargs.get("arch")
        return SimpleNamespace(
            value=Named(f"model of {path}"), info=info(path, self.kind), arch=arch, notes=("took 'ema'",)
        )

    def examples(self, loaded: Any, **kwargs: Any) -> Any:
        self._record("examples", loaded, **kwargs)
        return ["call"], ("assumed 1x3x8x8",)

    def converted(self, loaded: Any, calls: Any) -> Any:
        return loaded

    def fold(self, model: Any, example: Any = None, **kwargs: Any) -> Result:
        print("a model that prints in its forward")
        self._record("fold", model, example, **kwargs)
        return self.fold_result

    def save(self, model: Any, path: str, **kwargs: Any) -> Path:
        self._record("save", model, path, **kwargs)
        Path(path).write_bytes(b"folded")
        return Path(path)

    def export(self, model: Any, path: str, example: Any = None, **kwargs: Any) -> Export:
        self._record("export", model, path, example, **kwargs)
        files = (str(path),) if self.parity.verdict != "failed" else ()
        for file in files:
            Path(file).write_bytes(b"onnx")
        return Export(str(path), 18, (), self.parity, 1, files=files)

    def verify(self, model: Any, other: Any, inputs: Any, **kwargs: Any) -> Parity:
        self._record("verify", model, other, inputs, **kwargs)
        return self.parity

    def info(self, path: str) -> FileInfo:
        self._record("info", path)
        if not Path(path).exists():
            raise LoadError(f"{path}: no such file", hint="ls")
        return info(path, "onnx" if str(path).endswith(".onnx") else "state_dict")
