from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Facts, Finding, Fix, NormFact, Safety


class RedundantBias(Rule):
    """A bias in front of a batch norm.

    ## What it does

    Finds convolutions and linear layers with a bias whose output goes into a batch norm and nowhere else.

    ## Why is this bad

    It costs a little memory and time and does nothing: in training the norm subtracts the batch mean, bias included, so
    the bias gets no gradient but that of weight decay. Many published models have it, which is why this rule is off.

    ## Example

    ```python
    nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))               # a bias that cancels
    nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64))
    ```

    ## Fix

    For inference, `fold` takes norm and bias into the layer, exactly. For training, write `bias=False`; statistics of a
    model that is trained already have to be shifted by the bias, or recalibrated.
    """

    code = "BN108"
    name = "redundant-bias"
    needs = ("facts",)
    optional = True

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all."""
        facts = evidence.facts
        assert facts is not None
        norms = [n for n in facts.norms if n.calls and all(_biased(facts, n, call) for call in n.calls)]
        if norms:
            paths = sites(norms)
            yield self.found(
                "info",
                f"{some(paths)}: behind a layer with a bias, which has no effect there",
                paths,
                fix=Fix("fold", "fold the norm into the layer for inference", paths, safety=Safety.EXACT),
            )

    def bad(self) -> Case:
        """With a bias."""
        from torch import nn, randn

        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        return Case(model.eval(), randn(4, 3, 6, 6))

    def good(self) -> Case:
        """Without."""
        from torch import nn, randn

        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        return Case(model, randn(4, 3, 6, 6))


def _biased(facts: Facts, norm: NormFact, call: tuple[int, int]) -> bool:
    route = facts.routes[call[0]]
    source = route.ops[call[1]].reads.get("input")
    layer = route.ops[source] if source is not None else None
    if layer is None or layer.kind not in ("conv", "conv_transpose", "linear") or "running_mean" not in norm.tensors:
        return False
    return "bias" in layer.tensors and len(route.users(layer.index)) == 1
