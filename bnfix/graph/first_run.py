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


_CARRIED = frozenset(
    {
        "cat", "concat", "concatenate", "stack", "hstack", "vstack", "add", "add_", "__add__", "__radd__",
        "__iadd__", "mean", "reshape", "flatten", "contiguous", "clone", "repeat", "repeat_interleave",
        "expand", "tile", "roll", "flip", "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "pad",
        "interpolate", "upsample", "index_select", "__getitem__", "take_along_dim", "gather", "unfold", "fold",
        "to", "float", "double", "half", "type", "dropout", "dropout1d", "dropout2d", "dropout3d",
        "alpha_dropout", "feature_alpha_dropout", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "matmul", "__matmul__", "bmm",
        "scaled_dot_product_attention",
    }
)  # fmt: skip
"""Functions that a norm may be folded through and that give memory of their own; views keep that of their source."""


@dataclass(frozen=True)
class FirstRun:
    """What was seen of one call.

    ``held`` are the keys of the weights of layers, and of the means of norms, whose output outlived the forward or went
    into a value that did; ``wrote`` the attributes that it wrote, ``blockers`` reasons to trust no trace of it.
    """

    held: frozenset[int]
    wrote: tuple[str, ...]
    blockers: tuple[str, ...]


class _Producers(TorchFunctionMode):
    """Remembers, weakly, the storage of each output of a layer or norm, and of what these go into."""

    def __init__(self, key_of: Callable[[Tensor], int | None]) -> None:
        self.seen: list[tuple[int, StorageWeakRef]] = []
        self._key_of = key_of
        self._inside: dict[int, tuple[StorageWeakRef, frozenset[int]]] = {}
        """By storage: what it holds the outputs of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():  # torch.cond compiles its branches, also in eager mode
            return out
        if func in _PRODUCERS or func is F.batch_norm:
            name = "weight" if func in _PRODUCERS else "running_mean"
            read = args[1] if len(args) > 1 else (kwargs or {}).get(name)
            key = self._key_of(read) if isinstance(read, Tensor) else None
            if key is not None:
                self._note(out, {key})
        elif getattr(func, "__name__", "") in _CARRIED:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            carried = set().union(*(self._keys_in(t) for t in given))
            if carried:
                self._note(out, carried)
        return out

    def _note(self, out: Any, keys: set[int]) -> None:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # inside vmap there is no storage
            ref = StorageWeakRef(out.untyped_storage())  # type: ignore[no-untyped-call]
            self.seen += [(key, ref) for key in sorted(keys)]
            self._inside[ref.cdata] = (ref, frozenset(keys))

    def _keys_in(self, tensor: Tensor) -> frozenset[int]:
        with contextlib.suppress(RuntimeError, NotImplementedError):
            found = self._inside.get(tensor.untyped_storage()._cdata)
            if found is not None and not found[0].expired():  # type: ignore[no-untyped-call]
                return found[1]
        return frozenset()

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
            hint=what_it_takes(copy),
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


def what_it_takes(model: nn.Module) -> str:
    """What to do where its forward failed on an example."""
    return f"its forward takes {inspect.signature(model.forward)}: give an example that it accepts"


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
