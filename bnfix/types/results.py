"""What the verbs that change or compare models return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bnfix.types.values import NOT_IN_JSON, Value

if TYPE_CHECKING:
    import torch

Verdict = Literal["passed", "warned", "failed", "inconclusive"]


@dataclass(frozen=True)
class Edit(Value):
    """One change of a model: ``site`` was ``before`` and is now ``after``.

    ``calls`` are the call sites concerned, ``into`` the modules that took it up, ``gains`` the
    ``state_dict`` keys that are new, ``ulp`` the largest distance of a stored number from its exact value in
    units in the last place (½ is correct rounding), ``noise_ratio`` the error at the site in
    multiples of the model's own rounding noise there (None: not measured). ``loses`` are the ``state_dict`` keys that
    are gone; ``r2``, of a swap, is the share of the old norm's output variance that an affine of the new one explains:
    the forecast of harm (None: not measured).
    """

    action: str
    site: str
    before: str
    after: str
    calls: tuple[str, ...] = ()
    into: tuple[str, ...] = ()
    gains: tuple[str, ...] = ()
    ulp: float | None = None
    noise_ratio: float | None = None
    loses: tuple[str, ...] = ()
    r2: float | None = None


@dataclass(frozen=True)
class Refusal(Value):
    """Something that was left as it is, and why. ``defect`` marks a plan of bnfix that its own proof threw out.

    ``site`` is a module path, ``calls`` its call sites, ``before`` what it is, such as ``BatchNorm2d(64, eps=1e-05)``.
    """

    site: str
    reason: str
    calls: tuple[str, ...] = ()
    defect: bool = False
    before: str = ""


@dataclass(frozen=True)
class OutputParity(Value):
    """One output of two models compared, over all inputs given; the worst of each figure.

    Errors are against the float64 oracle. ``noise`` is the reference's own error (RMS, relative to
    the output's RMS), ``noise_ratio`` the candidate's error in multiples of it (the rule: more than
    ``k`` fails), ``required_tolerance`` the smallest ``rtol`` with ``atol = rtol·max|oracle|`` that
    an allclose-style comparison would have needed. None: not measurable, ``reason`` says why.
    """

    name: str
    max_abs_err: float | None
    max_rel_err: float | None
    noise_ratio: float | None
    required_tolerance: float | None
    passed: bool
    verdict: Verdict = "passed"
    reason: str = ""
    rms_err: float | None = None
    noise: float | None = None
    cosine: float | None = None
    top1_agreement: float | None = None
    worst_sample: str = ""
    nearer: str = ""


@dataclass(frozen=True)
class Parity(Value):
    """Whether two models compute the same function on the inputs tried, judged by the reference's own noise."""

    outputs: tuple[OutputParity, ...]
    passed: bool
    verdict: Verdict
    first_divergence: str | None = None
    k: float = 8.0
    signatures: tuple[str, ...] = ()
    candidate: str = ""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result(Value):
    """What a repair did: the new model, what was changed, what was left and why, and the proof.

    ``model`` is None after a dry run, and an exported program where one was given. ``signatures`` are the inputs the
    facts and the proof hold for.
    ``recipe`` is what a saved state_dict carries so that it can be loaded again. ``verb`` is the function of bnfix that
    was called.
    """

    model: torch.nn.Module | None = field(metadata=NOT_IN_JSON, repr=False)
    edits: tuple[Edit, ...]
    refusals: tuple[Refusal, ...]
    parity: Parity | None = None
    source: str = "exported"
    signatures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    verb: str = "fold"

    @property
    def norms(self) -> int:
        """How many norms the model had."""
        return self.done + len(self.refusals)

    @property
    def done(self) -> int:
        """How many norms are no norms any more; layers whose computed weight was baked for that do not count."""
        return sum(e.action != "bake" for e in self.edits)


@dataclass(frozen=True)
class Export(Value):
    """A written ONNX file: where, which opset, what is left in it, and its parity."""

    path: str
    opset: int
    norms_left: tuple[Refusal, ...]
    parity: Parity | None
    folded: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
