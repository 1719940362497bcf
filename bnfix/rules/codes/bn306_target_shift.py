from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.measured import compared, exceeds, moved_most, off_by, paths_of, undecided
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Skipped


class TargetShift(Rule):
    """Data of deployment that the statistics do not fit.

    ## What it does

    The same as BN204, against the data that the model is to work on (`val_data=`): how far would recalibration on
    them move the outputs, and how far do two halves of them.

    ## Why is this bad

    It says that the data changed, not that the model is wrong. New statistics often win back much of what is lost to
    other lighting, another scanner, noise or blur (adaptive batch norm); they cannot help with what the weights never
    learned, and they are wrong where the new data holds other shares of the classes.

    ## Example

    ```python
    bnfix.check(model, data=train_loader, val_data=camera_two)
    bnfix.recalibrate(model, camera_two)  # then measure: it is a remedy if the metric says so
    ```

    ## Fix

    `recalibrate` a copy on data of deployment, without labels, and compare the metric.
    """

    code = "BN306"
    name = "target-shift"
    needs = ("norms", "data")

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for the whole model."""
        assert evidence.data is not None
        drift = evidence.data.deployed
        if drift is None or drift.change is None or drift.null is None:
            reason = drift.reason if drift is not None else "no data of deployment"
            yield Skipped(self.code, reason, "val_data= (on the command line: --val-data)")
            return
        limit = self.option(evidence, "change", 0.35)
        if not exceeds(drift, limit, self.option(evidence, "over_null", 4)):
            yield from undecided(self.code, drift, limit)
            return
        off = moved_most(drift)
        yield self.found(
            "info",
            f"the data of deployment is another: its statistics change {compared(drift)} by {drift.change:.2g} of the "
            f"spread, two halves of it differ by {drift.null:.2g} ({off_by(drift, off[0])})",
            paths_of(off),
            fix=Fix("code", "bnfix.recalibrate(model, val_data) on a copy; keep it where the metric says so"),
            change=drift.change,
            null=drift.null,
            limit=limit,
            samples=drift.samples,
        )

    def bad(self) -> Case:
        """Negatives."""
        return self._case(-1.0)

    def good(self) -> Case:
        """More of the same."""
        return self._case(1.0)

    def _case(self, sign: float) -> Case:
        from bnfix.rules.data_cases import batches, conv_net, fit, images

        data = batches(images())
        there = batches(sign * images(seed=1))
        return Case(fit(conv_net(), data), data=data, options={"val_data": there})
