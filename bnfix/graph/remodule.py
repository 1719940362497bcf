"""An exported program as a module whose layers are real ones again, so that what works on modules works on it.

``program.module()`` calls ``aten.conv2d`` with weights that it fetches by name: no place for a bias that is not there,
no module to stand in for. Here such calls become calls of ``nn.Conv*``, ``nn.ConvTranspose*``, ``nn.Linear`` and
``nn.BatchNorm*`` that hold the very same tensors under the very same names. The graph around them is run step by step.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx import _pytree as fx_pytree  # what the code that torch generates for a program uses itself
from torch.utils import _pytree as pytree

from bnfix.errors import TraceError, one_line
from bnfix.graph.inlining import enter, inline, leave
from bnfix.graph.relayer import Relayered, relayer

ENDLESS = 1 << 40
_TAKEN_AS_ANY = 2  # torch traces no size of 0 or 1 as one that may vary, and lets programs run on them all the same
_CHECKS = frozenset({"aten._assert_tensor_metadata.default"})  # they hold the dtype of a tensor, which a proof changes


@dataclass(frozen=True)
class _Value:
    """The result of an earlier step, in the arguments of a later one."""

    step: int

    def __deepcopy__(self, memo: Any) -> _Value:
        return self


class _Step:
    """One node: what is done, with what, and whose results nobody needs after it."""

    __slots__ = ("args", "done_with", "kwargs", "op", "target")

    def __init__(self, op: str, target: Any, args: Any, kwargs: Any) -> None:
        self.op, self.target, self.args, self.kwargs = op, target, args, kwargs
        self.done_with: tuple[int, ...] = ()


class Plan:
    """What a :class:`ProgramModule` runs, and the program that it comes from. Copies of the module share it."""

    __slots__ = ("in_spec", "names", "out_spec", "program", "renamed", "sizes", "steps")

    def __init__(self, program: ExportedProgram, module: fx.GraphModule, layers: Relayered) -> None:
        self.program = program
        self.renamed: Mapping[str, str] = layers.renamed
        info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
        self.names = tuple(str(n) for n in info.orig_args)
        self.in_spec, self.out_spec = info.in_spec, info.out_spec
        self.steps = _steps(module.graph.nodes)
        self.sizes = _sizes(program)

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def flat_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of the inputs in the order of the graph; TypeError where they are not those of the program."""
        bound = self.signature.bind(*args, **kwargs)
        given = [bound.arguments[name] for name in self.names]
        positional, by_name = children_of(self.in_spec)
        count = positional.num_children
        named = dict(zip(by_name.context or (), given[count:], strict=True))
        try:
            leaves = list(fx_pytree.tree_flatten_spec((tuple(given[:count]), named), self.in_spec))
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            raise TypeError(f"the inputs are not built as those of the program: {one_line(error, 200)}") from error
        self._check_sizes(leaves)
        return leaves

    def _check_sizes(self, leaves: Sequence[Any]) -> None:
        """As the program itself does: it was exported for these sizes, and may be wrong for others."""
        for (name, wanted), leaf in zip(self.sizes, leaves, strict=True):
            if wanted is None or not isinstance(leaf, Tensor):
                continue
            if leaf.dim() != len(wanted):
                raise ValueError(f"{name} has {leaf.dim()} dimensions, the program was exported for {len(wanted)}")
            for d, (size, (low, high)) in enumerate(zip(leaf.shape, wanted, strict=True)):
                if isinstance(size, int) and not low <= size <= high:
                    allowed = f"{low}" if low == high else f"{low} to {high}" if high < ENDLESS else f"{low} or more"
                    raise ValueError(f"dimension {d} of {name} is {size}, the program was exported for {allowed}")

    @property
    def signature(self) -> inspect.Signature:
        """Names of the arguments of the forward."""
        return inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in self.names])


class ProgramModule(nn.Module):
    """An exported program as a module: same inputs, same outputs, same names in its ``state_dict``.

    Made by :func:`from_exported`. It is in evaluation mode, as far as the program is, and stays so: what runs in which
    mode is written in its graph.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._bnfix_plan = plan

    def train(self, mode: bool = True) -> ProgramModule:
        """Nothing: the modes are part of the graph."""
        return self

    def _bnfix_run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the graph."""
        with contextlib.ExitStack() as entered:
            return self._bnfix_steps(entered, args, kwargs)

    def _bnfix_steps(self, entered: contextlib.ExitStack, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        plan = self._bnfix_plan
        leaves = iter(plan.flat_inputs(args, kwargs))
        values: list[Any] = [None] * len(plan.steps)
        for index, step in enumerate(plan.steps):
            if step.op == "placeholder":
                values[index] = next(leaves)
            elif step.op == "get_attr":
                values[index] = operator.attrgetter(step.target)(self) if step.target else self
            elif step.op == "output":
                return pytree.tree_unflatten(list(_filled(step.args[0], values)), plan.out_spec)
            elif step.target in (enter, leave):
                step.target(entered, *step.args)
            else:
                call = self.get_submodule(step.target) if step.op == "call_module" else step.target
                values[index] = call(*_filled(step.args, values), **_filled(step.kwargs, values))
            for done in step.done_with:
                values[done] = None
        raise TraceError("the program has no output")


def from_exported(program: ExportedProgram, *, names: Sequence[str] | None = None) -> ProgramModule:
    """``program`` as a module with real layers, which hold the very same tensors. ``program`` stays as it is.

    Convolutions, linear layers and norms whose weights the graph fetches become modules under the names of their
    weights: ``layer1.0.conv1.weight`` is still that. Where a call does not fit the names (``F.conv2d(x, self.w)``) the
    layer goes under a name of its own, which :func:`bnfix.graph.reexport.to_exported` takes back. A norm in training
    mode, one whose weights are computed, a weight with which several calls do different things: these stay calls.
    ``names`` are those of the arguments, if the program has none of its own.

    Raises:
        TraceError: it has no graph that can be run (torch can't unlift it, or it keeps a state that is no tensor).
    """
    try:
        module = _unlifted(program)
    except Exception as error:  # torch's own unlifting fails in every way there is
        raise TraceError(f"the exported program has no module: {one_line(error, 200)}") from error
    _drop_checks(module)
    inline(module)
    layers = relayer(module)
    if getattr(module.graph._codegen, "pytree_info", None) is None:
        raise TraceError("the exported program does not say how its inputs are built")
    plan = Plan(program, module, layers)
    if names is not None and len(names) == len(plan.names) and all(n.isidentifier() for n in names):
        plan.names = tuple(names)
    made: ProgramModule = _class_for(plan)(plan)
    for name, child in module.named_children():
        made.add_module(name, child)
    for name, parameter in module._parameters.items():
        made.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        made.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name in {str(s.target).partition(".")[0] for s in plan.steps if s.op == "get_attr"}:
        if not hasattr(made, name):
            setattr(made, name, getattr(module, name))
    for inner in made.modules():
        inner.training = False
    return made


def plan_of(module: Any) -> Plan | None:
    """The plan of a module that :func:`from_exported` made; None of any other."""
    return module._bnfix_plan if isinstance(module, ProgramModule) else None


def example_of(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments and keyword arguments that ``program`` was exported with; None where it does not hold them."""
    kept = program.example_inputs
    if not isinstance(kept, tuple) or len(kept) != 2:
        return None
    args, kwargs = kept
    return tuple(args), dict(kwargs or {})


def _unlifted(program: ExportedProgram) -> fx.GraphModule:
    if "check_guards" in inspect.signature(program.module).parameters:
        return program.module(check_guards=False)  # guards are source code, and would come from a file
    return program.module()  # type: ignore[no-any-return]


def _class_for(plan: Plan) -> type[ProgramModule]:
    """A class with a forward that has the program's own arguments, for whoever asks for its signature."""

    def forward(self: ProgramModule, *args: Any, **kwargs: Any) -> Any:
        return self._bnfix_run(args, kwargs)

    mine = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([mine, *plan.signature.parameters.values()])  # type: ignore[attr-defined]
    return type("ExportedProgram", (ProgramModule,), {"forward": forward})


def input_values(program: ExportedProgram) -> list[tuple[str, Any]]:
    """Name, and what the graph knows, of each leaf of the inputs: a fake tensor, a symbol, or the constant itself."""
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    values: list[tuple[str, Any]] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            name = str(getattr(spec.arg, "name", ""))
            known = nodes[name].meta.get("val") if name in nodes else getattr(spec.arg, "value", None)
            values.append((name, known))
    return values


def bounds(program: ExportedProgram, size: Any) -> tuple[int, int]:
    """The least and the largest that a size may be; that of a constant is itself."""
    if not isinstance(size, torch.SymInt):
        return int(size), int(size)
    allowed = program.range_constraints.get(size.node.expr)
    if allowed is None:
        return 0, ENDLESS
    low = _number(allowed.lower, 0)
    return low if low > _TAKEN_AS_ANY else 0, _number(allowed.upper, ENDLESS)


def _number(bound: Any, otherwise: int) -> int:
    try:
        value = int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return otherwise
    return value if abs(value) < ENDLESS else otherwise


def _sizes(program: ExportedProgram) -> tuple[tuple[str, tuple[tuple[int, int], ...] | None], ...]:
    return tuple(
        (name, tuple(bounds(program, s) for s in value.shape) if isinstance(value, Tensor) else None)
        for name, value in input_values(program)
    )


def _drop_checks(module: fx.GraphModule) -> None:
    """Take out what computes nothing: checks of the input and of dtypes, questions whose answer nobody reads."""
    for node in reversed(list(module.graph.nodes)):
        guards = node.op == "call_module" and node.target == "_guards_fn"
        if guards or (node.op == "call_function" and not node.users and _is_idle(node.target)):
            module.graph.erase_node(node)
    if hasattr(module, "_guards_fn"):
        del module._guards_fn


def _is_idle(target: Any) -> bool:
    """Whether a call without readers does nothing: it only gives something, and throws no dice."""
    schema = getattr(target, "_schema", None)
    if schema is None or str(target) in _CHECKS:
        return schema is not None
    return bool(schema.returns) and not schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _steps(nodes: Iterable[fx.Node]) -> tuple[_Step, ...]:
    place: dict[fx.Node, int] = {}
    steps: list[_Step] = []
    last: dict[int, int] = {}
    for node in nodes:
        if node.op == "call_method":
            raise TraceError(f"the exported program calls the method {node.target}")
        step = _Step(node.op, node.target, _held(node.args, place), _held(node.kwargs, place))
        for source in node.all_input_nodes:
            last[place[source]] = len(steps)
        place[node] = len(steps)
        steps.append(step)
    for made, user in last.items():
        steps[user].done_with += (made,)
    return tuple(steps)


def _held(argument: Any, place: Mapping[fx.Node, int]) -> Any:
    if isinstance(argument, fx.Node):
        return _Value(place[argument])
    return _mapped(argument, lambda a: _held(a, place))


def _filled(argument: Any, values: list[Any]) -> Any:
    if isinstance(argument, _Value):
        return values[argument.step]
    return _mapped(argument, lambda a: _filled(a, values))


def _mapped(argument: Any, change: Any) -> Any:
    """``argument`` with ``change`` done to what is in it; fx's own lists and dicts become plain ones."""
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*(change(a) for a in argument))
    if isinstance(argument, tuple):
        return tuple(change(a) for a in argument)
    if isinstance(argument, list):
        return [change(a) for a in argument]
    if isinstance(argument, Mapping):
        return {k: change(v) for k, v in argument.items()}
    if isinstance(argument, slice):
        return slice(change(argument.start), change(argument.stop), change(argument.step))
    return argument


def children_of(spec: Any) -> list[Any]:
    """The parts of a TreeSpec, whichever way this torch has them."""
    return list(spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs)
