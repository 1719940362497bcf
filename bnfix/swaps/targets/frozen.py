"""A batch norm that never learns: the same statistics and affine, constants now."""

from __future__ import annotations

from torch import nn

from bnfix.swaps.site import Site
from bnfix.swaps.target import Spec, Target


class Frozen(Target):
    """``to="frozen"``: exact in evaluation mode, and in training mode the same. The first advice for fine-tuning."""

    name = "frozen"
    calibrated = False

    def specs(self, site: Site, groups: int | None) -> list[Spec] | str:
        """The one, if there are statistics to freeze."""
        if site.affine is None:
            return "it has no running statistics to freeze (track_running_stats=False)"
        args = {"num_features": site.channels, "eps": site.eps, "affine": site.tensor("weight") is not None}
        return [{"class": "FrozenBatchNorm", "args": args}]

    def already(self, site: Site) -> bool:
        """A class that is frozen."""
        return site.frozen or (not site.plain and type(site.module).__name__.startswith("FrozenBatchNorm"))

    def take_over(self, site: Site, old: nn.Module, new: nn.Module) -> None:
        """Values of their own: what was a parameter may be trained elsewhere."""
        for name in new._buffers:
            found = old._parameters.get(name, old._buffers.get(name))
            if found is not None:
                new._buffers[name] = found.detach().clone()
            elif name == "bias" and new._buffers[name] is not None:  # a norm with a weight and no bias
                new._buffers[name] = old.get_parameter("weight").detach().new_zeros(site.channels)
