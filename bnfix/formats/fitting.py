"""Weights put into an architecture: names brought into its form, then all of them or a clear error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bnfix.errors import LoadError
from bnfix.formats.base import Weights
from bnfix.formats.names import common_prefix, printable, wrapped_by_training

if TYPE_CHECKING:
    import torch
    from torch import nn

_COUNTER = "num_batches_tracked"
_SHOWN = 4
_Shapes = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Attempt:
    """The weights under the names that one renaming gives them, against the names the model has."""

    tensors: Mapping[str, Any]
    rename: Callable[[str], str]
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    counters: tuple[str, ...] = field(default=())

    @property
    def differences(self) -> int:
        return len(self.missing) + len(self.unexpected)


def fit(model: nn.Module, weights: Weights, *, where: str, arch: str) -> tuple[str, ...]:
    """Load ``weights`` into ``model``, in place and strictly. Returns what a person should know of it.

    Names are tried as they are, without what training wrappers put before them, and without one prefix that all
    share. Missing may only be counters of batches, which old files have not.

    Raises:
        LoadError: names or shapes differ, or the model is left without values.
    """
    attempts = [_against(model, attempt) for attempt in _attempts(weights)]
    best = min(attempts, key=lambda a: a.differences)
    state = OrderedDict(best.tensors)
    own = model.state_dict()
    differing = _differing(state, own)
    if differing and best.differences:
        raise _misfit(best.missing, best.unexpected, where, arch)
    if differing:
        raise _other_shapes(differing, where, arch)
    for name in best.counters:
        state[name] = own[name]
    state._metadata = {best.rename(f"{k}.")[:-1]: v for k, v in weights.versions.items() if isinstance(k, str)}  # type: ignore[attr-defined]
    on_meta = any(t.is_meta for t in own.values() if hasattr(t, "is_meta"))
    try:
        # The model may have hooks of its own that bring names into its form: the decision is its own
        result = model.load_state_dict(state, strict=False, assign=on_meta)
    except Exception as error:  # the load hooks of a user's module, or a value that is no tensor
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise LoadError(f"{where} does not fit {arch}: {printable(' '.join(lines[-2:]), 300)}") from error
    if result.missing_keys or result.unexpected_keys:
        raise _misfit(tuple(result.missing_keys), tuple(result.unexpected_keys), where, arch)
    _check_filled(model, arch)
    return (*best.notes, *_counter_note(best), *_dtype_note(best.tensors, own))


def put(model: nn.Module, table: MutableMapping[Any, Any]) -> bool:
    """Give the entries of ``table``, weights as they lie in a file, the values of ``model`` where these are others.

    Changes ``table`` in place. Names are brought together as :func:`fit` does; counters that the file has not stay out.

    Returns:
        False, and ``table`` as it was, where the model has tensors for which the file has no name.
    """
    import torch

    tensors = {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    best = min((_against(model, a) for a in _attempts(Weights(tensors))), key=lambda a: a.differences)
    if best.missing:
        return False
    state = model.state_dict()
    for name, old in tensors.items():
        new = state.get(best.rename(name))
        if not isinstance(new, torch.Tensor) or {new.layout, old.layout} != {torch.strided}:
            continue
        new = new.detach().cpu()
        if not torch.equal(old, new.to(old.dtype)):
            table[name] = new.clone()
    return True


def _attempts(weights: Weights) -> list[_Attempt]:
    tensors = weights.tensors
    attempts = [_Attempt(tensors, str, ())]
    renaming = wrapped_by_training(tensors)
    stripped = tensors
    if renaming:
        stripped = {renaming(k): v for k, v in tensors.items() if k not in renaming.dropped}
        attempts.append(
            _Attempt(
                stripped, renaming, (f"prefix {str(renaming)!r} stripped from the names{_left_out(renaming.dropped)}",)
            )
        )
    prefix = common_prefix(stripped)
    if prefix:
        note = f"prefix {str(renaming) + prefix!r} stripped from the names, so that they fit"
        attempts.append(
            _Attempt(
                {k.removeprefix(prefix): v for k, v in stripped.items()},
                lambda name: renaming(name).removeprefix(prefix),
                (note,),
            )
        )
    return attempts


def _against(model: nn.Module, attempt: _Attempt) -> _Attempt:
    own = model.state_dict().keys()
    missing = [k for k in own if k not in attempt.tensors]
    counters = tuple(k for k in missing if k.rpartition(".")[2] == _COUNTER)
    unexpected = tuple(k for k in attempt.tensors if k not in own)
    rest = tuple(k for k in missing if k not in set(counters))
    return _Attempt(attempt.tensors, attempt.rename, attempt.notes, rest, unexpected, counters)


def _differing(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[_Shapes]:
    return [
        (k, tuple(v.shape), tuple(own[k].shape))
        for k, v in state.items()
        if k in own and hasattr(v, "shape") and hasattr(own[k], "shape") and tuple(v.shape) != tuple(own[k].shape)
    ]


def _other_shapes(differing: list[_Shapes], where: str, arch: str) -> LoadError:
    shown = "; ".join(f"{printable(k)} is {_by(a)} in the file, {_by(b)} in {arch}" for k, a, b in differing[:_SHOWN])
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return LoadError(f"{where} does not fit {arch}: {shown}{more}", hint=_shape_hint(differing, arch))


def _shape_hint(differing: list[_Shapes], arch: str) -> str:
    """The argument that would make the shapes fit, where the architecture is one that takes it."""
    hub = arch.partition(":")[0]
    outputs = {(a[0], b[0]) for _, a, b in differing if a and b and a[1:] == b[1:]}
    if len(outputs) == 1 and all(a and b and a[1:] == b[1:] for _, a, b in differing):
        classes = outputs.pop()[0]
        if hub in ("timm", "torchvision"):
            return f"the file has {classes} classes:  --arch-kw num_classes={classes}"
        return f"the file has {classes} outputs there: the argument for it, such as  --arch-kw num_classes={classes}"
    channels = {a[1] for _, a, b in differing if len(a) > 1 and len(b) > 1 and a[:1] + a[2:] == b[:1] + b[2:]}
    if hub == "timm" and len(channels) == 1 and len(differing) == 1:
        return f"the file takes {next(iter(channels))} input channels:  --arch-kw in_chans={next(iter(channels))}"
    return "another --arch, or other arguments for it:  --arch-kw name=value"


def _misfit(missing: tuple[str, ...], unexpected: tuple[str, ...], where: str, arch: str) -> LoadError:
    parts = []
    if missing:
        parts.append(f"{len(missing)} names of the model are missing ({_first(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} in the file are unknown to it ({_first(unexpected)})")
    return LoadError(
        f"{where} does not fit {arch}: {', '.join(parts)}",
        hint=f"another --arch, or arguments for it:  --arch-kw name=value\nwhat the file holds:  bnfix info {where}",
    )


def _left_out(names: frozenset[str]) -> str:
    return f", {', '.join(sorted(names))} left out" if names else ""


def _first(names: tuple[str, ...]) -> str:
    return ", ".join(printable(n) for n in names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _check_filled(model: nn.Module, arch: str) -> None:
    empty = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise LoadError(
            f"{arch} is built on the meta device, and {len(empty)} tensors have no values ({_first(tuple(empty))})",
            hint="build it on the cpu",
        )


def _counter_note(attempt: _Attempt) -> tuple[str, ...]:
    count = len(attempt.counters)
    return (f"{count} {_COUNTER} are not in the file, as in files of before torch 0.4.1: left at 0",) if count else ()


def _dtype_note(tensors: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    changed = sorted(
        {
            f"{v.dtype} → {own[k].dtype}".replace("torch.", "")
            for k, v in tensors.items()
            if k in own
            and hasattr(v, "dtype")
            and hasattr(own[k], "dtype")
            and v.dtype != own[k].dtype
            and not own[k].is_meta
        }
    )
    return (f"weights converted to the model's types: {', '.join(changed)}",) if changed else ()
