"""Subgraphs that a program runs without gradients or under autocast, laid out in the graph around them.

There the weights that they use are fetched by name, as everywhere. What the subgraph stood under is entered before its
first step and left after its last one, and is found again by whoever traces the steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

_GRAD, _CAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_ARGUMENTS = {_GRAD: 1, _CAST: 4}  # before the subgraph


def enter(stack: contextlib.ExitStack | None, kind: str, *settings: Any) -> None:
    """A step of its own: what follows runs under ``kind``. The runner gives the stack."""
    assert stack is not None
    inner = contextlib.ExitStack()
    if kind == _GRAD:
        inner.enter_context(torch.set_grad_enabled(settings[0]))
    else:
        device, dtype, enabled, cache = settings
        inner.enter_context(torch.autocast(device, dtype, enabled, cache))
    stack.push(inner.pop_all())


def leave(stack: contextlib.ExitStack | None) -> None:
    """A step of its own: the last :func:`enter` ends here."""
    assert stack is not None
    last = stack._exit_callbacks.pop()  # type: ignore[attr-defined]
    last[1](None, None, None)


def inline(module: fx.GraphModule) -> None:
    """Lay out every such subgraph of ``module`` in its own graph, in place; subgraphs in subgraphs too."""
    for node in _wrapped(module):
        _lay_out(module, node)


def _wrapped(module: fx.GraphModule) -> Iterator[fx.Node]:
    while True:
        found = next((n for n in module.graph.nodes if _inner(module, n) is not None), None)
        if found is None:
            return
        yield found


def _inner(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    place = _ARGUMENTS.get(getattr(node.target, "__name__", ""))
    if node.op != "call_function" or place is None or len(node.args) <= place:
        return None
    fetched = node.args[place]
    if not isinstance(fetched, fx.Node) or fetched.op != "get_attr":
        return None
    inner = _attribute(module, str(fetched.target))
    return inner if isinstance(inner, fx.GraphModule) else None


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _lay_out(module: fx.GraphModule, node: fx.Node) -> None:
    inner = _inner(module, node)
    assert inner is not None
    kind = str(node.target.__name__)  # type: ignore[union-attr]
    place = _ARGUMENTS[kind]
    fetched = node.args[place]
    assert isinstance(fetched, fx.Node)
    values = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), node.args[place + 1 :], strict=True))
    result: Any = None
    with module.graph.inserting_before(node):
        module.graph.call_function(enter, (kind, *node.args[:place]))
        for step in inner.graph.nodes:
            if step.op == "output":
                result = fx.node.map_arg(step.args[0], lambda n: values[n])
            elif step.op != "placeholder":
                copied = module.graph.node_copy(step, lambda n: values[n])  # type: ignore[arg-type, return-value]
                if step.op in ("get_attr", "call_module"):
                    copied.target = f"{fetched.target}.{step.target}"
                values[step] = copied
        module.graph.call_function(leave)
    _hand_on(module, node, result)
    module.graph.erase_node(node)


def _hand_on(module: fx.GraphModule, node: fx.Node, result: Any) -> None:
    """Whoever took an element of what the subgraph gave takes that element; a single value is taken as it is."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        return
    for user in list(node.users):
        if getattr(user.target, "__name__", "") == "getitem":
            user.replace_all_uses_with(result[user.args[1]])
            module.graph.erase_node(user)
    if node.users:
        with module.graph.inserting_before(node):
            whole = module.graph.call_function(tuple, (list(result),))
        node.replace_all_uses_with(whole)
