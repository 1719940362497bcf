from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.codes._examples import conv_norm, images
from bnfix.rules.reading import needs_module, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Safety, Skipped


class FlagBufferMismatch(Rule):
    """The flag `track_running_stats` says one thing, the buffers another.

    ## What it does

    Compares `track_running_stats` of each norm with whether it has running statistics. They disagree where the flag was
    flipped on a finished module, or the buffers were set to None.

    ## Why is this bad

    The flag does not do what its name says after construction. Set to False on a norm with buffers, evaluation goes on
    using them, and training goes on normalising with the batch but no longer updates them: the two drift apart in
    silence. Set to True on a norm without buffers, nothing is tracked at all, and evaluation depends on the batch (an
    instance norm fails).

    ## Example

    ```python
    bn.track_running_stats = False            # bad: evaluation still uses bn.running_mean
    bn = nn.BatchNorm2d(64, track_running_stats=False)
    ```

    ## Fix

    With buffers there: set the flag again, which changes no output in evaluation. Without: register them, and
    recalibrate with training data.
    """

    code = "BN105"
    name = "flag-buffer-mismatch"

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for each kind of mismatch."""
        yield from needs_module(self.code, evidence, "the flag track_running_stats")
        flagged = [n for n in evidence.norms or () if n.tracks is not None and n.tracks != n.has_stats]
        off = sites(n for n in flagged if n.has_stats)
        if off:
            yield self.found(
                "error",
                f"{some(off)}: track_running_stats=False although there are running statistics: evaluation uses them, "
                "training does not update them",
                off,
                fix=Fix("set", "track_running_stats=True", off, {"track_running_stats": True}, Safety.EXACT),
            )
        empty = sites(n for n in flagged if not n.has_stats)
        if empty:
            yield self.found(
                "error",
                f"{some(empty)}: track_running_stats=True although there are no running statistics: evaluation depends "
                "on the batch",
                empty,
                fix=Fix("reset", "register running statistics, then recalibrate", empty, safety=Safety.NEEDS_DATA),
            )

    def bad(self) -> Case:
        """The flag was flipped."""
        model, norm = conv_norm()
        norm.track_running_stats = False
        return Case(model, images())

    def good(self) -> Case:
        """As it was made."""
        return Case(conv_norm()[0], images())
