"""What every rule is: a code, a page, an example that is bad and one that is good, and a judgement of the evidence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bnfix.types import Evidence, Finding, Fix, Severity, Skipped

if TYPE_CHECKING:
    from torch import nn

NEEDS = {
    "norms": "a model or its weights",
    "facts": "example= (on the command line: --input)",
    "data": "data= (on the command line: --data)",
    "loop": "a training loop: bnfix.watch(model, optimizer)",
    "onnx": "an ONNX file",
    "against": "against= (on the command line: --against)",
}
"""The parts of the evidence, and how a user brings each."""


@dataclass
class Case:
    """An example of a rule, as a user would hand it to bnfix: what ``check`` takes, or a loop for ``watch``.

    ``loop`` gets ``bnfix.watch``, runs a little training inside and returns the report. ``model`` may be a path.
    """

    model: nn.Module | Any = None
    example: Any = None
    data: Iterable[Any] | None = None
    role: str = "train"
    against: Any = None
    loop: Callable[[Any], Any] | None = None
    options: dict[str, Any] | None = None
    """More keyword arguments of ``check``."""


class Rule(ABC):
    """One kind of fault.

    The docstring of a rule is its page, in Markdown: a first line, then the headings *What it does*, *Why is this bad*,
    *Example* (bad and good code) and *Fix* (what it is and what it costs). ``needs`` names the parts of the evidence
    without which nothing can be said; where one is absent the rule is skipped, and the report says so. Each part in
    ``also`` is enough without them. A rule that is ``optional`` runs only where it is selected. ``behind`` are the
    codes that say why: where one of them is found as well, and no less severe, this rule's findings come behind it.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("norms",)
    also: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False
    behind: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """What is wrong, or what could not be looked at. Reads the evidence and nothing else."""

    @abstractmethod
    def bad(self) -> Case:
        """A model (or loop) with this fault; imports torch inside."""

    @abstractmethod
    def good(self) -> Case:
        """The same without it."""

    def found(
        self,
        severity: Severity,
        message: str,
        sites: Iterable[str] = (),
        *,
        fix: Fix | None = None,
        **measured: Any,
    ) -> Finding:
        """A finding of this rule."""
        return Finding(self.code, self.name, severity, message, tuple(sites), fix, measured)

    def option(self, evidence: Evidence, name: str, default: float) -> float:
        """A threshold: the user's own where there is one."""
        return float(evidence.options.get(self.code, {}).get(name, default))
