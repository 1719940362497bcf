from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.codes._examples import conv_norm, images, statistics
from bnfix.rules.reading import readable, sites, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Skipped

_EPS = 1e-5
"""torch's default; a state_dict does not hold it."""


class FoldRange(Rule):
    """Folded weights that would differ by a factor of a hundred between channels.

    ## What it does

    Computes how large the weights of each output channel are once the norm behind is folded in, ‖w‖·|γ|/√(v + eps), and
    warns where the largest is more than 100 times the median. In a file of weights alone, w is taken to be the weight
    that stands in front of the norm, and eps to be .00001.

    ## Why is this bad

    In float32 it is not. Quantised with one scale for the whole tensor, as many runtimes do, the large channel takes
    the range and the others are left with a few of 256 levels: accuracy collapses, as MobileNets are known for. Often
    a channel with a variance near 0 is behind it, which is scaled up by up to 1/√eps = 316.

    ## Example

    ```python
    bn.running_var[7] = 1e-12        # one dead channel: 300 times the weight of its neighbours
    ```

    ## Fix

    Quantise weights per channel, or equalise the channels across layers before folding. A dead channel can be pruned
    (BN205).
    """

    code = "BN209"
    name = "fold-range"
    optional = True

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for all."""
        import numpy as np

        limit = self.option(evidence, "ratio", 100)
        wide = []
        unknown = []
        for norm in readable(evidence):
            if norm.feeder is None or norm.var is None or len(norm.feeder) != norm.channels:
                unknown.append(norm)
                continue
            scale = 1.0 if norm.weight is None else np.abs(norm.weight)
            size = norm.feeder * scale / np.sqrt(np.maximum(norm.var, 0) + (_EPS if norm.eps is None else norm.eps))
            middle = float(np.median(size))
            if middle > 0 and np.isfinite(size).all() and float(size.max()) > limit * middle:
                wide.append((float(size.max()) / middle, norm))
        if unknown:
            graph = evidence.facts is None and any(n.module for n in unknown)
            reason = "no layer is known to feed it alone"
            whole = len(unknown) == len(readable(evidence))
            yield Skipped(
                self.code, reason, "example= (on the command line: --input)" if graph else "",
                () if whole else sites(unknown),
            )  # fmt: skip
        if wide:
            wide.sort(key=lambda w: -w[0])
            paths = sites(n for _, n in wide)
            yield self.found(
                "warning",
                f"{some(paths)}: folded, its largest channel has {wide[0][0]:.0f} times the weight of its "
                f"median one (limit {limit:g})",
                paths,
                ratio=wide[0][0],
                limit=limit,
            )

    def bad(self) -> Case:
        """A dead channel."""
        model, norm = conv_norm()
        mean, var = statistics(norm)
        mean.fill_(0.1)
        var[3] = 0.0
        return Case(model, images())

    def good(self) -> Case:
        """All alike."""
        model, norm = conv_norm()
        statistics(norm)[0].fill_(0.1)
        return Case(model, images())
