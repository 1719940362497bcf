"""A model that is run, and left as it was found."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bnfix.graph.footprints import Tables
from bnfix.graph.writing import Saved, put_back
from bnfix.running.modes import modes_of_thread, set_modes
from bnfix.running.written import Kept

SMALL = 1 << 16
"""Numbers of a parameter up to which its values are kept: scales and biases, what is set up by a first batch."""


@contextlib.contextmanager
def preserved(model: nn.Module, *, weights: bool = True) -> Iterator[nn.Module]:
    """Run ``model`` inside; whatever happens there, it leaves as it came, Ctrl-C included.

    Kept: the training flag of each module by itself, the values and identities of buffers, entries of
    each module's ``__dict__`` (an attribute written in forward goes again), its hooks, the RNG states of torch, every
    CUDA device in use, NumPy where it is loaded, and ``random``; grad mode, default dtype and backend flags.
    With ``weights``, of parameters too, which a forward may write that sets a layer up by its first batch (ActNorm):
    they get back the memory that they had, and its values: up to :data:`SMALL` numbers each in any case, of larger ones
    where :func:`bnfix.running.written.keep` hears what is written. False where they are to be written inside.
    """
    scripted = [(m, m.training) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]  # theirs can't be swapped
    held = [(p, p.data) for p in model.parameters() if weights and type(p) is nn.Parameter and _plain(p.data)]
    grads = [(p, p.requires_grad, p.grad) for p in model.parameters()] if weights else []
    small = [Saved.of(data) for _, data in held if data.numel() <= SMALL]
    large = Kept(data for _, data in held if data.numel() > SMALL)
    dicts = [(m, dict(m.__dict__)) for m in modules]
    tables = [(m, dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in modules]
    buffers = [b for m in modules for b in m._buffers.values() if b is not None and not b.is_meta and not is_lazy(b)]
    buffers += [b for m, _ in scripted for b in m.buffers(recurse=False)]
    values = [Saved.of(b) for b in buffers]
    own_tables = Tables(modules)
    rng = _rng_state()
    backends = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.is_grad_enabled())
    dtype = torch.get_default_dtype()
    modes = modes_of_thread()

    def again() -> None:
        large.end()
        for script, training in scripted:
            script.training = training
        for parameter, data in held:
            if parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape:
                parameter.data = data
        for module, attributes in dicts:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for module, parameters, own_buffers, children in tables:
            for table, kept in (
                (module._parameters, parameters),
                (module._buffers, own_buffers),
                (module._modules, children),
            ):
                if _changed(table, kept):
                    table.clear()
                    table.update(kept)  # type: ignore[arg-type]
        for parameter, wanted, grad in grads:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
            if parameter.grad is not grad:
                parameter.grad = grad
        own_tables.put_back()
        _set_rng_state(rng)
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled = backends[:2]
        torch.set_grad_enabled(backends[2])
        torch.set_default_dtype(dtype)
        set_modes(modes)
        put_back((*values, *small, *large.values))

    try:
        with large:
            yield model
    finally:
        try:  # as graph.writing.surely, whose first line an interrupt may hit too
            again()
        except BaseException:
            again()
            raise


def _plain(data: torch.Tensor) -> bool:
    return type(data) is torch.Tensor and data.layout is torch.strided and not data.is_meta


def _changed(table: dict[str, Any], kept: dict[str, Any]) -> bool:
    return list(table) != list(kept) or any(table[k] is not kept[k] for k in kept)


@contextlib.contextmanager
def drawing() -> Iterator[list[str]]:
    """What draws random numbers inside, filled in at the end: ``torch``, ``cuda``, ``random``, ``numpy``."""
    before = _rng_state()
    found: list[str] = []
    yield found
    now = _rng_state()
    found += [name for name in before if name in now and not _same_state(before[name], now[name])]


@contextlib.contextmanager
def kept_random() -> Iterator[None]:
    """All random generators leave as they came."""
    state = _rng_state()
    try:
        yield
    finally:
        _set_rng_state(state)


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same_state, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def _rng_state() -> dict[str, Any]:
    import sys

    state: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    import sys

    torch.set_rng_state(state["torch"])
    random.setstate(state["random"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
