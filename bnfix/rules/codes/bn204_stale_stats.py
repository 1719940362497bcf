from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.measured import (
    Limits,
    apart,
    by_path,
    compared,
    differing,
    exceeds,
    is_fresh,
    moved_most,
    off_by,
    paths_of,
    undecided,
)
from bnfix.rules.rule import Case, Rule
from bnfix.types import Drift, Evidence, Finding, Fix, Safety, Skipped


class StaleStats(Rule):
    """Running statistics that are not those of the data.

    ## What it does

    Recalibrates a copy of the statistics on a part of the data and compares the outputs. With f the outputs as they are
    and R those with the statistics of the data, e = rms(f − R)/std(R). What chance does is e0: the same between
    recalibrations on two disjoint halves. A warning for e > max(.25, 4·e0), an error for e > .5 and e > 6·e0. No
    labels are needed. Measured on small healthy networks: .02 to .07 where the rate fell to 0 at the end, up to .2
    where training was simply stopped. The drift of single layers is reported beside it, but does not decide: statistics
    can be far off where nothing depends on it.

    ## Why is this bad

    In evaluation mode a norm subtracts and divides by what it has stored. If that is not what its input looks like, all
    layers behind it see inputs that they were not trained on: accuracy falls, often to chance, and only in evaluation
    mode. The usual ways to get there: a momentum too small for the number of steps, weights that were averaged, pruned
    or quantised without the statistics, statistics that were reset or never loaded, other data than in training.

    ## Example

    ```python
    ema = copy.deepcopy(model)
    for a, b in zip(ema.parameters(), model.parameters()):  # bad: running_mean and running_var are no parameters
        a.data.lerp_(b.data, 0.001)

    bnfix.recalibrate(ema, train_loader)                    # good
    ```

    ## Fix

    `recalibrate` sets the statistics to those of the training data: one pass without gradients. It cannot heal a model
    that was trained on sorted or tiny batches, and it is wrong on data that only a few samples were taken of.
    """

    code = "BN204"
    name = "stale-stats"
    needs = ("norms", "data")
    behind = ("BN305",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for the whole model."""
        drift = evidence.data.drift if evidence.data is not None else None
        if drift is None or drift.change is None or drift.null is None:
            reason = drift.reason if drift is not None else "the outputs were not compared"
            yield Skipped(self.code, reason, "more data, or data and a forward= that recalibrate can work with")
            return
        warn, fail = self.option(evidence, "change", 0.25), self.option(evidence, "error", 0.5)
        if not exceeds(drift, warn, self.option(evidence, "over_null", 4)):
            yield from undecided(self.code, drift, warn)
            return
        off = moved_most(drift)
        norms = by_path(evidence)
        if all((n := norms.get(p.replace("(root)", ""))) is not None and is_fresh(n) for p in paths_of(off)):
            yield Skipped(self.code, "the norms that are off are not trained yet: all is as it was made", "training")
            return
        severe = exceeds(drift, fail, self.option(evidence, "error_over_null", 6))
        apart_ = differing(apart(evidence, evidence.data), Limits())[0] if evidence.data is not None else []
        severe = severe and not apart_  # a symptom then, and no statistics heal it: BN303 is the error
        yield self.found(
            "error" if severe else "warning",
            f"the statistics are not those of the data: {_changed(drift)}, two halves of the data differ by "
            f"{drift.null:.2g} of the spread ({off_by(drift, off[0])})",
            paths_of(off),
            fix=Fix("recalibrate", "recalibrate on the training data", safety=Safety.NEEDS_DATA),
            change=drift.change,
            null=drift.null,
            limit=fail if severe else warn,
            samples=drift.samples,
            layers={name: dict(zip(("mean", "var", "kl"), drift.layers[name], strict=True)) for name in off[:10]},
        )

    def bad(self) -> Case:
        """A norm that has learned little of inputs about 3."""
        from bnfix.rules.data_cases import norms_of

        case = self.good()
        (norm,) = norms_of(case.model)
        norm.running_mean.mul_(0.3)
        norm.running_var.lerp_(norm.running_var.new_ones(()), 0.7)
        return case

    def good(self) -> Case:
        """One that has."""
        from bnfix.rules.data_cases import batches, conv_net, fit, images

        data = batches(images())
        return Case(fit(conv_net(), data), data=data)


def _changed(drift: Drift) -> str:
    what = compared(drift)
    if drift.change == float("inf"):
        return f"{what} hold NaN or infinities, and none with those of the data"
    return f"recalibration changes {what} by {drift.change:.2g} of the spread"
