from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_sites import lines_of, not_seen, sites_apart
from bnfix.rules.measured import ENOUGH_BATCHES, Apart, Limits, apart, averaged, differing
from bnfix.rules.reading import site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Safety, Skipped


class CallSitesDiffer(Rule):
    """One norm that is called on inputs of different distributions.

    ## What it does

    Where a norm is called several times in one forward (or one model several times by `forward=`), compares the moments
    of these calls over at least ten batches: d, the largest over pairs of calls of the channel median of
    |μi − μj|/σ, and l, that of ½|ln vi/vj|. A warning for d > .3 or l > .5. An error for d > .5 where the norm has
    indeed stored what separate calls leave: a variance that misses what lies between the calls (more than 5 % of all).
    Calls alone are no fault: views of one distribution differ by .02. In a training loop (`bnfix.watch`) the calls of
    one optimizer step are compared in the same way, beyond what chance does; there d > .5 alone is the error.

    ## Why is this bad

    In training each call is normalised with its own batch, so that what the calls differ by disappears. The running
    statistics become an average: right for none of the calls, and the variance between them is missing. In
    evaluation mode the branches come out shifted against each other, and the loss shoots up.

    ## Example

    ```python
    a, p, n = net(anchor), net(positive), net(negative)  # bad where these are of several modalities
    a, p, n = bnfix.joint(net)(anchor, positive, negative)  # good: one forward, one set of statistics
    ```

    ## Fix

    For a trained model: `unshare` gives each call a norm of its own, with the same outputs, and `recalibrate` after it
    gives each the statistics of its branch. Recalibration alone does not heal it: there is no set of statistics
    that fits. For the next training: `joint`. Separate batches for real and generated images in the discriminator of a
    GAN are meant so: leave them, and ignore this rule there.
    """

    code = "BN303"
    name = "call-sites-differ"
    needs = ("norms", "data")
    also = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding a severity, the worst norms first; for the data, and for a training loop."""
        if evidence.loop is not None:
            yield from self._in_a_loop(evidence)
        data = evidence.data
        if data is None:
            return
        several = apart(evidence, data)
        few = [a for a in several if a.batches < ENOUGH_BATCHES]
        if few:
            least, sites = min(a.batches for a in few), tuple(a.path or "(root)" for a in few)
            reason = f"{least} batches are too few: it takes {ENOUGH_BATCHES}"
            yield Skipped(self.code, reason, "more batches", sites)
        limits = Limits(
            means=self.option(evidence, "means", 0.3),
            spreads=self.option(evidence, "spreads", 0.5),
            error=self.option(evidence, "error", 0.5),
            between=self.option(evidence, "between", 0.05),
        )
        severe, others = differing(several, limits)
        if data.role != "train" and not averaged(several):
            return  # evaluated on what it was trained for: one forward over all, say
        for severity, found in (("error", severe), ("warning", others)):
            if found:
                yield self._said(severity, sorted(found, key=lambda a: -max(a.means, a.spreads)))

    def _in_a_loop(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """The batches of one optimizer step, by the place in the code that they come from."""
        yield from not_seen(self.code, evidence.loop)
        means, spreads = self.option(evidence, "means", 0.3), self.option(evidence, "spreads", 0.5)
        found = sites_apart(evidence.loop, means, spreads, self.option(evidence, "error", 0.5))
        for severity in ("error", "warning"):
            here = [a for a in found if a.severity == severity]
            if here:
                pair, names = here[0].pair, tuple(site(a.norm.path) for a in here)
                yield self.found(
                    here[0].severity,
                    f"{some(names)}: {len(here[0].pattern.sites)} calls in a step on inputs that differ (means by "
                    f"{pair.shift:.2g} σ, ½|ln var| by {pair.ratio:.2g}, over {pair.batches} steps)"
                    f"{lines_of(here[0].pattern)}: one set of statistics fits none of them",
                    names,
                    fix=Fix("joint", "one forward for all: bnfix.joint(net)(a, b); train again", names),
                    means={n: a.pair.shift for n, a in zip(names, here, strict=True)},
                    spreads={n: a.pair.ratio for n, a in zip(names, here, strict=True)},
                    batches=pair.batches,
                )

    def _said(self, severity: str, found: list[Apart]) -> Finding:
        worst = found[0]
        names = tuple(a.path or "(root)" for a in found)
        spreads = worst.spreads if worst.spreads >= 0.005 else 0  # a sign that was turned leaves it at rounding
        return self.found(
            severity,  # type: ignore[arg-type]
            f"{some(names)}: called on {worst.calls} inputs that differ (means by {worst.means:.2g} σ, ½|ln var| by "
            f"{spreads:.2g}): one set of statistics fits none of them",
            names,
            fix=Fix(
                "unshare",
                "a norm for each call, then recalibrate; joint() for the next training",
                names,
                safety=Safety.NEEDS_DATA,
            ),
            means={n: a.means for n, a in zip(names, found, strict=True)},
            spreads={n: a.spreads for n, a in zip(names, found, strict=True)},
            between=worst.between,
            stored=worst.stored,
        )

    def bad(self) -> Case:
        """Two modalities, each forwarded by itself; the statistics are the average of both."""
        from bnfix.rules.data_cases import inputs_of, norms_of, store

        case = self._case(-1.0)
        pairs: list[Any] = list(case.data or ())
        for norm in norms_of(case.model):
            seen = [inputs_of(norm, lambda i=i: [case.model(pair[i]) for pair in pairs]) for i in (0, 1)]  # type: ignore[misc]
            store(norm, (seen[0].mean(1) + seen[1].mean(1)) / 2, (seen[0].var(1) + seen[1].var(1)) / 2)
        return case

    def good(self) -> Case:
        """Two views of one distribution."""
        return self._case(1.0)

    def _case(self, sign: float) -> Case:
        from bnfix.rules.data_cases import batches, conv_net, fit, images

        def both(model: Any, batch: Any) -> Any:
            return tuple(model(x) for x in batch)

        data = list(zip(batches(images()), batches(sign * images(seed=1)), strict=True))
        return Case(fit(conv_net(), data, both), data=data, options={"forward": both})
