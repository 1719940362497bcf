"""What one norm has done so far: counters that cost next to nothing, and samples in some of the steps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, is_grad_enabled, nn
from torch._C import _current_graph_task_id as running_backward
from torch._C import _get_tracing_state as get_tracing_state
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from bnfix.loop.frames import Spot, here, user_spot
from bnfix.loop.hooks import FORWARD, Hook
from bnfix.loop.samples import Forward, Record, count_of, version_of
from bnfix.loop.sites import Gradless, Pattern

if TYPE_CHECKING:
    from bnfix.loop.session import Session

_LINES = 3
"""So many different lines are kept of each kind of episode."""


@dataclass
class Run:
    """Episodes of one kind, while they are counted."""

    updates: int = 0
    times: int = 0
    first: int | None = None
    last: int | None = None
    base: int = 0
    spots: list[Spot] = field(default_factory=list)
    looks: int = 0

    def add(self, step: int, updates: int = 1, times: int = 1) -> None:
        """More of it, at this step."""
        self.updates += updates
        self.times += times
        if self.first is None:
            self.first = step
        self.last = step

    def look(self, frame: FrameType | None) -> None:
        """Note whose line this came from, the first few times."""
        self.looks += 1
        spot = user_spot(frame)
        if spot is not None and spot not in self.spots and len(self.spots) < _LINES:
            self.spots.append(spot)


class Tally:
    """The counters of one norm. Holds the module weakly."""

    def __init__(self, index: int, paths: tuple[str, ...], module: nn.Module, probe: nn.Parameter | None) -> None:
        self.index = index
        self.paths = paths
        self.path = paths[0]
        self.module = weakref.ref(module)
        self.cls = type(module).__name__
        self.probe = weakref.ref(probe) if probe is not None else lambda: None
        """A parameter whose gradient tells that a backward pass went by."""
        self.momentum: float | None = module.momentum  # type: ignore[assignment]
        self.tracked = count_of(module)
        self.mean_first = self.mean_version = version_of(module, "running_mean")
        self.values: list[tuple[int, int]] = []
        """(values a channel, samples) of some forwards."""
        self.order = 1 << 30
        """The when of its first forward among those of other norms."""
        # In the step that is running.
        self.n = self.m = self.carried = 0
        self.record: Record | None = None
        self.fed = 0
        """Measured steps with several updates."""
        self.multi = False
        """Whether a step ever updated it more than once: only then are its batches worth a look."""
        self.usual = 1 << 30
        # Since the watch began.
        self.updates = self.without = self.recomputed = self.calibrated = self.expected = self.evaluations = 0
        self.windows = self.foreign = self.looked = self.gradless_windows = 0
        self.per_step: dict[int, int] = {}
        self.trained = False
        """Whether it was ever updated while one of its parameters asked for a gradient."""
        self.frozen = Run()
        self.recomputing = Run()
        self.resumed = Run()
        self.abandoned = Run()
        self.thawed = Run()
        self.pending = self.used = 0
        self.pending_counts = False
        self.calibrating = False
        self.held = 0
        self.held_window = -1
        self.held_trainable: bool | None = None
        self.held_at_start = False
        self.held_before = 0
        self.patterns: dict[tuple[Any, ...], Pattern] = {}
        self.gradless = Gradless()

    def fold(self, own: bool, measured: bool) -> None:
        """A step is over: it was taken by the norm's own optimizer, or by another's."""
        n = self.n + self.carried
        if n:
            self.windows += 1
            if own:
                self.per_step[n] = self.per_step.get(n, 0) + 1
            else:
                self.foreign += 1
        elif self.m:
            self.gradless_windows += 1
        if n + self.m - self.carried > 1:
            self.multi = True
            self.fed += measured
        self.n = self.m = self.carried = 0

    def settle(self) -> None:
        """From what has been usual so far: how many updates in one step are out of the ordinary."""
        if self.per_step:
            self.usual = 2 * max(self.per_step, key=lambda n: self.per_step[n])

    def resume(self, step: int) -> None:
        """Training goes on after updates without gradient."""
        if self.pending_counts:
            run = self.resumed
            if run.first is None:
                run.base = self.windows
            run.add(step, self.pending, int(run.last != step))
        self.pending = 0

    def evaluated(self, session: Session) -> None:
        """A forward in evaluation mode."""
        self.evaluations += 1
        if self.pending:
            self.used += self.pending
            self.pending = 0
        self.calibrating = False
        if session.strict_loads is not None and session.strict_loads:
            session.judge_now()
            session.raise_if_due(self, evaluation=True)
        if is_grad_enabled() and self.held_window != session.window and session.training():
            # The model trains, this layer is held in evaluation mode on purpose.
            self.held += 1
            self.held_window = session.window
            self.held_trainable = self.asks()
            session.active = True

    def thaw(self, session: Session, frame: FrameType | None) -> None:
        """It had been held in evaluation mode and learns statistics again."""
        if session.window <= self.held_window:
            return  # no step was taken while it was held
        if self.held_trainable == self.asks():  # otherwise it is unfrozen on purpose, weights and all
            self.thawed.add(session.window, 0)
            self.thawed.base = self.updates + self.without
            self.held_before += self.held
            self.thawed.look(frame)
        self.held = 0

    def asks(self) -> bool | None:
        """Whether any of its parameters asks for a gradient; None where it has none."""
        module = self.module()
        own = [p for p in module._parameters.values() if p is not None] if module is not None else []
        return any(p.requires_grad for p in own) if own else None

    def reset(self, module: nn.Module) -> bool:
        """Whether somebody has set the statistics back since the last look. Reads one number, and only then."""
        version = version_of(module, "running_mean")
        if version == self.mean_version:
            return False
        self.mean_version = version
        return count_of(module) == 0

    def mark(self) -> tuple[int, int] | None:
        """What the probe's gradient looks like now: another mark after a backward pass."""
        probe = self.probe()
        grad = probe.grad if probe is not None else None
        return (id(grad), grad._version) if grad is not None else None


class NormHook(Hook):
    """In front of each forward of one norm. Short on purpose: this is all that most steps cost."""

    __slots__ = ("session", "tally")

    def __init__(self, module: nn.Module, session: Session, tally: Tally) -> None:
        super().__init__(module, session.attached.copies, FORWARD)
        self.session, self.tally = session, tally

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_compiling():
            return
        session, tally = self.session, self.tally
        try:
            if running_backward() >= 0:
                self.recomputed(module)
                return
            if session.stepped:
                session.turn()
            if not module.training:
                tally.evaluated(session)
                return
            momentum = module.momentum
            if momentum == 0 or not module.track_running_stats:
                return
            session.active = True
            if session.declared is not None:
                tally.expected += 1
                session.expected[session.declared] += 1
                return
            weight = module._parameters.get("weight")
            if weight is not None:
                if weight.requires_grad:
                    tally.trained = True
                else:
                    self.frozen(module)
            if not tally.n and not tally.m:
                session.touched.append(tally)
            if tally.held:
                tally.thaw(session, here())
            if is_grad_enabled():
                tally.momentum = momentum  # type: ignore[assignment]
                tally.calibrating = False
                tally.updates += 1
                n = tally.n
                if n and session.by_version:
                    session.look_for_a_step(tally)
                tally.n += 1
                if tally.pending:
                    tally.resume(session.window)
                if n > tally.usual:
                    session.sampling = True
                if session.errors:
                    session.raise_if_due(tally)
                if session.sampling:
                    sample(session, tally, module, args, True)
            elif tally.calibrating or momentum != tally.momentum or (tally.updates and tally.reset(module)):
                tally.calibrating = True
                tally.calibrated += 1
            else:
                self.without_grad(module, args)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is not the training's fault
            session.give_up(error)

    def without_grad(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """An update of statistics that trains nothing."""
        session, tally = self.session, self.tally
        tally.without += 1
        tally.m += 1
        if not tally.pending:
            tally.pending_counts = session.window > 0 and tally.updates > 0
            if tally.resumed.looks < 8:
                tally.resumed.look(here(1))
        tally.pending += 1
        if session.sampling:
            sample(session, tally, module, args, False)

    def recomputed(self, module: nn.Module) -> None:
        """The backward pass computes this forward once more."""
        session, tally = self.session, self.tally
        if not module.training or module.momentum == 0 or not module.track_running_stats:
            return
        if session.declared is not None:
            tally.expected += 1
            session.expected[session.declared] += 1
            return
        tally.recomputed += 1
        tally.recomputing.add(session.window, times=int(tally.recomputing.last != session.window))
        if not tally.recomputing.looks:
            tally.recomputing.look(here())
        if tally.pending:  # reentrant: the first time was without gradient
            tally.pending -= 1
            tally.carried += 1
        record = tally.record
        if record is not None and record.open is not None:
            record.close(tally.module(), session.undisturbed(record.open))

    def frozen(self, module: nn.Module) -> None:
        """None of its parameters asks for a gradient (if only the weight does not, it is not frozen)."""
        session, tally = self.session, self.tally
        bias = module._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            tally.trained = True
            return
        tally.frozen.add(session.window, times=int(tally.frozen.last != session.window))
        if not tally.frozen.looks:
            tally.frozen.look(here())


def sample(session: Session, tally: Tally, module: nn.Module, args: tuple[Any, ...], grad: bool) -> None:
    """Look more closely at one forward: its size, where it comes from, and what it does to the statistics."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or _recorded() or x.dim() < 2:
        return
    record = tally.record
    if record is None or record.window != session.window:
        record = tally.record = Record(session.window)
        tally.order = min(tally.order, len(session.records))
        session.records.append((tally, record))
    if record.open is not None:
        record.close(module, session.undisturbed(record.open))
    if len(record.forwards) >= session.most_forwards:
        return
    samples = x.shape[0]
    forward = Forward(grad, samples, x.numel() // max(x.shape[1], 1), session.forwards)
    if len(tally.values) < 64:
        tally.values.append((forward.values, samples))
    forward.mark = tally.mark()
    if grad and x.requires_grad and not x.is_leaf:
        _notice_its_end(session, tally, forward, x)
    record.forwards.append(forward)
    if tally.multi or session.every_batch or tally.n + tally.m > 1:
        session.place(forward, here())
        record.begin(forward, module)


def _recorded() -> bool:
    """Whether somebody takes down every operation (jit.trace, make_fx, a counter of FLOPs): none is to be ours."""
    return get_tracing_state() is not None or _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None


def _notice_its_end(session: Session, tally: Tally, forward: Forward, x: Tensor) -> None:
    # The graph holds the input of a norm until its backward pass is through, or until nobody wants it any more.
    mark = forward.mark
    watching = weakref.ref(session)

    def gone(_: Any) -> None:
        if watching() is not None and running_backward() < 0:
            now = tally.mark()
            forward.abandoned = now is None or now == mark

    forward.input = weakref.ref(x, gone)
