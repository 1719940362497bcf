"""InstanceNorm (Ulyanov et al. 2016): mean and variance of each sample and channel over its positions."""

from __future__ import annotations

from bnfix.swaps.site import Site
from bnfix.swaps.target import FEWEST, Spec, Target, too_few

_CLASSES = {3: "InstanceNorm1d", 4: "InstanceNorm2d", 5: "InstanceNorm3d"}


class Instance(Target):
    """``to="instance"``: the mean of each channel is lost, so nothing that pools afterwards sees it."""

    name = "instance"

    def specs(self, site: Site, groups: int | None) -> list[Spec] | str:
        """The class of the rank that was seen."""
        if site.positions < FEWEST:
            return too_few(site.positions, "one channel of a sample", FEWEST)
        if site.rank not in _CLASSES:
            return "its inputs have several ranks, and an InstanceNorm has one"
        args = {"num_features": site.channels, "eps": site.eps, "affine": True}
        return [{"class": _CLASSES[site.rank], "args": args}]

    def groups(self, spec: Spec) -> int | None:
        """Each channel is one."""
        return int(spec["args"]["num_features"])
