from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnfix.rules.reading import is_initial, is_learned, readable, recalibration, sites, some, unreadable
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, NormState, Skipped

if TYPE_CHECKING:
    from torch import Tensor, nn

_MOMENTUM = 0.1
"""torch's default; a state_dict does not hold it."""
_ROUNDING = 0.99


class InitialValuesLeft(Rule):
    """Too few steps for the momentum: a part of the statistics is still mean 0 and variance 1.

    ## What it does

    After n updates with momentum α the running statistics hold a share of (1 − α)ⁿ of their first values. It warns
    above .05, and calls it an error above .3. The first variance is 1, so no channel can lie below that share: where
    one does, in any norm that counted as many batches, the statistics came from elsewhere (a pretrained model that is
    fine-tuned, `update_bn`, `recalibrate`) and nothing is said. With data, it says nothing either where the statistics
    fit the data better without such a share. A counter of 0 is never judged, nor a model whose norms have learned
    nothing yet.

    ## Why is this bad

    Means are too small and variances are drawn towards 1, in each layer, while training normalises with the batch and
    does not notice. α = .001 needs 3,000 steps to get below 5 %; a short run ends with a model that is good in training
    mode and bad in evaluation (47 % instead of 96 % in one measurement).

    ## Example

    ```python
    nn.BatchNorm2d(64, momentum=0.001)   # bad for a run of 1,000 steps
    nn.BatchNorm2d(64, momentum=0.1)
    ```

    ## Fix

    `recalibrate` with training data. For the next run: a larger momentum, or more steps.
    """

    code = "BN203"
    name = "initial-values-left"

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for each momentum and number of steps."""
        yield from unreadable(self.code, evidence)
        limit, worst = self.option(evidence, "warning", 0.05), self.option(evidence, "error", 0.3)
        trained = any(is_learned(n) for n in readable(evidence))
        groups: dict[tuple[float, int], list[NormState]] = {}
        for norm in readable(evidence):
            rate = norm.momentum if norm.module else _MOMENTUM
            if norm.tracked and rate is not None and 0 < rate < 1 and not norm.frozen_class and not norm.instance:
                groups.setdefault((rate, norm.tracked), []).append(norm)
        for (rate, steps), norms in sorted(groups.items(), key=lambda g: g[0][1]):
            share = (1 - rate) ** steps
            if share <= limit or any(_below(n, share) for n in norms):
                continue
            left = [
                n for n in norms
                if (is_learned(n) or (n.weight is None and trained))
                and not is_initial(n) and not _fits_data(n, share, evidence)
            ]  # fmt: skip
            if not left:
                continue
            known = (
                f"momentum {rate:g}"
                if left[0].module
                else f"momentum {rate:g} (torch's default; the file does not say)"
            )
            yield self.found(
                "error" if share > worst else "warning",
                f"{some(sites(left))}: {share:.0%} of the statistics is still their initial value, after {steps} steps "
                f"with {known}",
                sites(left),
                fix=recalibration(left),
                share=share,
                limit=limit,
                steps=steps,
                momentum=rate,
            )

    def bad(self) -> Case:
        """Five steps."""
        return Case(_after(5), _images(1)[0])

    def good(self) -> Case:
        """A hundred."""
        return Case(_after(100), _images(1)[0])


def _below(norm: NormState, share: float) -> bool:
    """Whether a variance is smaller than ``share`` of 1 and anything else can be."""
    assert norm.var is not None
    return bool(norm.var.min() < share * _ROUNDING)


def _fits_data(norm: NormState, share: float, evidence: Evidence) -> bool:
    """Whether the stored variances are nearer to those of the data than to these mixed with 1."""
    import numpy as np

    seen = [s for s in (evidence.data.sites if evidence.data else ()) if s.path in norm.paths and s.var is not None]
    if len(seen) != 1 or norm.var is None:
        return False
    measured = np.maximum(seen[0].var, 1e-12)
    stored = np.log(np.maximum(norm.var, 1e-12))
    plain = np.median(np.abs(stored - np.log(measured)))
    mixed = np.median(np.abs(stored - np.log(share + (1 - share) * measured)))
    return bool(plain < mixed)


def _images(number: int) -> list[Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 6, 6, generator=generator) * 3 for _ in range(number)]


def _after(steps: int) -> nn.Module:
    import torch
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for batch in _images(steps):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return model
