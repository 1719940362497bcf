from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.measured import by_path, learns, median_of, not_for_training
from bnfix.rules.rule import Case, Rule
from bnfix.types import DataEvidence, Evidence, Finding, Fix, SiteData, Skipped

_BATCHES, _SAMPLES = 20, 4
_CHANCE = 5.0
"""Standard errors of the variance of B batch means, √(2/(B − 1)), that F may be off by: channels may all be as one."""


class SortedBatches(Rule):
    """A training loader whose batches differ more than chance would have it.

    ## What it does

    Takes the mean of each batch at a norm, over at least 20 batches, and compares their variance with that of single
    samples: F = N·Var(batch means)/Var(sample means), the median over channels. Shuffled data gives .7 to 1.5. A
    warning for F > 2.5 and F > 1 + 5·√(2/(B − 1)), what B batches leave to chance, where also more than 4 % of the
    variance between samples lies between batches: in large batches, F shows differences that are too small to matter.
    So at the first norm. What a class looks like may show only behind it; there it takes an eighth of the variance, and
    a batch of eight classes or more never comes to that, however well the network tells them apart.

    ## Why is this bad

    A norm takes off the mean of its batch. If a batch is of one class (one patient, one video), that takes off what the
    class looks like, and the network learns to do without; in evaluation mode the running statistics take off something
    else. Measured on digits: 85, 57, 59, 30 and 70 % with a class a batch, where shuffling gives 98, 98, 99, 95 and
    95 %; with four of ten classes a batch, 5 points are lost. Statistics do not heal it.

    ## Example

    ```python
    DataLoader(ImageFolder(root), batch_size=64)                # bad: a folder is sorted by class
    DataLoader(ImageFolder(root), batch_size=64, shuffle=True)  # good
    ```

    ## Fix

    Shuffle, and train anew: a change of your own code. A shuffle buffer has to be larger than a class. A sampler that
    draws P classes of K samples is fine from about eight classes a batch on.
    """

    code = "BN304"
    name = "sorted-batches"
    needs = ("norms", "data")

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for the loader."""
        data = evidence.data
        assert data is not None
        if data.role != "train":
            yield not_for_training(self.code)
            return
        norms = by_path(evidence)
        sites = [s for s in data.sites if learns(norms.get(s.path))]
        if not sites:
            return
        rows = self._rows(data, sites[0])
        samples = median_of(sites[0].batch_samples)
        if len(rows) < _BATCHES or samples < _SAMPLES:
            reason = f"{len(rows)} batches of {samples:.0f} are too few: it takes {_BATCHES} of {_SAMPLES}"
            yield Skipped(self.code, reason, "more batches")
            return
        least, deep = self.option(evidence, "share", 0.04), self.option(evidence, "share_behind", 0.125)
        for site in sites:
            rows = self._rows(data, site)
            live = site.sample_var > 1e-12 * (1 + site.mean**2)
            if len(rows) < _BATCHES or not bool(live.any()):
                continue
            samples = median_of(site.batch_samples)
            ratio = median_of(samples * site.batch_mean[rows][:, live].var(0, ddof=1) / site.sample_var[live])
            limit = max(self.option(evidence, "ratio", 2.5), 1 + _CHANCE * (2 / (len(rows) - 1)) ** 0.5)
            share = (ratio - 1) / samples
            if ratio > limit and share > (least if site is sites[0] else deep):
                yield self._said(site, len(rows), ratio, limit, share)
                return

    def _said(self, site: SiteData, batches: int, ratio: float, limit: float, share: float) -> Finding:
        return self.found(
            "warning",
            f"the batches differ {ratio:.1f} times as much as shuffled ones would (at {site.name}): the data is "
            "sorted, or a batch holds what belongs together",
            (site.path or "(root)",),
            fix=Fix("code", "shuffle=True in the DataLoader, then train anew"),
            ratio=ratio,
            share=share,
            limit=limit,
            batches=batches,
        )

    def _rows(self, data: DataEvidence, site: SiteData) -> list[int]:
        """Batches of the usual size: the mean of a small last one scatters more."""
        usual = median_of(site.batch_samples)
        return [i for i, n in enumerate(site.batch_samples) if 0.5 * usual <= n <= 2 * usual]

    def bad(self) -> Case:
        """Sorted by brightness."""
        return self._case(True)

    def good(self) -> Case:
        """In no order."""
        return self._case(False)

    def _case(self, by_brightness: bool) -> Case:
        from bnfix.rules.data_cases import batches, conv_net, fit, images

        x = images()
        data = batches(x[x.mean((1, 2, 3)).argsort()] if by_brightness else x)
        return Case(fit(conv_net(), data), data=data)
