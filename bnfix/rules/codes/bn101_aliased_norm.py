from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Safety


class AliasedNorm(Rule):
    """One norm under several names.

    ## What it does

    Looks for one module object that the model holds under two or more names.

    ## Why is this bad

    It need not be: sharing may be meant. But all places share one set of running statistics, so in evaluation mode each
    is normalised with a mixture of what all of them see. Where the inputs differ that is wrong for every one of them
    (then BN303 says so, with figures), and averaging or converting the model tends to keep only one of the names.

    ## Example

    ```python
    norm = nn.BatchNorm2d(64)
    self.first, self.second = Block(norm), Block(norm)  # bad, unless meant
    self.first, self.second = Block(nn.BatchNorm2d(64)), Block(nn.BatchNorm2d(64))
    ```

    ## Fix

    `unshare` gives each place a norm of its own, with the same outputs to the bit; recalibrate afterwards.
    """

    code = "BN101"
    name = "aliased-norm"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each shared norm."""
        for norm in evidence.norms or ():
            if len(norm.paths) > 1:
                yield self.found(
                    "info",
                    f"one {norm.cls} has {len(norm.paths)} names: {', '.join(norm.paths)}; they share its statistics",
                    norm.paths,
                    fix=Fix("unshare", "give each place its own norm", norm.paths, safety=Safety.EXACT),
                    names=len(norm.paths),
                )

    def bad(self) -> Case:
        """Two names."""
        from torch import nn

        norm = nn.BatchNorm2d(4)
        return Case(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm))

    def good(self) -> Case:
        """Two norms."""
        from torch import nn

        return Case(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
