"""``load_state_dict`` as each norm meets it: whether its running statistics came with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnfix.loop.frames import Spot, here, line_of, user_spot
from bnfix.loop.hooks import Attached
from bnfix.loop.samples import version_of
from bnfix.loop.tally import Tally
from bnfix.types import LoadedState

_STATISTICS = ("running_mean", "running_var")


@dataclass
class _Load:
    """One load that left statistics as they were."""

    missing: tuple[str, ...]
    step: int
    spot: Spot | None
    mean_version: int
    updates: int
    set_since: int


class Loads:
    """The last load of each norm, where it left something missing."""

    def __init__(self, step: Callable[[], int]) -> None:
        self._bad: dict[int, tuple[Tally, _Load]] = {}
        self._step = step
        self.loaded: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._bad)

    def listen(self, attached: Attached, tally: Tally, module: nn.Module, parent: nn.Module | None, name: str) -> None:
        """Hear of loads of one norm. One without weights is heard of by its parent, which sees its neighbours' keys."""
        if module._parameters.get("weight") is not None or parent is None:
            attached.load(module, lambda _, state, prefix, *rest: self._seen(tally, state, prefix, "weight"))
        else:
            attached.load(parent, lambda _, state, prefix, *rest: self._seen(tally, state, f"{prefix}{name}.", ".."))

    def _seen(self, tally: Tally, state: Mapping[str, Any], prefix: str, sign: str) -> None:
        module = tally.module()
        if module is None:
            return
        self.loaded.add(tally.index)
        missing = tuple(n for n in _STATISTICS if prefix + n not in state)
        around = prefix[:-1].rpartition(".")[0]
        around = f"{around}." if around else ""
        came = prefix + sign in state if sign != ".." else any(k.startswith(around) for k in state)
        if missing and came:
            spot, version = user_spot(here(1)), version_of(module, "running_mean")
            load = _Load(missing, self._step(), spot, version, tally.updates + tally.without, _set(tally))
            self._bad[tally.index] = tally, load
        elif not missing:
            self._bad.pop(tally.index, None)

    def log(self) -> tuple[LoadedState, ...]:
        """What is to be told of them."""
        return tuple(_log(tally, load) for tally, load in self._bad.values())


def _set(tally: Tally) -> int:
    return tally.calibrated + tally.expected


def _log(tally: Tally, load: _Load) -> LoadedState:
    module = tally.module()
    written = module is not None and version_of(module, "running_mean") != load.mean_version
    since = tally.updates + tally.without - load.updates
    healed = written or _set(tally) > load.set_since
    return LoadedState(tally.path, load.missing, load.step, line_of(load.spot), since, tally.momentum, healed)
