from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import count, is_initial, is_learned, readable, recalibration, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, NormState


class AveragedWithoutStats(Rule):
    """Averaged weights beside statistics that nobody averaged.

    ## What it does

    Compares two states of one model (`--against`), such as the model and its exponential average. It warns where the
    weights of one have moved while its statistics are exactly the initial ones, and the other's are not.

    ## Why is this bad

    EMA and SWA average parameters. Running statistics are buffers, and stay behind unless somebody copies or averages
    them: the averaged model then normalises with mean 0 and variance 1. In training mode it looks fine, in evaluation,
    for which it is made, it is useless.

    ## Example

    ```python
    for e, p in zip(ema.parameters(), model.parameters()): e.lerp_(p, 1e-3)   # bad: parameters alone
    AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.999), use_buffers=True)
    ```

    ## Fix

    `recalibrate` the averaged model with training data: its own statistics, better than an average of those of other
    weights. Copying the buffers of the trained model is second best.
    """

    code = "BN207"
    name = "averaged-without-stats"
    needs = ("norms", "against")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for the side that was left behind."""
        mine = {n.path: n for n in readable(evidence) if not n.frozen_class}
        theirs = {n.path: n for n in evidence.against or () if n.mean is not None and n.var is not None}
        pairs = [(n, theirs[p]) for p, n in mine.items() if p in theirs]
        for here in (True, False):
            sides = pairs if here else [(b, a) for a, b in pairs]
            behind = [a for a, b in sides if is_initial(a) and not is_initial(b)]
            learned = any(is_learned(a) for a, _ in sides)
            left = [n for n in behind if is_learned(n) or (n.weight is None and learned)]
            if left and evidence.weights_moved is not False:
                yield self._found(left, len(pairs), here)

    def _found(self, left: list[NormState], of: int, here: bool) -> Finding:
        paths = sites(left)
        whose, other = ("this model", "the reference") if here else ("the reference", "this model")
        fix = recalibration(left) if here else Fix(
            "code", "recalibrate the reference: it is the one without statistics", paths)  # fmt: skip
        return self.found(
            "warning",
            f"{some(paths)}: {whose} has initial statistics beside trained weights, in {len(left)} of "
            f"{count(of, 'norm')}; those of {other} were gathered: averaged without its buffers?",
            paths,
            fix=fix,
            norms=len(left),
        )

    def bad(self) -> Case:
        """An average of the parameters alone."""
        model, average = _averaged(buffers=False)
        return Case(average, _images(), against=model)

    def good(self) -> Case:
        """Buffers too."""
        model, average = _averaged(buffers=True)
        return Case(average, _images(), against=model)


def _images() -> object:
    import torch

    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def _averaged(*, buffers: bool) -> tuple[object, object]:
    import copy

    import torch
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        out = model(_images())
        (out.mean((0, 2, 3)) - torch.arange(4.0)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 0.1)
            if buffers:
                for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
                    kept.copy_(buffer)
    return model, average
