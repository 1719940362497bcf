"""What is known of a model: call sites, tensors, operations, norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bnfix.types.values import NOT_IN_JSON


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
    attributes that the forward writes: then its first run is a route of its own. ``notes`` say to the reader what
    all this rests on, where that is not the graph of ``torch.export``.
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
    notes: tuple[str, ...] = ()
    binding: Any = field(default=None, repr=False, compare=False, metadata=NOT_IN_JSON)
