"""GroupNorm (Wu & He 2018): mean and variance of each sample over groups of channels and all positions."""

from __future__ import annotations

from bnfix.swaps.site import Site
from bnfix.swaps.target import ENOUGH, FEWEST, Spec, Target, divisors, too_few


def group_norm(site: Site, groups: int) -> Spec:
    """GroupNorm with this many groups."""
    args = {"num_groups": groups, "num_channels": site.channels, "eps": site.eps, "affine": True}
    return {"class": "GroupNorm", "args": args}


class Group(Target):
    """``to="group"``: as many groups as the user says, else those that explain the old output best.

    A vector (N, C) has one value a channel: there one group is taken.
    """

    name = "group"

    def specs(self, site: Site, groups: int | None) -> list[Spec] | str:
        """Candidates are divisors of C that leave a group at least 16 values, (C/G)·S."""
        channels, positions = site.channels, site.positions
        if groups is not None:
            if channels % groups:
                return f"{groups} groups do not divide its {channels} channels"
            values = channels // groups * positions
            if values < FEWEST:
                return too_few(values, f"{groups} groups of {channels} channels with {_at(positions)}", FEWEST)
            return [group_norm(site, groups)]
        most = 1 if positions == 1 else 32
        found = [g for g in divisors(channels, most) if channels // g * positions >= ENOUGH]
        if not found:
            return too_few(channels * positions, f"{channels} channels with {_at(positions)}")
        return [group_norm(site, g) for g in found]

    def groups(self, spec: Spec) -> int | None:
        """As the settings say."""
        return int(spec["args"]["num_groups"])


def _at(positions: int) -> str:
    return f"{positions} position{'' if positions == 1 else 's'} each"
