"""Rules that exist in tests only: their findings don't depend on what the real ones do."""

from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Safety


class Fake(Rule):
    """A fake."""

    def bad(self) -> Case:
        return Case()

    def good(self) -> Case:
        return Case()


class Nan(Fake):
    """Numbers that are none."""

    code, name = "BN901", "fake-nan"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        bad = [n.path for n in evidence.norms or () if n.var is not None and (n.var != n.var).any()]
        if bad:
            fix = Fix("recalibrate", "estimate anew", tuple(bad), safety=Safety.NEEDS_DATA)
            yield self.found("error", f"{len(bad)} norms hold NaN", bad, fix=fix)


class Momentum(Fake):
    """A momentum that forgets everything."""

    code, name = "BN902", "fake-momentum"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        limit = self.option(evidence, "most", 0.9)
        for norm in evidence.norms or ():
            if norm.momentum is not None and norm.momentum >= limit:
                fix = Fix("set", "momentum 0.1", (norm.path,), {"momentum": 0.1}, Safety.EXACT)
                yield self.found("warning", f"momentum is {norm.momentum:g}", (norm.path,), fix=fix)


class NeedsData(Fake):
    """Something that only data shows."""

    code, name, needs = "BN903", "fake-data", ("data",)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        yield from ()


class Narrow(Fake):
    """A layer that takes training to mend."""

    code, name = "BN904", "fake-narrow"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        narrow = [n.path for n in evidence.norms or () if n.channels == 1]
        if narrow:
            yield self.found("warning", "one channel", narrow, fix=Fix("swap", "swap it", tuple(narrow)))


class Optional(Fake):
    """A matter of taste."""

    code, name, optional = "BN905", "fake-taste", True

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        yield self.found("info", "taste")


FAKES: tuple[Rule, ...] = (Nan(), Momentum(), NeedsData(), Narrow(), Optional())
