"""What only running shows: outputs that something keeps, attributes that the forward writes, dice that it throws."""

from __future__ import annotations

import contextlib
import gc
import inspect
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bnfix.errors import PassError, one_line

_PRODUCERS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d, torch.convolution, torch._C._nn.linear,
}  # fmt: skip


@dataclass(frozen=True)
class FirstRun:
    """What was seen of one call.

    ``held`` are the keys of the weights of layers whose output outlived the forward, ``wrote`` the
    attributes that it wrote, ``blockers`` reasons to trust no trace of it.
    """

    held: frozenset[int]
    wrote: tuple[str, ...]
    blockers: tuple[str, ...]


class _Producers(TorchFunctionMode):
    """Remembers, weakly, the storage of each output of a convolution or linear layer."""

    def __init__(self, key_of: Callable[[Tensor], int | None]) -> None:
        self.seen: list[tuple[int, StorageWeakRef]] = []
        self._key_of = key_of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():  # torch.cond compiles its branches, also in eager mode
            return out
        if func in _PRODUCERS and isinstance(out, Tensor):
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            key = self._key_of(weight) if isinstance(weight, Tensor) else None
            if key is not None:
                with contextlib.suppress(RuntimeError, NotImplementedError):  # inside vmap there is no storage
                    self.seen.append((key, StorageWeakRef(out.untyped_storage())))  # type: ignore[no-untyped-call]
        return out

    def alive(self, returned: Any = ()) -> set[int]:
        """Weights whose layer's output is still there, and not because it is ``returned`` (that shows in the graph).

        A mere reference cycle is not someone who keeps it.
        """
        leaves = [t for t in tree_leaves(returned) if type(t) is Tensor and t.layout is torch.strided]
        expected = {StorageWeakRef(t.untyped_storage()).cdata for t in leaves}  # type: ignore[no-untyped-call]
        kept = [(key, ref) for key, ref in self.seen if not ref.expired() and ref.cdata not in expected]  # type: ignore[no-untyped-call]
        if kept:
            gc.collect()
        return {key for key, ref in kept if not ref.expired()}  # type: ignore[no-untyped-call]


def first_run(copy: nn.Module, call: Any, key_of: Callable[[Tensor], int | None]) -> FirstRun:
    """Run ``copy`` (a private one) once on ``call``, and look at what is left of it.

    Whatever keeps a layer's output (an attribute, a list that came in as an argument, a cache) could be read by
    someone, and would hold other numbers after a fold. The graph shows none of this.

    Raises:
        PassError: the forward fails.
    """
    watch = _Producers(key_of)
    held: set[int] = set()
    # At the end of the model's own forward its locals are gone, but what came in as an argument is still there.
    at_end = copy.register_forward_hook(lambda _module, _inputs, out: held.update(watch.alive(out)))
    before = {path: (m, _attributes(m)) for path, m in copy.named_modules()}
    dice = _dice()
    try:
        with torch.no_grad(), watch:
            out = call.run(copy)
    except Exception as error:  # the user's own forward may raise anything
        raise PassError(
            f"the model's forward failed on {call.signature}: {one_line(error)}",
            hint=f"its forward takes {inspect.signature(copy.forward)}: give an example that it accepts",
        ) from error
    finally:
        at_end.remove()
    del out
    held |= watch.alive()
    wrote = [
        f"{path}.{name}".lstrip(".")
        for path, (module, attributes) in before.items()
        for name, value in _attributes(module).items()
        if name not in attributes or attributes[name][0] is not value[0] or attributes[name][1] != value[1]
    ]
    thrown = "its forward draws Python's or NumPy's random numbers: it may go another way each time"
    return FirstRun(frozenset(held), tuple(wrote), () if dice == _dice() else (thrown,))


def _attributes(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """Each attribute that is no part of the module's own tables, and its size where it is a container."""
    return {
        name: (value, len(value) if isinstance(value, (list, dict, set)) else 0)
        for name, value in vars(module).items()
        if not name.startswith("_forward_") and name not in ("_parameters", "_buffers", "_modules")
    }


def _dice() -> Any:
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else (numpy.random.get_state()[1].tobytes(), numpy.random.get_state()[2])
    return random.getstate(), drawn
