from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import needs_module, site, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Safety, Skipped


class NoRunningStats(Rule):
    """A batch norm without running statistics.

    ## What it does

    Finds batch norms that were made with `track_running_stats=False`, and, with an example, calls of `F.batch_norm`
    that stay in training mode when the model is evaluated. Instance norms are left out: they need none.

    ## Why is this bad

    Each output then depends on the other samples of its batch, in evaluation mode too. The same image gets another
    score in another batch, a batch of one is normalised with itself, and a sorted test set leaks its labels into the
    results. "Remove `eval()`" and "switch tracking off" are popular remedies for a gap between training and evaluation;
    they hide it. Where it is meant (MAML, some generators), ignore this rule for those layers.

    ## Example

    ```python
    nn.BatchNorm2d(64, track_running_stats=False)   # bad
    nn.BatchNorm2d(64)
    F.batch_norm(x, mean, var, training=True)       # bad
    F.batch_norm(x, mean, var, training=self.training)
    ```

    ## Fix

    Register statistics and estimate them from training data: `bnfix check --fix --data ...` does both. Outputs change
    to those of the statistics of all the data; weights stay. For a functional call the change is in your own code.
    """

    code = "BN104"
    name = "no-running-stats"

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for modules, one for functional calls."""
        yield from needs_module(self.code, evidence, "norms that have no statistics")
        norms = [n for n in evidence.norms or () if n.module and not (n.has_stats or n.instance or n.tracks)]
        if norms:
            paths = sites(norms)
            yield self.found(
                "warning",
                f"{some(paths)}: no running statistics, so each output depends on the other samples of its batch",
                paths,
                fix=Fix("reset", "register running statistics, then recalibrate", paths, safety=Safety.NEEDS_DATA),
            )
        if evidence.facts is None or evidence.program:
            return
        known = {p for n in evidence.norms or () if not n.has_stats for p in n.paths}
        called = [
            n for n in evidence.facts.norms if n.path not in known
            and any(_on_batch(evidence.facts.routes[r].ops[i].target, evidence.facts.routes[r].ops[i].attrs)
                    for r, i in n.calls)
        ]  # fmt: skip
        if called:
            paths = tuple(site(n.path) for n in called)
            yield self.found(
                "warning",
                f"{some(paths)}: batch_norm runs in training mode although the model is evaluated, so each "
                "output depends on the other samples of its batch",
                paths,
                fix=Fix("code", "F.batch_norm(..., training=self.training), then recalibrate", paths),
            )

    def bad(self) -> Case:
        """Tracking switched off."""
        from torch import nn, randn

        layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
        return Case(nn.Sequential(*layers), randn(4, 3, 6, 6))

    def good(self) -> Case:
        """Tracking, and an instance norm that needs none."""
        from torch import nn, randn

        return Case(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4)), randn(4, 3, 6, 6))


def _on_batch(target: str, attrs: object) -> bool:
    return isinstance(attrs, dict) and attrs.get("training") is True and "instance_norm" not in target
