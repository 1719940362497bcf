from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, step
from bnfix.rules.loop_sites import not_seen
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Line, LoopLog, LoopNorm, Safety, Skipped


class FrozenButUpdating(Rule):
    """A norm that is meant to be frozen still learns statistics.

    ## What it does

    Looks for norms none of whose parameters asks for a gradient and whose running statistics change all the same,
    because they are in training mode; for norms behind a `torch.no_grad()` in every step, which is another way to
    freeze; and for norms that were held in evaluation mode while the model trained, until
    somebody's `model.train()` undid it.

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
        """One finding for frozen norms, one for those whose eval() was undone."""
        log: LoopLog = evidence.loop
        yield from not_seen(self.code, log)
        # What is written from outside is a teacher; a copy of a trained part may be one whose time has not come.
        own = [n for n in log.norms if not n.written and not n.twin]
        frozen = [n for n in own if n.frozen.updates]
        if frozen:
            undone = [n for n in frozen if n.held_at_start or n.held]
            also = f"; {len(undone)} of them had been in evaluation mode, train() undid it" if undone else ""
            yield self._found(frozen, f"has no parameter that is trained, but learned statistics{also}", "frozen")
        idle = [n for n in own if n not in frozen and _never_trained(n, log)]
        if idle:
            norm, paths = idle[0], tuple(n.path for n in idle)
            yield self.found(
                "warning",
                f"{_names(paths)} runs without gradient in every step, nobody writes its weights, and it learns "
                f"statistics in training mode: {norm.without_grad} updates in {norm.gradless_steps} of "
                f"{log.steps} steps{_where(norm.gradless_lines)}",
                paths,
                fix=_fix(paths),
                updates=norm.without_grad,
                steps=norm.gradless_steps,
            )
        rest = [n for n in log.norms if n not in frozen and n.thawed.times]
        if rest:
            held = rest[0].held
            how = f"was held in evaluation mode for {held} steps of training, then train() undid it, and it learned"
            yield self._found(rest, f"{how} statistics", "thawed")

    def _found(self, norms: list[LoopNorm], what: str, kind: str) -> Finding:
        norm = max(norms, key=lambda n: getattr(n, kind).updates)
        episodes = getattr(norm, kind)
        paths = tuple(n.path for n in norms)
        return self.found(
            "warning",
            f"{_names(paths)} {what}: {episodes.updates} updates since step {episodes.first}{_where(episodes.lines)}",
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
    return not norm.updates and log.steps >= 4 and 2 * norm.gradless_steps >= log.steps


def _names(paths: tuple[str, ...]) -> str:
    return f"{paths[0] or '(root)'}{f' (and {len(paths) - 1} more norms)' if len(paths) > 1 else ''}"


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
