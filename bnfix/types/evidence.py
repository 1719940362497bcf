"""Everything that rules read. Gathered once; each part may be absent, and a rule says which it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bnfix.types.facts import Facts

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

Role = Literal["train", "val"]


@dataclass(frozen=True, eq=False)
class NormState:
    """One normalization layer of the batch norm family as it stands in a module tree or in a file.

    Arrays have one float64 number a channel (widened, so exact); None where there is no such tensor. What only a module
    has (``momentum``, ``training`` …) is None where the state comes from a file. ``tracked`` is
    ``num_batches_tracked``. ``root_training`` is the mode of the whole model. ``tracks`` is the flag
    ``track_running_stats``, whatever buffers there are; ``dtype`` is that of the running buffers. ``trainable`` says
    whether any parameter of the layer asks for gradients (None: it has none). ``ignore`` are the codes of its inline
    ``bnfix_ignore``.
    """

    path: str
    paths: tuple[str, ...]
    cls: str
    channels: int
    mean: Array | None = None
    var: Array | None = None
    weight: Array | None = None
    bias: Array | None = None
    tracked: int | None = None
    dtype: str | None = None
    eps: float | None = None
    momentum: float | None = None
    cumulative: bool = False
    """``momentum=None`` on the module: a cumulative average."""
    tracks: bool | None = None
    training: bool | None = None
    root_training: bool | None = None
    trainable: bool | None = None
    instance: bool = False
    """An InstanceNorm."""
    frozen_class: bool = False
    """A class that never learns statistics (torchvision's FrozenBatchNorm2d and the like)."""
    module: bool = True
    """False where the state comes from a file alone."""
    ignore: frozenset[str] = frozenset()
    feeder: Array | None = None
    """(C,) norms ‖w‖ of the weights in front: one number for each output channel of the layer that alone feeds it."""

    @property
    def has_stats(self) -> bool:
        """Whether there are running statistics, readable or not: lazy ones and those on ``meta`` have no values yet."""
        return self.dtype is not None


@dataclass(frozen=True, eq=False)
class SiteData:
    """What one call site of a norm saw of the data, batch by batch, in float64.

    ``batch_n`` (B,) counts values a channel in each batch, ``batch_mean`` and ``batch_var`` (B, C; biased) are their
    moments, ``batch_samples`` (B,) the independent samples. ``mean`` and ``var`` (C,; unbiased) are pooled over all.
    ``positions`` is the number of values a sample and channel (H·W), ``sample_var`` (C,) the variance between sample
    means: F of BN304 compares it with that between batch means. ``masked`` holds mean and variance (2, C) with the
    mask's padding left out, where the data has a mask.
    """

    path: str
    call: int
    positions: int
    batch_n: Array
    batch_samples: Array
    batch_mean: Array
    batch_var: Array
    mean: Array
    var: Array
    sample_var: Array
    masked: Array | None = None
    numbers: tuple[int, ...] = ()
    """Which of the batches these are: a call site need not be met in each, and of hundreds only the first are kept."""

    @property
    def name(self) -> str:
        """``b.bn@1`` for the second call of ``b.bn`` in one forward."""
        return f"{self.path or '(root)'}@{self.call}" if self.call else self.path or "(root)"


@dataclass(frozen=True)
class Drift:
    """The functional gate of BN204: how far recalibration would move the outputs, beside what chance does.

    ``change`` is rms(f − R)/std(R) with f the outputs as stored and R those after a dry-run recalibration, ``null`` the
    same between recalibrations on two disjoint halves of the data; None where it could not be had (``reason``).
    ``layers`` has (mean shift in σ, variance ratio, KL in nats) of the worst channel by call site.
    """

    change: float | None
    null: float | None
    samples: int = 0
    layers: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    reason: str = ""
    where: str = ""
    """The norm whose normalised input was compared instead, where the outputs have no row a sample."""


@dataclass(frozen=True)
class LoaderFacts:
    """What a loader says of itself: sizes in samples; None where it does not say."""

    batches: int | None = None
    batch_size: int | None = None
    drop_last: bool | None = None
    dataset: int | None = None
    shuffles: bool | None = None


@dataclass(frozen=True, eq=False)
class DataEvidence:
    """One measuring pass over a part of the data, the model in evaluation mode and left as it was.

    The moments at ``sites`` are those that the model has with the statistics of the data in its norms (``fitted``), or
    with its own where these could not be had. ``sizes`` (B,) are the samples of the loader's batches, ``kept`` (B,)
    those that were measured; ``whole`` says that it was read to its end. ``seen`` says it to a person.
    """

    sites: tuple[SiteData, ...]
    batches: int
    samples: int
    loader: LoaderFacts = LoaderFacts()
    drift: Drift | None = None
    role: Role = "train"
    deployed: Drift | None = None
    """The same gate against ``val_data``, the data of deployment."""
    sizes: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    whole: bool = False
    fitted: bool = False
    seen: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnnxNorm:
    """One BatchNormalization of an ONNX graph. ``computed`` names its inputs that are no constants."""

    name: str
    training_mode: bool = False
    computed: tuple[str, ...] = ()
    eps: float = 1e-5


@dataclass(frozen=True)
class OnnxFacts:
    """What an ONNX graph says: its norms, and ``parity`` with a model where one was compared."""

    path: str
    norms: tuple[OnnxNorm, ...]
    opset: int = 0
    batch_statistics: tuple[str, ...] = ()
    """Where mean and variance of a batch are computed in the graph (a norm in training mode, taken apart)."""
    parity: Any = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """All there is to judge by. ``loop`` is the log of a training loop (:class:`bnfix.types.LoopLog`).

    ``norms``: module tree and stored values (S and C). ``facts``: the graph (G), with ``facts_missing`` saying why it
    is not there though it was asked for. ``data``: D, likewise. ``onnx``: O. ``against``: the norms of a reference
    (BN207, BN208). ``options`` are the user's own thresholds, by code.

    ``facts`` are of a copy in evaluation mode, ``facts_training`` of one in training mode (its norms evaluated all the
    same), with ``training_missing`` saying why they are absent, or of what they know only a part: dropout alone was
    switched on then. ``program`` marks an exported program: what mode it is in is part of its graph.
    """

    norms: tuple[NormState, ...] | None = None
    facts: Facts | None = None
    facts_missing: str = ""
    facts_training: Facts | None = None
    training_missing: str = ""
    program: bool = False
    data: DataEvidence | None = None
    data_missing: str = ""
    loop: Any = None
    onnx: OnnxFacts | None = None
    against: tuple[NormState, ...] | None = None
    weights_moved: bool | None = None
    """With ``against``: whether any other weight differs between the two."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    """What was looked at, for a person: samples, batches, steps."""
