from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.loop_sites import in_one_forward, not_seen, sites_apart
from bnfix.rules.reading import calls_of, site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Safety, Skipped


class SeveralCallSites(Rule):
    """One norm is called several times in one forward.

    ## What it does

    Counts how often each norm is called in one forward, in evaluation and in training mode. Siamese encoders and heads
    that are shared between the levels of a pyramid do it by design.

    ## Why is this bad

    In training mode every call normalises with its own batch, and each one updates the same running statistics. In
    evaluation mode all calls use that one mixture: its mean lies between theirs, and its variance misses how far apart
    their means are. Where the calls see the same distribution nothing is lost. Where they don't, no call gets what it
    was trained with (in a cross-modal triplet net the loss went from .05 to 1.03). The structure alone can't tell
    which, so this is information; with data, BN303 measures it.

    ## Example

    ```python
    za, zb = self.encoder(anchor), self.encoder(other)             # two updates, two normalisations
    za, zb = self.encoder(torch.cat([anchor, other])).chunk(2)     # one of each
    ```

    ## Fix

    In a trained model `unshare` gives each call its own norm (outputs stay the same to the bit); recalibrate
    afterwards. In training, forward once: `bnfix.joint(net)(a, b)`, which needs a new training.
    """

    code = "BN102"
    name = "several-call-sites"
    needs = ("facts",)
    also = ("loop",)
    behind = ("BN303",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for all norms that are called equally often."""
        if evidence.loop is not None:
            yield from self._in_a_loop(evidence)
        most: dict[str, int] = {}
        for facts in (evidence.facts, evidence.facts_training):
            for norm in facts.norms if facts is not None else ():
                assert facts is not None
                most[norm.path] = max(most.get(norm.path, 0), calls_of(facts, norm))
        for calls in sorted(set(most.values()), reverse=True):
            paths = tuple(site(p) for p, n in most.items() if n == calls)
            if calls < 2:
                continue
            yield self.found(
                "info",
                f"{some(paths)}: called {calls} times in one forward, and all calls share one set of statistics",
                paths,
                fix=Fix("unshare", "give each call its own norm", paths, safety=Safety.EXACT),
                calls=calls,
            )

    def _in_a_loop(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """What a watch saw; a warning where BN303 finds that the calls differ."""
        yield from not_seen(self.code, evidence.loop)
        calls = {n.path: c for n in evidence.loop.norms if (c := in_one_forward(n)) > 1}
        differ = {a.norm.path for a in sites_apart(evidence.loop) if a.severity != "info"}
        for severity, wanted in (("warning", True), ("info", False)):
            for times in sorted({c for p, c in calls.items() if (p in differ) is wanted}, reverse=True):
                paths = tuple(site(p) for p, c in calls.items() if c == times and (p in differ) is wanted)
                what = "on inputs that differ" if wanted else "and all calls share one set of statistics"
                yield self.found(
                    severity,  # type: ignore[arg-type]
                    f"{some(paths)}: called {times} times in one forward{',' * (not wanted)} {what}",
                    paths,
                    fix=Fix("unshare", "give each call its own norm", paths, safety=Safety.EXACT),
                    calls=times,
                )

    def bad(self) -> Case:
        """A norm behind each of two layers."""
        from torch import Tensor, nn, randn

        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.norm(self.second(self.norm(self.first(x)).relu()))
                return y

        return Case(Shared(), randn(4, 3, 6, 6))

    def good(self) -> Case:
        """Each has its own."""
        from torch import nn, randn

        layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        return Case(nn.Sequential(*layers), randn(4, 3, 6, 6))
