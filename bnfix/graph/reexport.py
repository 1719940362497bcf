"""Modules as exported programs: one that a program was made into goes back, any other is exported with its calls."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from bnfix.errors import ExportError, one_line
from bnfix.graph.remodule import ENDLESS, Plan, bounds, children_of, example_of, input_values, plan_of
from bnfix.graph.sources.exported import quiet_export

_EPS = 16  # of a step of rounding: the same operations in the same order
_CORE = ("conv2d", "conv1d", "conv3d", "linear", "batch_norm")  # what torch's default decompositions take apart


def to_exported(module: nn.Module, program: ExportedProgram | None = None) -> ExportedProgram:
    """``module``, which :func:`~bnfix.graph.remodule.from_exported` made of ``program``, as a program again.

    Inputs, outputs, names and sizes that may vary are those of ``program``. Neither is changed.

    Raises:
        ExportError: torch can't export it with the same inputs, or the result is not the same; nothing is guessed.
    """
    plan = plan_of(module)
    if plan is None:
        raise ExportError("the module does not come from an exported program")
    program = program or plan.program
    args, kwargs = _example(program)
    shapes = _shapes_of(program, plan)
    made = _exported(module, args, kwargs, shapes)
    _take_names_back(made, plan.renamed)
    _check_structure(made, program)
    if program.dialect == "ATEN" and made.dialect != "ATEN":
        whole = any(f"aten.{name}." in str(n.target) for n in program.graph.nodes for name in _CORE)
        with quiet_export():
            made = made.run_decompositions({}) if whole else made.run_decompositions()
    _check_outputs(module, made, args, kwargs)
    return made


def exported(module: nn.Module, calls: Sequence[Any]) -> ExportedProgram:
    """``module`` as a program, traced on the first of ``calls``; sizes in which the calls differ may vary.

    Raises:
        ExportError: torch can't export it, or the program does not compute what the module does.
    """
    if plan_of(module) is not None:
        return to_exported(module)
    if not calls:
        raise ExportError("a program is exported with an example input, and there is none", hint="give an example")
    first = calls[0]
    if first.forward is not None:
        raise ExportError(
            "a .pt2 file holds the model's own forward, and this model is called by way of another function",
            hint="save it as a .pt file, or export a module whose forward is that function",
        )
    args, kwargs = tuple(first.args), dict(first.kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sizes: list[Any] = [None] * len(leaves)
    largest = first
    for other in calls[1:]:
        others, its_spec = pytree.tree_flatten((tuple(other.args), dict(other.kwargs)))
        if its_spec != spec:
            continue
        for i, (one, two) in enumerate(zip(leaves, others, strict=True)):
            if isinstance(one, Tensor) and isinstance(two, Tensor) and one.dim() == two.dim():
                varying = {d: Dim.AUTO for d in range(one.dim()) if one.shape[d] != two.shape[d]}
                sizes[i] = {**(sizes[i] or {}), **varying} or None
        if min(other.tensors()[0].shape or (0,)) > min(largest.tensors()[0].shape or (0,)):
            largest = other  # torch takes a size of 1 for a constant
    args, kwargs = tuple(largest.args), dict(largest.kwargs)
    shapes = _by_name(module, args, kwargs, pytree.tree_unflatten(sizes, spec))
    made = _exported(module, args, kwargs, shapes)
    _check_outputs(module, made, args, kwargs)
    return made


# ---------------------------------------------------------------------------------------- inputs


def _example(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kept = example_of(program)
    if kept is not None:
        return copy.deepcopy(kept)
    leaves = [_drawn(value) for _, value in input_values(program)]
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)  # type: ignore[arg-type]
    return tuple(args), dict(kwargs)


def drawn_example(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs that fit ``program``: those it holds, else random ones of the shapes it was exported with."""
    return _example(program)


def _drawn(value: Any) -> Any:
    if isinstance(value, Tensor):
        shape = [_hint(s) for s in value.shape]
        if value.is_floating_point():
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(value.device, value.dtype)
        return torch.zeros(shape, dtype=value.dtype, device=value.device)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _hint(value)
    return value


def _hint(size: Any) -> Any:
    if isinstance(size, (int, float)):
        return size
    hint = getattr(size.node, "hint", None)
    if hint is None:
        raise ExportError("the exported program holds no example inputs, and a size in it depends on data")
    return hint


def _shapes_of(program: ExportedProgram, plan: Plan) -> dict[str, Any]:
    leaves = [_varying(program, value) for _, value in input_values(program)]
    args, kwargs = pytree.tree_unflatten(leaves, plan.in_spec)
    given = [*args, *(kwargs[key] for key in children_of(plan.in_spec)[1].context or ())]
    return dict(zip(plan.names, given, strict=True))


def _varying(program: ExportedProgram, value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return Dim.AUTO
    if not isinstance(value, Tensor):
        return None
    return {d: _hinted(program, size) for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)} or None


def _hinted(program: ExportedProgram, size: Any) -> Any:
    """A dimension that may vary, within the bounds that the program states for it."""
    low, high = bounds(program, size)
    stated = {**({"min": low} if low else {}), **({"max": high} if high < ENDLESS else {})}
    return Dim.AUTO(**stated) if stated and callable(Dim.AUTO) else Dim.AUTO  # older ones have no bounds


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Any) -> Any:
    import inspect

    if not any(leaf is not None for leaf in pytree.tree_leaves(sizes)):
        return None
    positional, named = sizes
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    by_place = dict(zip((n for n in bound.arguments if n not in kwargs), positional, strict=False))
    found: dict[str, Any] = {}
    for name in bound.arguments:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found[name] = tuple(positional[len(found) :])
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found[name] = {k: named[k] for k in bound.arguments[name]}
        else:
            found[name] = named[name] if name in named else by_place[name]
    return found


# ---------------------------------------------------------------------------------------- export and its proof


def _exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    private = copy.deepcopy(module)  # export may leave marks on a module and on its inputs
    inputs = copy.deepcopy((args, kwargs))
    try:
        # Without gradients a region without them needs no subgraph of its own: those torch does not always read again
        with torch.no_grad(), quiet_export():
            return torch.export.export(private, *inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever torch or the model's forward raises
        raise ExportError(
            f"the model can't be exported as a program: {one_line(error, 300)}",
            hint="save it as a .pt or .safetensors file where it is a model with a class",
        ) from error


def _take_names_back(program: ExportedProgram, renamed: Mapping[str, str]) -> None:
    """Give tensors the names that they had before they got layers of their own."""
    for old, new in renamed.items():
        for spec in program.graph_signature.input_specs:
            if spec.target == old:
                spec.target = new
        for spec in program.graph_signature.output_specs:
            if spec.target == old:
                spec.target = new
        for table in (program.state_dict, program.constants):
            if old in table:
                table[new] = table.pop(old)  # type: ignore[assignment]


def _check_structure(made: ExportedProgram, program: ExportedProgram) -> None:
    if (made.call_spec.in_spec, made.call_spec.out_spec) != (program.call_spec.in_spec, program.call_spec.out_spec):
        raise ExportError("exported again, the program takes or gives something built otherwise")
    for (name, before), (_, after) in zip(input_values(program), input_values(made), strict=True):
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            continue
        for d, (one, two) in enumerate(zip(before.shape, after.shape, strict=True)):
            if isinstance(one, torch.SymInt) and not isinstance(two, torch.SymInt):
                raise ExportError(f"exported again, dimension {d} of {name}, which may vary, is fixed to {int(two)}")


def _check_outputs(module: nn.Module, made: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run both on the same inputs: the program must give what the module gives."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        expected = pytree.tree_leaves(_run(copy.deepcopy(module), args, kwargs))
        torch.manual_seed(0)
        found = pytree.tree_leaves(_run(_runnable(made), args, kwargs))
    reason = differs(expected, found)
    if reason:
        raise ExportError(f"the exported program does not give what the model gives: {reason}")


def _runnable(program: ExportedProgram) -> Any:
    return copy.deepcopy(program).module()


def _run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = copy.deepcopy((args, kwargs))
    return module(*args, **kwargs)


def differs(expected: Sequence[Any], found: Sequence[Any]) -> str:
    """Why ``found`` is not ``expected``, up to the rounding of the same operations; empty where it is."""
    if len(expected) != len(found):
        return f"{len(found)} outputs, not {len(expected)}"
    for i, (one, two) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            if type(one) is not type(two) or (not isinstance(one, Tensor) and one != two):
                return f"output {i} is {two!r}, not {one!r}"
            continue
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return f"output {i} is {tuple(two.shape)} {two.dtype}, not {tuple(one.shape)} {one.dtype}"
        if one.is_floating_point():
            limit = _EPS * torch.finfo(one.dtype).eps
            scale = one.double().nan_to_num().abs().max().item() if one.numel() else 0.0
            same = torch.allclose(two.double(), one.double(), rtol=limit, atol=limit * scale, equal_nan=True)
        else:
            same = torch.equal(one, two)
        if not same:
            return f"output {i} has other values"
    return ""
