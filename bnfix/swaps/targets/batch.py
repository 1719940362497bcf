"""Back from SyncBatchNorm to BatchNorm, for one process and for export."""

from __future__ import annotations

from torch import nn

from bnfix.swaps.site import Site
from bnfix.swaps.target import Spec, Target
from bnfix.swaps.targets.sync import settings_of

_CLASSES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


class Batch(Target):
    """``to="batch"``: the same tensors, in the class of the rank that was seen; a SyncBatchNorm takes any."""

    name = "batch"
    calibrated = False
    keeps_parameters = True

    def specs(self, site: Site, groups: int | None) -> list[Spec] | str:
        """The one, if the rank is known."""
        classes = {_CLASSES.get(len(shape)) for shape in site.shapes}
        cls = classes.pop() if len(classes) == 1 else None
        if cls is None:
            seen = "its inputs have several ranks" if site.shapes else "no forward reached it"
            return f"{seen}: whether it is a BatchNorm1d, 2d or 3d is not known"
        return [{"class": cls, "args": settings_of(site.module, site.channels, site.eps)}]

    def already(self, site: Site) -> bool:
        """Whatever is no SyncBatchNorm."""
        return not isinstance(site.module, nn.SyncBatchNorm)
