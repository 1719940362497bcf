from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import needs_module, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, NormState, Safety, Skipped

TORCH = 0.1
"""What torch's norms have by default."""


class Momentum(Rule):
    """A momentum with which running statistics jump, or stand still.

    ## What it does

    Looks at the momentum α of each norm that keeps statistics: running = (1 − α)·running + α·batch. It warns of α = 0
    in training mode and of α ≥ .9, and mentions None (an average over all batches since the first).

    ## Why is this bad

    TensorFlow, Keras and papers give the weight of the old value: their .99 is torch's .01. Taken over as it is, the
    statistics are those of the last batch, with all its noise: evaluation changes from one step to the next. With 0
    they never leave their first values. With None those of early training count as much as those of the end.

    ## Example

    ```python
    nn.BatchNorm2d(64, momentum=0.99)   # bad: TensorFlow's convention
    nn.BatchNorm2d(64, momentum=0.01)
    ```

    ## Fix

    Set it to 1 − α (or to .1 where that says nothing), which changes no output now. Statistics that were gathered with
    the wrong one stay as they are: recalibrate with training data.
    """

    code = "BN106"
    name = "momentum"

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for each value."""
        yield from needs_module(self.code, evidence, "the momentum")
        high = self.option(evidence, "high", 0.9)
        norms = [n for n in evidence.norms or () if n.module and n.has_stats and n.tracks]
        for value in sorted({n.momentum for n in norms if n.momentum is not None}):
            same = [n for n in norms if n.momentum == value]
            if value >= high:
                after = "the statistics are those of the last batch alone" if value >= 1 else (
                    f"one batch makes up {value:.0%} of the statistics; TensorFlow's {value:g} is {1 - value:.3g} here"
                )  # fmt: skip
                yield self._found("warning", same, f"momentum {value:g}: {after}", _turned(value), high)
            elif value == 0 and any(n.training for n in same):
                said = (
                    "momentum 0 in training mode: the statistics never change, while training uses those of the batch"
                )
                yield self._found("warning", [n for n in same if n.training], said, TORCH, high)
        cumulative = [n for n in norms if n.cumulative]
        if cumulative:
            said = "momentum None: the statistics are an average over all batches, those of early training included"
            yield self._found("info", cumulative, said, TORCH, high)

    def _found(self, severity: str, norms: list[NormState], said: str, to: float, high: float) -> Finding:
        paths = sites(norms)
        return self.found(
            severity,  # type: ignore[arg-type]
            f"{some(paths)}: {said}",
            paths,
            fix=Fix("set", f"momentum={to:g}", paths, {"momentum": to}, Safety.EXACT),
            momentum=norms[0].momentum,
            limit=high,
        )

    def bad(self) -> Case:
        """TensorFlow's convention."""
        from torch import nn, randn

        return Case(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.99), nn.ReLU()), randn(4, 3, 6, 6))

    def good(self) -> Case:
        """The same in torch's; frozen on purpose."""
        from torch import nn, randn

        model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.01), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.0))
        model[2].eval()
        return Case(model, randn(4, 3, 6, 6))


def _turned(value: float) -> float:
    return round(1 - value, 10) if value < 1 else TORCH
