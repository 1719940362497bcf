from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.measured import SEVERE, by_path, exceeds, median_of
from bnfix.rules.reading import listed
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, NormState, Safety, SiteData, Skipped


class PaddingInStats(Rule):
    """Running statistics in which padding counts.

    ## What it does

    With a mask, compares mean and variance of each norm's input over all positions with those over the positions that
    count. A warning where the means are more than .1 σ apart (the channel median), or ½|ln var| more than .1, and what
    is stored is nearer to the ones with padding; an error where BN204 finds that this changes the outputs by as much as
    it calls an error.

    ## Why is this bad

    How much padding a batch holds depends on how long its longest sequence is. In training that changes from batch to
    batch, and in evaluation mode, one sample at a time, there is none: the statistics fit neither.

    ## Example

    ```python
    bn(x.transpose(1, 2))                 # bad: x is (N, T, C), padded with zeros
    y = bn(x[mask]); x = x.masked_scatter(mask[..., None], y)  # good: only what counts
    ```

    ## Fix

    `recalibrate` with the mask heals a trained model. In training, normalise only the positions that count.
    """

    code = "BN305"
    name = "padding-in-stats"
    needs = ("norms", "data")

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding with all layers concerned."""
        data = evidence.data
        assert data is not None
        masked = [s for s in data.sites if s.masked is not None]
        if not masked:
            yield Skipped(self.code, "nobody says which positions are padding", "mask=")
            return
        limit, norms = self.option(evidence, "shift", 0.1), by_path(evidence)
        found = [(self._shift(s), s) for s in masked]
        off = [(shift, s) for shift, s in found if shift > limit and self._holds_padding(norms.get(s.path), s)]
        if not off:
            return
        off.sort(key=lambda item: -item[0])
        names = tuple(dict.fromkeys(s.path or "(root)" for _, s in off))
        yield self.found(
            "error" if data.drift is not None and exceeds(data.drift, *SEVERE) else "warning",
            f"padding is in the statistics of {listed(names)}: without it, they are {off[0][0]:.2g} σ elsewhere",
            names,
            fix=Fix(
                "recalibrate",
                "recalibrate with the mask; in training, normalise what counts alone",
                safety=Safety.NEEDS_DATA,
            ),
            shift={s.name: shift for shift, s in off},
            limit=limit,
        )

    def _shift(self, site: SiteData) -> float:
        """The larger of |μ − μ'|/σ' and ½|ln v/v'|, as channel medians over the channels that have a variance."""
        import numpy

        assert site.masked is not None
        mean, var = site.masked
        live = (var > 1e-12) & (site.var > 1e-12)
        if not bool(live.any()):
            return 0.0
        far = abs(site.mean - mean)[live] / numpy.sqrt(var[live])
        return max(median_of(far), median_of(abs(numpy.log(site.var[live] / var[live])) / 2))

    def _holds_padding(self, norm: NormState | None, site: SiteData) -> bool:
        """Whether what is stored is nearer to the moments with padding than to those without."""
        import numpy

        assert site.masked is not None
        if norm is None or norm.mean is None or norm.var is None or len(norm.mean) != len(site.mean):
            return True
        mean, var = site.masked
        live = (var > 1e-12) & (site.var > 1e-12)
        stored = norm.mean[live], numpy.maximum(norm.var[live], 1e-30)

        def off(m: numpy.ndarray, v: numpy.ndarray) -> float:
            means, spreads = (stored[0] - m[live]) ** 2 / v[live], numpy.log(stored[1] / v[live]) ** 2 / 4
            return median_of(means + spreads)

        return off(site.mean, site.var) < off(mean, var)

    def bad(self) -> Case:
        """Sequences padded with zeros, which the statistics know of."""
        return self._case(True)

    def good(self) -> Case:
        """The statistics are those of what counts."""
        return self._case(False)

    def _case(self, padded: bool) -> Case:
        import torch
        from torch import nn

        from bnfix.rules.data_cases import batches, norms_of, store, trained

        model = trained(nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 5, 1)))
        rng = torch.Generator().manual_seed(0)
        x = 2 + torch.randn(384, 4, 12, generator=rng)
        counts = torch.arange(12) < torch.randint(3, 12, (384, 1), generator=rng)
        x = x * counts.unsqueeze(1)
        seen = x.transpose(0, 1).flatten(1) if padded else x.transpose(0, 1)[:, counts]
        store(norms_of(model)[0], seen.mean(1), seen.var(1))
        data = [{"input": a, "mask": b} for a, b in zip(batches(x), batches(counts), strict=True)]
        return Case(model, data=data, options={"mask": "mask"})
