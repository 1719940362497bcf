from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, step
from bnfix.rules.loop_sites import not_seen
from bnfix.rules.reading import count, site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Line, LoopLog, LoopNorm, Safety, Skipped

_STEPS = 4
"""Before so many steps, nobody can tell what is never trained."""


class FrozenButUpdating(Rule):
    """A norm that is meant to be frozen still learns statistics.

    ## What it does

    Looks for norms none of whose parameters asks for a gradient and whose running statistics change all the same,
    because they are in training mode; for norms behind a `torch.no_grad()` in every step, and for those that no
    optimizer holds (a new head is trained, or a network inside a loss), which are other ways to freeze; and for norms
    that were held in evaluation mode while the model trained, until somebody's `model.train()` undid it.

    ## Why is this bad

    `requires_grad = False` freezes weights, not statistics. A 'frozen' backbone drifts away from what it was trained
    as; training libraries call `model.train()` at the start of every epoch, and with it goes every `eval()` that was
    said before. In fine-tuning with small batches this alone can cost most of the accuracy.

    ## Example

    ```python
    for p in backbone.parameters():  # bad: the norms go on learning statistics
        p.requires_grad = False

    class Net(nn.Module):  # good: stays in evaluation mode whoever calls train()
        def train(self, mode=True):
            super().train(mode)
            self.backbone.eval()
            return self
    ```

    Teachers whose parameters are written from outside (an average or a copy of another network) are left alone, and so
    are parameters that are switched on and off in turns, as in a GAN.

    ## Fix

    Override `train()` as above, or `bnfix.swap(model, to="frozen", only=…)`: the same outputs in evaluation mode, and
    nothing that could learn.
    """

    code = "BN403"
    name = "frozen-but-updating"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for each way to freeze that did not hold."""
        log: LoopLog = evidence.loop
        yield from not_seen(self.code, log)
        # What is written from outside is a teacher; a copy of a trained part may be one whose time has not come.
        own = [n for n in log.norms if not n.written and not n.twin]
        frozen = [n for n in own if n.frozen.updates]
        if frozen:
            undone = sum(n.held_at_start or n.held > 0 for n in frozen)
            also = f"; {undone} had been in evaluation mode, train() undid it" if undone else ""
            yield self._found(frozen, "no parameter is trained, but statistics are", "frozen", also)
        idle = [n for n in own if n not in frozen and _never_trained(n, log)]
        if idle:
            norm, paths = idle[0], tuple(site(n.path) for n in idle)
            yield self.found(
                "warning",
                f"{some(paths)}: forwards without gradient only, nobody writes the weights, but training mode learns "
                f"statistics: {norm.without_grad} updates in {norm.gradless_steps} of {log.steps} steps"
                f"{_where(norm.gradless_lines)}",
                paths,
                fix=_fix(paths),
                updates=norm.without_grad,
                steps=norm.gradless_steps,
            )
        out = [n for n in own if n not in frozen and n not in idle and _is_left_out(n)]
        if out:
            paths, updates = tuple(site(n.path) for n in out), max(n.updates for n in out)
            yield self.found(
                "warning",
                f"{some(paths)}: no optimizer holds their parameters, which stay as they are, but training mode learns "
                f"statistics: {count(updates, 'update')} in {count(log.steps, 'step')}",
                paths,
                fix=_fix(paths),
                updates=updates,
                steps=log.steps,
            )
        rest = [n for n in log.norms if n not in frozen and n.thawed.updates]
        if rest:
            held = f"held in evaluation mode for {count(rest[0].held, 'step')} of training, then train() undid it"
            yield self._found(rest, held, "thawed")

    def _found(self, norms: list[LoopNorm], what: str, kind: str, also: str = "") -> Finding:
        norm = max(norms, key=lambda n: getattr(n, kind).updates)
        episodes = getattr(norm, kind)
        paths = tuple(site(n.path) for n in norms)
        return self.found(
            "warning",
            f"{some(paths)}: {what}, {count(episodes.updates, 'update')} since step {episodes.first}"
            f"{_where(episodes.lines)}{also}",
            paths,
            fix=_fix(paths),
            updates=episodes.updates,
            first_step=episodes.first,
            last_step=episodes.last,
        )

    def bad(self) -> Case:
        """A frozen backbone in training mode."""
        return Case(loop=lambda watch: _fine_tune(watch, undone=True))

    def good(self) -> Case:
        """Held in evaluation mode."""
        return Case(loop=lambda watch: _fine_tune(watch, undone=False))


def _never_trained(norm: LoopNorm, log: LoopLog) -> bool:
    """Whether it sits behind a no_grad() in most of the steps and learns nothing but statistics."""
    return not norm.updates and log.steps >= _STEPS and 2 * norm.gradless_steps >= log.steps


def _is_left_out(norm: LoopNorm) -> bool:
    """Whether it is trained by nobody for more than a few steps: the optimizer that holds it may be yet to come."""
    return norm.left_out and sum(norm.per_step.values()) + norm.foreign >= _STEPS


def _where(lines: tuple[Line, ...]) -> str:
    return f", from {lines[0]}" if lines else ""


def _fix(paths: tuple[str, ...]) -> Fix:
    return Fix("swap", "freeze the statistics too", paths, {"to": "frozen", "only": paths}, Safety.EXACT)


def _fine_tune(watch: Any, undone: bool) -> Any:
    import torch
    from torch import nn

    backbone, head = net(), nn.Linear(4, 2)
    backbone.requires_grad_(False).eval()
    model = nn.Sequential(backbone, head)
    optimizer = torch.optim.SGD(head.parameters(), 0.05)
    with watch(model, optimizer) as w:
        for _ in range(4):
            model.train()  # as a training library does
            backbone.train(undone)
            step(optimizer, model(batch()))
    return w.report()
