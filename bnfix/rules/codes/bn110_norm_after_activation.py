from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import ACTIVATIONS, POOLING, SHAPING, base, before, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Facts, Finding, NormFact


class NormAfterActivation(Rule):
    """A batch norm behind an activation.

    ## What it does

    Finds norms whose input comes from an activation, through nothing but pooling and reshaping.

    ## Why is this bad

    It is a choice, not a fault: pre-activation and many mobile nets are built so, which is why this rule is off. It
    matters for deployment: such a norm can't be folded into the layer in front of it (a ReLU lies between), only into
    the one behind, and where that one pads with zeros not even there.

    ## Example

    ```python
    nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(64))   # found
    nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU())
    ```

    ## Fix

    None for a trained model: `bnfix fold` says which norms it can take out all the same. In a new model, change the
    order.
    """

    code = "BN110"
    name = "norm-after-activation"
    needs = ("facts",)
    optional = True

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all."""
        facts = evidence.facts
        assert facts is not None
        norms = [n for n in facts.norms if any(_activated(facts, n, call) for call in n.calls)]
        if norms:
            paths = sites(norms)
            yield self.found("info", f"{some(paths)}: behind an activation", paths)

    def bad(self) -> Case:
        """The activation first."""
        from torch import nn, randn

        return Case(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.BatchNorm2d(4)), randn(4, 3, 6, 6))

    def good(self) -> Case:
        """The norm first."""
        from torch import nn, randn

        return Case(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU()), randn(4, 3, 6, 6))


def _activated(facts: Facts, norm: NormFact, call: tuple[int, int]) -> bool:
    route = facts.routes[call[0]]
    op = before(route, route.ops[call[1]], POOLING | SHAPING)
    return op is not None and op.kind == "other" and base(op) in ACTIVATIONS
