"""What every target norm is: the settings that it can have at a site, or why it can't stand there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnfix.graph import build_norm
from bnfix.registry import plugins
from bnfix.swaps import targets
from bnfix.swaps.site import Site

Spec = Mapping[str, Any]
"""A norm as plain data, ``{"class": "GroupNorm", "args": {…}}``: as recipes hold it (``graph.build_norm``)."""

ENOUGH = 16
"""Values to take mean and variance of, from which on a norm over one sample is proposed."""
FEWEST = 4
"""The same for one that the user asked for. Of two values a norm makes ±1, of one it makes 0, whatever they are."""


class Target(ABC):
    """One kind of norm to swap to.

    ``calibrated``: it computes another function than the batch norm did, and its affine is fitted to the old outputs;
    its statistics are those of each sample by itself. Else it is exact in evaluation mode, and takes the tensors of the
    old norm over.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = True
    keeps_parameters: ClassVar[bool] = False
    """Whether weight and bias stay the same objects."""

    @abstractmethod
    def specs(self, site: Site, groups: int | None) -> list[Spec] | str:
        """The settings to choose from at ``site``, affine included; or the reason why it can't stand there.

        Calibration takes the one whose output explains most of the old one's; without it the first is taken. All have
        affine tensors of the same shape. ``groups`` is the user's number of groups, None to choose.
        """

    def already(self, site: Site) -> bool:
        """Whether the norm is what it would become: it is left alone without a word."""
        return False

    def unit(self, spec: Spec, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The norm of ``spec`` without its affine, in float64 on the device of ``like``."""
        bare = {**spec, "args": {**spec["args"], "affine": False}}
        return build_norm(bare, like.new_empty((), dtype=torch.float64)).eval()

    def groups(self, spec: Spec) -> int | None:
        """How many groups of channels have mean and variance of their own, where that is all the norm does.

        Then calibration knows a faster way than to run :meth:`unit`.
        """
        return None

    def take_over(self, site: Site, old: nn.Module, new: nn.Module) -> None:
        """Give ``new`` the tensors of ``old``; for targets that are exact.

        Parameters stay the same objects, so that an optimizer, and whoever else holds them, goes on with them.
        """
        for name in ("weight", "bias"):
            parameter, buffer = old._parameters.get(name), old._buffers.get(name)
            if parameter is not None:
                new._parameters[name] = parameter
            elif buffer is not None:  # a constant, as programs have it
                new._parameters[name] = nn.Parameter(buffer.detach().clone(), requires_grad=False)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if name in old._buffers:
                new._buffers[name] = old._buffers[name]


@cache
def all_targets() -> dict[str, Target]:
    """Every target by its name."""
    return {t.name: t for t in plugins(targets.__name__, Target)}  # type: ignore[type-abstract]


def divisors(channels: int, most: int = 32) -> list[int]:
    """Numbers of groups of equal size, 1 first, at most ``most``; eight of them where there are more."""
    found = [d for d in range(1, min(channels, most) + 1) if channels % d == 0]
    if len(found) <= 8:
        return found
    return sorted({found[round(i * (len(found) - 1) / 7)] for i in range(8)})


def too_few(values: int, what: str, needed: int = ENOUGH) -> str:
    """The reason against a norm over ``values`` values."""
    outcome = {1: ", and its output would be 0 for every input", 2: ", and its output would be ±1 for every input"}
    count = f"{values} value" + ("" if values == 1 else "s")
    return f"{what}: mean and variance of {count}{outcome.get(values, '')}; at least {needed} are needed"
