from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import count, listed, site
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, NormState, Safety


class AliasedNorm(Rule):
    """One norm under several names.

    ## What it does

    Looks for one module object that the model holds under two or more names, or one set of statistics that lies under
    two names in a file. Names in plain lists and dicts don't count: they are no places in the model.

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

    `unshare` gives each place a norm of its own, with the same outputs to the bit; recalibrate afterwards, so that each
    gets the statistics of its own inputs. A whole block under two names is left as one: that is the way it was built.
    """

    code = "BN101"
    name = "aliased-norm"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each shared norm, and one for all norms of a block that is shared."""
        groups: dict[tuple[str, ...], list[NormState]] = {}
        for norm in evidence.norms or ():
            if len(norm.paths) > 1:
                groups.setdefault(_owners(norm.paths), []).append(norm)
        for owners, norms in groups.items():
            paths = tuple(site(p) for n in norms for p in n.paths)
            if len(norms) == 1:
                what = f"one {norms[0].cls} has {len(paths)} names: {listed(paths)}"
            else:
                what = f"{listed(owners)} are one block: its {count(len(norms), 'norm')} have {len(owners)} names each"
            yield self.found(
                "info",
                f"{what}; the places share its statistics" if len(norms) == 1 else f"{what} and share statistics",
                paths,
                fix=Fix("unshare", "give each place its own norm", paths, safety=Safety.EXACT),
                names=len(owners),
                norms=len(norms),
            )

    def bad(self) -> Case:
        """Two names."""
        from torch import nn, randn

        norm = nn.BatchNorm2d(4)
        return Case(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm), randn(4, 3, 6, 6))

    def good(self) -> Case:
        """Two norms."""
        from torch import nn, randn

        layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        return Case(nn.Sequential(*layers), randn(4, 3, 6, 6))


def _owners(paths: tuple[str, ...]) -> tuple[str, ...]:
    """What of each path is not the same in all of them: the names of the block that is shared."""
    parts = [p.split(".") for p in paths]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return tuple(".".join(p) for p in parts)
