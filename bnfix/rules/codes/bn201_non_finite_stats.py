from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.codes._examples import conv_norm, images, statistics
from bnfix.rules.reading import listed, readable, recalibration, site, sites, some, unreadable
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, NormState, Skipped


class NonFiniteStats(Rule):
    """Running statistics with NaN, infinity or a negative variance.

    ## What it does

    Looks at every stored mean and variance.

    ## Why is this bad

    The channel is NaN in evaluation, and with it everything behind. One bad batch is enough (a NaN in an image, an
    overflow in float16), and no number of good ones heals it: running = .9·running + .1·batch keeps a NaN for ever.
    Training goes on as if nothing had happened, since it does not read them.

    ## Example

    ```python
    model.train(); model(torch.full((8, 3, 32, 32), float("nan")))   # bad: once, and evaluation is lost
    assert torch.isfinite(images).all()                              # before the step
    ```

    ## Fix

    `recalibrate` with clean training data: mean and variance are measured anew, weights stay. Find the batch that did
    it first, or it will happen again.
    """

    code = "BN201"
    name = "non-finite-stats"

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for all."""
        import numpy as np

        yield from unreadable(self.code, evidence)
        broken = []
        for norm in readable(evidence):
            assert norm.mean is not None
            assert norm.var is not None
            bad = ~np.isfinite(norm.mean) | ~np.isfinite(norm.var)
            negative = norm.var < 0
            if bad.any() or negative.any():
                broken.append((norm, int(bad.sum()), int((negative & ~bad).sum())))
        if broken:
            broken.sort(key=lambda b: -b[1] - b[2])
            norms = [b[0] for b in broken]
            what = [_what(*b) for b in broken]
            yield self.found(
                "error",
                f"{some(sites(norms))}: statistics that are no numbers to divide by ({listed(what)})",
                sites(norms),
                fix=recalibration(norms, "measure them anew on clean data"),
                channels=sum(b + m for _, b, m in broken),
            )

    def bad(self) -> Case:
        """One NaN."""
        model, norm = conv_norm()
        statistics(norm)[0][2] = float("nan")
        return Case(model, images())

    def good(self) -> Case:
        """Odd numbers, but numbers: a dead channel and a far one."""
        model, norm = conv_norm()
        mean, var = statistics(norm)
        mean[2], var[2] = 1e6, 0.0
        return Case(model, images())


def _what(norm: NormState, bad: int, negative: int) -> str:
    parts = [f"{bad} of {norm.channels} not finite"] * bool(bad) + [f"{negative} negative"] * bool(negative)
    return f"{' and '.join(parts)} in {site(norm.path)}"
