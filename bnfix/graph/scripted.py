"""TorchScript programs as modules, by way of torch's own conversion into an exported program."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from bnfix.errors import PassError, TraceError, one_line
from bnfix.graph.reexport import differs
from bnfix.graph.remodule import ProgramModule, from_exported
from bnfix.graph.sources.exported import quiet_export

_WAY_OUT = (
    "build the Python class that it was made from, and load its weights into it:\n"
    "bnfix fold weights.pt --arch pkg.mod:Class -o folded.pt"
)


def from_script(script: torch.jit.ScriptModule, call: Any) -> ProgramModule:
    """``script`` converted on the inputs of ``call``, and shown to compute the same on them. ``script`` is not changed.

    Raises:
        PassError: it does not run on the inputs.
        TraceError: torch can't convert it, or what it converts to is not the same; the way out is said.
    """
    converter = _converter()
    if any(m.training for m in script.modules()):
        raise TraceError("the TorchScript program is in training mode", hint="call eval() on it before it is saved")
    args = _positional(script, call)
    expected = _outputs(script, args, call.signature)
    args = _two_samples(script, args)
    expected_of_two = _outputs(script, args, call.signature)
    try:
        with torch.no_grad(), quiet_export():
            program = converter(copy.deepcopy(script), copy.deepcopy(args)).convert()
    except Exception as error:  # the converter raises whatever it does not know
        raise TraceError(
            f"torch can't convert this TorchScript program: {one_line(error, 200)}", hint=_WAY_OUT
        ) from error
    module = from_exported(program, names=_names(script)[: len(args)])
    for inputs, wanted in ((args, expected_of_two), (_positional(script, call), expected)):
        try:
            found = _outputs(module, inputs, call.signature)
        except PassError:
            if inputs is args:
                raise
            continue  # one sample more than that is what the program is for now; the proof says so where it matters
        reason = differs(expected_of_two if inputs is args else wanted, found)
        if reason:
            raise TraceError(f"converted, this TorchScript program does not do the same: {reason}", hint=_WAY_OUT)
    return module


def _converter() -> Any:
    try:
        from torch._export.converter import TS2EPConverter
    except ImportError as error:
        raise TraceError(
            f"torch {torch.__version__} has no converter of TorchScript programs any more", hint=_WAY_OUT
        ) from error
    return TS2EPConverter


def _names(script: torch.jit.ScriptModule) -> list[str]:
    return [str(a.name) for a in script.forward.schema.arguments][1:]  # type: ignore[attr-defined]


def _positional(script: torch.jit.ScriptModule, call: Any) -> tuple[Any, ...]:
    if call.forward is not None:
        raise TraceError("a TorchScript program is converted with its own forward, not by way of another function")
    if not call.kwargs:
        return tuple(call.args)
    names = _names(script)
    rest = names[len(call.args) :]
    given = [name for name in rest if name in call.kwargs]
    if given != rest[: len(given)] or len(given) != len(call.kwargs):
        raise TraceError(f"the TorchScript program takes ({', '.join(names)}); these inputs leave some out")
    return (*call.args, *(call.kwargs[name] for name in given))


def _outputs(module: Any, args: tuple[Any, ...], signature: str) -> list[Any]:
    from torch.utils._pytree import tree_leaves

    try:
        with torch.no_grad():
            return list(tree_leaves(module(*copy.deepcopy(args))))
    except Exception as error:  # the program's own code may raise anything
        raise PassError(f"the program failed on {signature}: {one_line(error)}") from error


def _two_samples(script: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with one sample more where there is one: torch takes a size of 1 for a constant."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return args
    two = tuple(torch.cat([a, a.flip(-1)]) if isinstance(a, Tensor) else a for a in args)
    try:
        _outputs(script, two, "")
    except PassError:
        return args
    return two
