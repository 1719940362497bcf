from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnfix.rules.codes._examples import conv_norm, images, statistics
from bnfix.rules.reading import count, is_initial, is_learned, readable, recalibration, sites, some, unreadable
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, NormState, Skipped

if TYPE_CHECKING:
    from torch import nn


class NeverTrainedStats(Rule):
    """Running statistics as they were at the beginning, in a layer that was trained.

    ## What it does

    Finds norms whose mean is exactly 0 and whose variance is exactly 1 in all channels. It is an error where scale and
    shift were learned, or batches were counted; else information: the layer is new, or nothing ever reached it. The
    counter alone says nothing: good checkpoints have 0 there.

    ## Why is this bad

    Scale and shift were learned for inputs of mean 0 and deviation 1, which statistics of the data would make of them.
    With the initial ones the norm passes its input on unnormalised. It happens where a checkpoint was written without
    buffers, an average was made of the parameters alone, statistics were reset and not gathered again, or the whole
    training ran in `eval()`.

    ## Example

    ```python
    torch.save(dict(model.named_parameters()), path)   # bad: statistics are buffers
    torch.save(model.state_dict(), path)
    ```

    ## Fix

    `recalibrate` with training data; some hundred samples are enough to be near. If the checkpoint that it came from
    still has the statistics, load them from there.
    """

    code = "BN202"
    name = "never-trained-stats"

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for layers that were trained, one for those that were not."""
        yield from unreadable(self.code, evidence)
        known = [
            n for n in readable(evidence) if not n.frozen_class
        ]  # of those, mean 0 and variance 1 is a folded form
        initial = [n for n in known if is_initial(n)]
        trained = [n for n in initial if is_learned(n) or (n.tracked or 0) > 0]
        if trained:
            why = "scale and shift were learned" if all(is_learned(n) for n in trained) else _counted(trained)
            yield self.found(
                "error",
                f"{some(sites(trained))}: mean 0 and variance 1 in all channels, though {why}",
                sites(trained),
                fix=recalibration(trained),
                norms=len(trained),
                of=len(known),
            )
        fresh = [n for n in initial if n not in trained]
        if fresh:
            said = "a new model" if len(fresh) == len(known) else "new layers, or nothing ever reached them in training"
            yield self.found(
                "info",
                f"{some(sites(fresh))}: initial statistics; {said}",
                sites(fresh),
                norms=len(fresh),
                of=len(known),
            )

    def bad(self) -> Case:
        """Learned weights, initial statistics."""
        return Case(_learned()[0], images())

    def good(self) -> Case:
        """A counter of 0 with good statistics."""
        model, norm = _learned()
        mean, var = statistics(norm)
        mean.normal_()
        var.uniform_(0.5, 2)
        return Case(model, images())


def _learned() -> tuple[nn.Sequential, nn.BatchNorm2d]:
    from torch import nn

    model, norm = conv_norm()
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.3)
    return model, norm


def _counted(norms: list[NormState]) -> str:
    return f"it ran in training ({count(max(n.tracked or 0 for n in norms), 'batch', 'batches')})"
