"""Every value that crosses from one room to another: frozen, plain data, free of torch.

Drawing is ``render``'s business and is reached lazily, so that a value can be made, compared and
written as JSON without torch, rich or a browser.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
"""Of everything ``to_dict`` writes. Raised when a field changes its meaning or goes; not when one is added."""

Verdict = Literal["passed", "warned", "failed", "inconclusive"]
NOT_IN_JSON = MappingProxyType({"json": False})


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: tuples as lists, non-finite numbers as the strings JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f for f in dataclasses.fields(value) if f.metadata.get("json", True)]
        return {f.name: plain(getattr(value, f.name)) for f in shown}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return str(value)


class Value:
    """What every result can do: become JSON, show itself in a terminal, show itself in a notebook."""

    def to_dict(self) -> dict[str, Any]:
        """The whole value as JSON-able data, with ``schema_version`` and ``type`` beside its fields."""
        return {"schema_version": SCHEMA_VERSION, "type": type(self).__name__, **plain(self)}

    def __str__(self) -> str:
        return str(importlib.import_module("bnfix.render").to_text(self))

    def _repr_html_(self) -> str:
        return str(importlib.import_module("bnfix.render").to_html(self))

    def __rich__(self) -> Any:
        return importlib.import_module("bnfix.render").to_rich(self)


# ---------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, order=True)
class CallSite:
    """One call of one module in one forward, as a reader would name it: ``b.bn@1`` is the second call of ``b.bn``."""

    path: str
    call: int = 0

    def __str__(self) -> str:
        name = self.path or "(root)"
        return f"{name}@{self.call}" if self.call else name


@dataclass(frozen=True)
class TensorFact:
    """A parameter, buffer or constant of the model: one storage, every name that leads to it."""

    key: int
    owners: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Op:
    """One operation of one traced forward.

    ``kind`` is ``conv``, ``conv_transpose``, ``linear``, ``norm``, ``input``, ``constant``, ``output``
    or ``other``. ``inputs`` are the indices of the operations whose values it reads (each use counts),
    ``reads`` the same by argument name where an argument is one value, ``tensors`` the model's own
    tensors it reads by argument name (``weight``, ``bias``, ``running_mean``, ``running_var``), ``attrs``
    its constants (``groups``, ``eps``, ``training``). ``within`` names the higher-order operations
    around it (``cond``), outermost first, and ``stack`` the calls of modules around it, outermost
    first. Shapes count elements per dimension.
    """

    index: int
    kind: str
    target: str
    site: CallSite
    inputs: tuple[int, ...] = ()
    reads: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, int] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    within: tuple[str, ...] = ()
    stack: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """All operations of one forward on one signature, in the order they ran."""

    signature: str
    ops: tuple[Op, ...]

    def users(self, index: int) -> tuple[Op, ...]:
        """The operations that read the value of operation ``index``; twice where they read it twice."""
        return tuple(self.ops[u] for u in self._users.get(index, ()))

    @property
    def _users(self) -> dict[int, list[int]]:
        known: dict[int, list[int]] | None = self.__dict__.get("_users_cache")
        if known is None:
            known = {}
            for op in self.ops:
                for i in op.inputs:
                    known.setdefault(i, []).append(op.index)
            self.__dict__["_users_cache"] = known
        return known


@dataclass(frozen=True)
class NormFact:
    """A normalization layer with running statistics: a module, or the buffers that a functional call uses.

    ``paths`` holds every name, ``calls`` the operations that use its statistics as (route, index).
    ``module`` is False where the buffers belong to a module that does other things as well
    (``F.batch_norm`` in a forward): then no module can be taken out. ``after`` are its own submodules
    that run on its output inside its forward (the activation of timm's BatchNormAct2d), ``extra`` says
    what else its forward does, empty for a norm that only normalises and runs ``after``.
    """

    path: str
    paths: tuple[str, ...]
    cls: str
    tensors: Mapping[str, int]
    calls: tuple[tuple[int, int], ...] = ()
    training: bool = False
    module: bool = True
    summary: str = ""
    after: tuple[str, ...] = ()
    extra: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known of a model, gathered once; rules and planners read this and nothing else.

    ``held`` holds the keys of weights whose layer's output something keeps beyond the forward (an
    attribute, a list in a closure), ``hooks`` the module paths with hooks that could read or change
    what passes, ``blockers`` reasons that concern the whole model (a global module hook), ``written`` the
    attributes that the forward writes: then its first run is a route of its own.
    ``binding`` leads from keys to the original's objects; it is opaque to everyone but ``graph``.
    """

    source: Literal["exported", "symbolic", "observed"]
    routes: tuple[Route, ...]
    tensors: Mapping[int, TensorFact]
    norms: tuple[NormFact, ...]
    hooks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    held: frozenset[int] = frozenset()
    blockers: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    binding: Any = field(default=None, repr=False, compare=False, metadata=NOT_IN_JSON)


# -------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Edit(Value):
    """One change of a model: ``site`` was ``before`` and is now ``after``.

    ``calls`` are the call sites concerned, ``into`` the modules that took it up, ``gains`` the
    ``state_dict`` keys that are new, ``ulp`` the largest distance of a stored number from its exact value in
    units in the last place (½ is correct rounding), ``noise_ratio`` the error at the site in
    multiples of the model's own rounding noise there (None: not measured).
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

    ``model`` is None after a dry run. ``signatures`` are the inputs the facts and the proof hold for.
    ``recipe`` is what a saved state_dict carries so that it can be loaded again.
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

    @property
    def norms(self) -> int:
        """How many norms the model had."""
        return len(self.edits) + len(self.refusals)


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


# ---------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class NormInfo:
    """A norm as a file shows it: no model needed."""

    path: str
    channels: int
    dtype: str
    affine: bool


@dataclass(frozen=True)
class FileInfo(Value):
    """What a file is, found out by its content alone.

    ``kind`` is a stable word (``state_dict``, ``pickled_module``, ``lightning``, ``torchscript``,
    ``exported_program``, ``safetensors``, ``onnx``, ``git_lfs``, ``html``, ``empty``, ``truncated``,
    ``unknown`` …), ``container`` how it is packed (``zip``, ``legacy``, ``pickle``, ``safetensors``,
    ``protobuf``, ``text``), ``wrapper`` the key under which the weights lie, ``prefix`` what would be
    stripped from names, ``names_code`` the importable names that loading would run (``dangerous`` those
    that no flag admits), ``advice`` the next step.
    """

    path: str
    kind: str
    container: str
    size: int
    title: str
    loadable: bool
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    norms: tuple[NormInfo, ...] = ()
    wrapper: str | None = None
    other_wrappers: tuple[str, ...] = ()
    prefix: str = ""
    names_code: tuple[str, ...] = ()
    dangerous: tuple[str, ...] = ()
    root_class: str | None = None
    recipe: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""
