from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.reading import listed
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, NormState, Skipped


class DeadChannels(Rule):
    """Channels that are constant.

    ## What it does

    Looks for norms of which more than 10 % of the channels have a stored variance below a tenth of `eps`, and confirms
    with data that what comes in there has none either.

    ## Why is this bad

    It is a waste, and no fault: such a channel gives the same number for every input, which the next layer could hold
    as a bias. Trained networks have some. Many at once tell of a learning rate that was too high, or of a layer that is
    wider than its task. A stored variance alone proves nothing: see BN204 where the data says otherwise.

    ## Example

    ```python
    conv.weight[:32].zero_()  # what pruning by masks leaves: the layer computes 32 constants
    ```

    ## Fix

    Structured pruning takes the channels out, norm, convolution and the inputs of the next layer together. bnfix does
    not prune.
    """

    code = "BN205"
    name = "dead-channels"
    needs = ("norms",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding a norm; without data the question is put, and not answered."""
        share, part = self.option(evidence, "share", 0.1), self.option(evidence, "eps_part", 0.1)
        data = evidence.data
        for norm in evidence.norms or ():
            limit = part * (norm.eps if norm.eps is not None else 1e-5)
            dead = None if norm.var is None else norm.var < limit
            if dead is None or int(dead.sum()) < 2 or dead.mean() <= share:
                continue
            site = norm.path or "(root)"
            if data is None:
                reason = (
                    f"{int(dead.sum())} of {norm.channels} channels have a stored variance near 0: is it so in data?"
                )
                yield Skipped(self.code, reason, "data= (on the command line: --data)", (site,))
                continue
            for seen in data.sites:
                if seen.path == norm.path and len(seen.var) == len(dead):
                    dead = dead & (seen.var < limit)
            met = any(seen.path == norm.path for seen in data.sites)
            if met and dead.sum() >= 2 and dead.mean() > share:
                yield self._said(norm, site, [int(i) for i in dead.nonzero()[0]], limit)

    def _said(self, norm: NormState, site: str, channels: list[int], limit: float) -> Finding:
        return self.found(
            "info",
            f"{site}: {len(channels)} of {norm.channels} channels are constant ({listed(list(map(str, channels)), 5)})",
            (site,),
            fix=Fix("code", "prune them: the next layer can hold their value as a bias", (site,)),
            channels=channels,
            limit=limit,
        )

    def bad(self) -> Case:
        """Four of eight filters are zero."""
        return self._case(4)

    def good(self) -> Case:
        """None is."""
        return self._case(0)

    def _case(self, dead: int) -> Case:
        from bnfix.rules.data_cases import batches, conv_net, fit, images

        model, data = conv_net(8), batches(images())
        next(model.parameters()).data[:dead] = 0
        return Case(fit(model, data), data=data)
