from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import ELEMENTWISE, SHAPING, base, is_initial, is_learned, readable, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Facts, Finding, NormState, Op, Route


class ZeroGamma(Rule):
    """A trained norm whose scale is 0 in all channels.

    ## What it does

    Finds norms whose weights are all exactly 0 although the layer was trained, and which are not the end of a residual
    branch: there 0 is a usual first value. Without an example it can't see residual branches, and names only norms
    whose shift was learned.

    ## Why is this bad

    The layer gives its shift and nothing else: everything in front of it is switched off. After pruning by sparse
    scales that may be the aim. Else a weight was initialised with 0 where no branch goes around, and its gradient could
    not bring it back, or it was frozen.

    ## Example

    ```python
    nn.init.zeros_(block.bn3.weight)   # fine: the branch opens slowly
    nn.init.zeros_(stem.bn.weight)     # bad: nothing comes through
    ```

    ## Fix

    None by itself. If it is pruned, take the layers in front out; else initialise with 1 and train again.
    """

    code = "BN206"
    name = "zero-gamma"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all."""
        dead = [n for n in readable(evidence) if n.weight is not None and not n.weight.any() and _trained(n, evidence)]
        if dead:
            yield self.found(
                "info",
                f"{some(sites(dead))}: trained, with scale 0 in all channels; nothing in front of it comes through",
                sites(dead),
            )

    def bad(self) -> Case:
        """No branch around it."""
        from torch import nn, randn

        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        _train(model[1])
        return Case(model, randn(4, 3, 6, 6))

    def good(self) -> Case:
        """The end of a residual branch."""
        from torch import Tensor, nn, randn

        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
                _train(self.norm)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = x + self.norm(self.conv(x))
                return y

        return Case(Residual(), randn(4, 3, 6, 6))


def _trained(norm: NormState, evidence: Evidence) -> bool:
    learned = norm.bias is not None and norm.bias.min() != norm.bias.max()
    if evidence.facts is None:
        return learned
    fact = next((n for n in evidence.facts.norms if set(n.paths) & set(norm.paths)), None)
    if fact is None or not fact.calls or _ends_a_residual(evidence.facts, fact.calls):
        return False
    return learned or is_learned(norm) or not is_initial(norm)


def _ends_a_residual(facts: Facts, calls: tuple[tuple[int, int], ...]) -> bool:
    return any(_is_added(facts.routes[r], facts.routes[r].ops[i]) for r, i in calls)


def _is_added(route: Route, op: Op) -> bool:
    """Whether what comes out of ``op`` is added to something else, behind scalings and reshapings at most."""
    pending, seen = [op], set()
    while pending:
        for user in route.users(pending.pop().index):
            others = {i for i in user.inputs if route.ops[i].kind != "constant"}
            if user.kind == "other" and base(user) == "add" and len(others) > 1:
                return True
            if user.kind == "other" and base(user) in ELEMENTWISE | SHAPING and user.index not in seen:
                seen.add(user.index)
                pending.append(user)
    return False


def _train(norm: object) -> None:
    import torch
    from torch import nn

    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.normal_()
    assert norm.running_mean is not None
    norm.running_mean.normal_()
