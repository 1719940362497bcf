"""Layer norm as convolutional networks have it: mean and variance of each sample over all channels and positions."""

from __future__ import annotations

from bnfix.swaps.site import Site
from bnfix.swaps.target import ENOUGH, Spec, Target, too_few
from bnfix.swaps.targets.group import group_norm


class Layer(Target):
    """``to="layer"``: GroupNorm with one group, which keeps an affine by channel as the old norm had it.

    On vectors (N, C) that is ``nn.LayerNorm(C)``.
    """

    name = "layer"

    def specs(self, site: Site, groups: int | None) -> list[Spec] | str:
        """The one, if a sample has at least 16 values."""
        values = site.channels * site.positions
        return [group_norm(site, 1)] if values >= ENOUGH else too_few(values, "all of a sample")

    def groups(self, spec: Spec) -> int | None:
        """As the settings say."""
        return int(spec["args"]["num_groups"])
