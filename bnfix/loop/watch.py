"""The guard of a training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel

from bnfix.errors import WatchError
from bnfix.graph import find_owners, norm_states, unwrap
from bnfix.loop.doors import Door
from bnfix.loop.frames import here
from bnfix.loop.hooks import FORWARD, Call
from bnfix.loop.loads import Loads
from bnfix.loop.logbook import log_of
from bnfix.loop.optimizers import Steps, as_optimizers
from bnfix.loop.origins import Origins
from bnfix.loop.ranks import Ranks
from bnfix.loop.session import Session
from bnfix.loop.tally import NormHook, Tally
from bnfix.types import Diagnosis, Evidence, LoopLog, NormState

Judge = Callable[[Evidence], Diagnosis]


class Watch:
    """Watches the norms of a model while it is trained; made by :func:`bnfix.watch`.

    Between entry and exit each norm has a hook in front of its forward, which counts; in some steps the batch's moments
    are read off the running statistics. At exit everything is taken off, on exceptions too, and nothing of the model is
    held any more: the log is plain data.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, *, judge: Judge, strict: bool = False) -> None:
        self._given: nn.Module | None = model
        self._optimizers: Any = as_optimizers(optimizer)
        self._judge, self._strict = judge, strict
        self._session: Session | None = None
        self._log: LoopLog | None = None
        self._norms: tuple[NormState, ...] = ()
        self._notes: list[str] = []
        self._rest: Any = None

    def __enter__(self) -> Watch:
        if self._given is None or self._session is not None:
            raise RuntimeError("a watch is entered once; make another with bnfix.watch(model)")
        given, optimizers = self._given, self._optimizers
        self._given, self._optimizers = None, ()
        root, _ = unwrap(given)
        tallies: list[Tally] = []
        session = Session(root, Ranks(tallies), here().f_code)
        session.tallies = tallies
        try:
            self._attach(session, given, root, optimizers)
        except BaseException:
            session.attached.remove()
            raise
        self._session = session
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session = self._session
        if session is None:
            return
        try:
            session.end(failed=kind is not None)
            self._log = self._read(final=kind is None)
        except Exception:
            if kind is None:
                raise
            # The user's own exception passes. What stopped the training may keep the log from being read: a device
            # that is gone, say; report() tells.
        finally:
            session.attached.remove()
            self._session = self._rest = None
        if self._strict and kind is None:
            worst = self.report().of("error")
            if worst:
                raise WatchError(f"{worst[0].code} {worst[0].name}: {worst[0].message}", finding=worst[0])

    @property
    def log(self) -> LoopLog:
        """What was seen so far, as plain data; the whole of it behind the ``with`` block."""
        if self._log is not None:
            return self._log
        if self._session is None:
            raise RuntimeError("nothing was watched yet: with bnfix.watch(model) as w: train()")
        self._session.flush()
        return self._read(final=False)

    def report(self) -> Diagnosis:
        """What is wrong with the loop: where, how often, since which step. Also while it runs."""
        log = self.log
        diagnosis = self._judge(Evidence(norms=self._norms, loop=log, notes=log.notes))
        return Diagnosis(
            diagnosis.findings,
            diagnosis.skipped,
            diagnosis.checked,
            diagnosis.ignored,
            len(log.norms),
            (*log.seen, *diagnosis.seen),
            diagnosis.notes,
        )

    @contextlib.contextmanager
    def expected(self, label: str) -> Iterator[None]:
        """Updates of statistics in this block are wanted; ``label`` says what for, and the report counts them."""
        session = self._session
        if session is None:
            yield
            return
        outer, session.declared = session.declared, str(label)
        try:
            yield
        finally:
            session.declared = outer

    def _attach(self, session: Session, given: nn.Module, root: nn.Module, optimizers: tuple[Any, ...]) -> None:
        owners = find_owners(root)
        self._norms = tuple(NormState(s.path, s.paths, s.cls, s.channels, ignore=s.ignore) for s in norm_states(root))
        loads, origins = Loads(lambda: session.window + session.stepped), Origins()
        own: dict[int, int] = {}
        left: list[str] = []
        fallback = next((p for p in root.parameters() if p.requires_grad), None)
        for module in owners.modules.values():
            paths = owners.paths(module) or ("",)
            if not isinstance(module, _BatchNorm) or module._buffers.get("running_mean") is None:
                learns = isinstance(module, _InstanceNorm) and module.running_mean is not None
                functional = "running_mean" in module._buffers and not isinstance(module, (_BatchNorm, _InstanceNorm))
                left += [paths[0]] if learns or functional else []
                continue
            slots = [s for s in owners.module_slots[id(module)] if isinstance(s.container, nn.Module)]
            parent, name = (slots[0].container, str(slots[0].key)) if slots else (None, "")
            mine = [p for p in module._parameters.values() if p is not None]
            probe = next((p for p in mine if p.requires_grad), fallback)
            tally = Tally(len(session.tallies), paths, module, probe)
            tally.held_at_start = root.training and not module.training
            own.update({id(p): tally.index for p in mine})
            session.tallies.append(tally)
            origins.note(tally, module, parent)
            loads.listen(session.attached, tally, module, parent, name)
            session.attached.forward(module, NormHook(module, session, tally))
        if not isinstance(root, torch.jit.ScriptModule):  # it takes no hooks
            session.attached.forward(root, Call(root, session.attached.copies, FORWARD, session.root_called))
        wrappers = [given, *owners.modules.values()]
        for wrapper in {id(m): m for m in wrappers if isinstance(m, DistributedDataParallel)}.values():
            session.doors.append(door := Door(wrapper, session))
            session.attached.forward(wrapper, Call(wrapper, session.attached.copies, FORWARD, door.called))
        steps = Steps(session.attached, root, own, session.heard)
        session.claimed |= {i for o in optimizers for i in steps.of(o).norms}
        if optimizers and not any(steps.of(o).any for o in optimizers):
            self._notes.append("the optimizer that was given holds none of the model's parameters")
        if left:
            what = (
                f"{len(left)} layers keep statistics and are not watched: they are no BatchNorm that counts its updates"
            )
            self._notes.append(f"{what}: {', '.join(left[:5])}")
        self._rest = steps, loads, origins, given is not root or _compiled(owners.modules.values())
        if self._strict:
            session.judge, session.strict_loads = self._errors, loads

    def _errors(self) -> Any:
        return self._judge(Evidence(norms=self._norms, loop=self._read(final=False))).of("error")

    def _read(self, *, final: bool) -> LoopLog:
        assert self._session is not None
        steps, loads, origins, compiled = self._rest
        notes = tuple(self._notes)
        return log_of(self._session, steps, loads, origins, notes, final=final, compiled=compiled)


def _compiled(modules: Any) -> bool:
    return any(getattr(m, "_compiled_call_impl", None) is not None for m in modules)
