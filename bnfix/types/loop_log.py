"""What a guard saw of a training loop, as plain numbers: the evidence of the T rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """A line of the user's own code. ``text`` is what stands there; empty where the source can't be read."""

    file: str
    number: int
    function: str = ""
    text: str = ""

    def __str__(self) -> str:
        said = f": {self.text}" if self.text else ""
        return f"{self.file}:{self.number}{said}"


@dataclass(frozen=True)
class Episodes:
    """Something that came up again and again: ``updates`` of running statistics in ``times`` episodes.

    ``first`` and ``last`` are optimizer steps, counted from 0; ``lines`` is where the first of them came from.
    ``of`` counts what it is to be compared with: the optimizer steps with gradient since the first.
    """

    updates: int = 0
    times: int = 0
    of: int = 0
    first: int | None = None
    last: int | None = None
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True)
class SitePair:
    """How far two call sites of one norm are apart, over ``batches`` optimizer steps that had both.

    ``shift`` is the median over channels of \\|mean of (μi − μj)/σ\\| with σ² = the variance within the forwards + eps;
    ``ratio`` the median of \\|mean of ½ ln(vi/vj)\\|. ``shift_error`` and ``ratio_error`` are medians of their standard
    errors, from the scatter between steps: activations at neighbouring positions are not independent, so the number
    of values alone says too little. ``values`` is the least number of values a channel in a forward.
    """

    a: str
    b: str
    batches: int
    values: int
    shift: float
    ratio: float
    shift_error: float = 0.0
    ratio_error: float = 0.0


@dataclass(frozen=True)
class LoopSite:
    """One place from which a norm is called in an optimizer step.

    ``line`` is the user's line (in the loop, or in the model's own code where one forward calls the norm repeatedly),
    ``forward`` counts calls of the whole model in the step and ``backward`` the backward passes, both from 0.
    ``turn``: which of several forwards from the very same place. ``values`` a channel in one forward: N·H·W;
    ``samples`` N.
    """

    name: str
    line: Line | None = None
    forward: int = 0
    backward: int = 0
    turn: int = 0
    values: int = 0
    samples: int = 0


@dataclass(frozen=True)
class StepPattern:
    """The call sites of one norm in an optimizer step, and how often a step looked like this.

    ``steps`` is the number of measured steps of this kind. ``own``: an optimizer that holds this norm's parameters took
    the step. ``backwards``: the backward passes in it. ``pairs`` are distances between the sites, the worst first.
    ``alike`` compares the scatter between the sites with that between steps: about 1 for independent batches, far below
    for one batch that is shown again (a closure, SAM); None where it could not be measured.
    """

    sites: tuple[LoopSite, ...]
    steps: int
    own: bool = True
    backwards: int = 1
    pairs: tuple[SitePair, ...] = ()
    alike: float | None = None


@dataclass(frozen=True)
class LoopNorm:
    """What one norm did while it was watched.

    ``values`` a channel and ``samples`` in a forward are medians of those that were measured. ``updates`` of its
    statistics in forwards with gradient; ``without_grad``, ``recomputed`` (inside a backward pass), ``calibrated``
    (momentum changed for the purpose, or statistics reset) and ``expected`` (declared) ones are counted apart.
    ``gradless_steps`` had updates without gradient only; ``frozen`` ones had no parameter that asks for gradients.
    ``evaluations`` are forwards in evaluation mode. ``counted`` is by how much ``num_batches_tracked`` grew, None where
    that can't be told; ``unseen`` updates happened where no hook sees them (a compiled graph).

    ``per_step`` maps a number of updates to the steps of its own optimizer that had as many, ``foreign`` counts steps
    of other optimizers in which it was updated (a discriminator, while the generator learns). ``resumed`` are runs of
    updates without gradient after which training went on, ``used`` updates those after which it was evaluated,
    ``trailing`` those that nothing came after. ``in_step`` compares the data of such forwards with that of training in
    the same step. ``abandoned`` forwards had gradients that nobody took. ``thawed`` are updates after it had been held
    in evaluation mode during training (``held`` steps). ``held_at_start``: it was in evaluation mode, the model in
    training mode, when the watch began. ``written``: its values changed though no optimizer holds them; ``twin``: it
    began as a copy of another part that is trained; ``left_out``: optimizers step, and none of them holds its
    parameters or those of the layer next to it.
    """

    path: str
    paths: tuple[str, ...] = ()
    cls: str = ""
    channels: int = 0
    momentum: float | None = None
    sync: bool = False
    affine: bool = True
    trainable: bool | None = None
    values: int | None = None
    samples: int | None = None
    updates: int = 0
    without_grad: int = 0
    gradless_steps: int = 0
    recomputed: int = 0
    calibrated: int = 0
    expected: int = 0
    evaluations: int = 0
    frozen: Episodes = Episodes()
    recomputing: Episodes = Episodes()
    resumed: Episodes = Episodes()
    used: int = 0
    trailing: int = 0
    gradless_lines: tuple[Line, ...] = ()
    in_step: SitePair | None = None
    abandoned: Episodes = Episodes()
    thawed: Episodes = Episodes()
    held: int = 0
    held_at_start: bool = False
    written: bool = False
    twin: bool = False
    left_out: bool = False
    counted: int | None = None
    unseen: int = 0
    per_step: Mapping[int, int] = field(default_factory=dict)
    foreign: int = 0
    patterns: tuple[StepPattern, ...] = ()

    @property
    def adversarial(self) -> bool:
        """Whether steps of several optimizers go through this norm, some of them not its own: a GAN."""
        return self.foreign > 0

    @property
    def teacher(self) -> bool:
        """Whether it never learns by gradient and its values are set from outside: an average or a copy of another."""
        return not self.updates and (self.written or self.twin)


@dataclass(frozen=True)
class LoadedState:
    """A ``load_state_dict`` that brought a norm's weights and not its running statistics.

    ``updates_since`` counts those of training; ``healed``: the statistics have been set or re-estimated since.
    """

    path: str
    missing: tuple[str, ...]
    step: int
    line: Line | None = None
    updates_since: int = 0
    momentum: float | None = None
    healed: bool = False


@dataclass(frozen=True)
class RankDistance:
    """How far a norm's statistics on two ranks are apart at one step: as stored, and those of their batches.

    Both are the median over channels of \\|μi − μj\\|/σ; ``batch_error`` is the median standard error of ``batches``.
    """

    path: str
    a: int
    b: int
    step: int
    stored: float
    batch: float | None = None
    batch_error: float = 0.0
    batches: int = 0


@dataclass(frozen=True)
class LoopRanks:
    """What several processes add. ``ddp``: the model is wrapped; ``forwards``: of the wrapper with buffers sent around.

    ``forwards.times`` counts optimizer steps in which one backward pass covered several such forwards. ``unseen`` says
    why ranks could not be compared.
    """

    world: int
    rank: int
    ddp: bool = False
    broadcast: bool = False
    forwards: Episodes = Episodes()
    distances: tuple[RankDistance, ...] = ()
    unseen: str = ""


@dataclass(frozen=True)
class LoopLog:
    """A training loop as the norms saw it: frozen plain data, free of the model.

    ``steps`` are those of optimizers after forwards of the model (several without a forward between them are one);
    ``measured`` of them have batch statistics. ``expected`` maps what the user declared to the updates in it.
    """

    norms: tuple[LoopNorm, ...]
    steps: int = 0
    measured: int = 0
    optimizers: int = 0
    loads: tuple[LoadedState, ...] = ()
    ranks: LoopRanks | None = None
    expected: Mapping[str, int] = field(default_factory=dict)
    seen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
