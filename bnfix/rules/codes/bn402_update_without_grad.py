from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, sgd, step
from bnfix.rules.loop_sites import MEANS, SPREADS, beyond_noise, not_seen
from bnfix.rules.reading import count, site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Episodes, Evidence, Finding, Fix, LoopLog, LoopNorm, Severity, Skipped

_FIX = Fix(
    "code",
    "model.eval() before such forwards and model.train() after; where the updates are wanted: with w.expected('…')",
)


class UpdateWithoutGrad(Rule):
    """Statistics learn from forwards that train nothing: `eval()` forgotten.

    ## What it does

    Looks for norms that are trained and, now and then, run in training mode without gradients (or with gradients that
    nobody takes), after which training goes on: a validation loop without `model.eval()`. Forwards without gradient
    that belong to every step (pseudo labels, a teacher's targets on the same network) are found where their data differ
    from the training data's.

    ## Why is this bad

    `torch.no_grad()` stops gradients, not running statistics: those are changed by `forward()`. So they learn from
    validation data, and the validation itself is normalised by its own batches: its figures depend on the batch size
    and on the order of the samples.

    ## Example

    ```python
    with torch.no_grad():  # bad: the model is still in training mode
        validate(model, val_loader)

    model.eval()  # good
    with torch.no_grad():
        validate(model, val_loader)
    model.train()
    ```

    What is left alone: teachers that are never trained by gradient (MoCo, BYOL, mean teacher), runs that are followed
    by an evaluation before training goes on (schedule-free warm-up, AdaBN), `update_bn` and whatever else resets the
    statistics or changes the momentum for the purpose, `bnfix.recalibrate`, the first forwards in front of training,
    and everything inside `with w.expected("calibration"):`. With several optimizers that take turns (a GAN that draws
    samples while it is trained) it is information.

    ## Fix

    Only your own code can do it: `model.eval()` and `model.train()`. The statistics heal as training goes on.
    """

    code = "BN402"
    name = "update-without-grad"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for each way in which it happens."""
        log: LoopLog = evidence.loop
        yield from not_seen(self.code, log)
        means, spreads = self.option(evidence, "means", MEANS), self.option(evidence, "spreads", SPREADS)
        trained = [n for n in log.norms if n.updates]
        now_and_then = [n for n in trained if _occasional(n.resumed)]
        if now_and_then:
            yield self._found(now_and_then, "resumed", "without gradient")
        given_up = [n for n in trained if _occasional(n.abandoned) and n not in now_and_then]
        if given_up:
            yield self._found(given_up, "abandoned", "with gradients that nobody took")
        left = [n for n in trained if n not in now_and_then and n not in given_up]
        other_data = [n for n in left if n.in_step is not None and any(beyond_noise(n.in_step, means, spreads))]
        if other_data:
            yield self._other_data(other_data, means, spreads)
        last = [n for n in left if n.trailing > 1 and n not in other_data and not n.resumed.times]
        if last:
            lines = _where(last[0].gradless_lines)
            yield self.found(
                "info",
                f"{_names(last)}: the last {last[0].trailing} updates came without gradient{lines}, and nothing came "
                "after: validation without eval()? A calibration is declared by w.expected('calibration')",
                _paths(last),
                fix=_FIX,
                updates=last[0].trailing,
            )

    def _found(self, norms: list[LoopNorm], kind: str, how: str) -> Finding:
        norm = max(norms, key=lambda n: getattr(n, kind).updates)
        episodes: Episodes = getattr(norm, kind)
        updates = episodes.updates + (norm.trailing if kind == "resumed" else 0)
        severity: Severity = "info" if updates < 2 or all(n.adversarial for n in norms) else "warning"
        return self.found(
            severity,
            f"{_names(norms)}: {updates} updates {how}, in {count(episodes.times, 'run')} in training mode between "
            f"training steps, since step {episodes.first}{_where(episodes.lines)}: eval() forgotten?",
            _paths(norms),
            fix=_FIX,
            updates=updates,
            runs=episodes.times,
            first_step=episodes.first,
            last_step=episodes.last,
            steps=episodes.of,
        )

    def _other_data(self, norms: list[LoopNorm], means: float, spreads: float) -> Finding:
        pairs = [n.in_step for n in norms if n.in_step is not None]
        worst = max(pairs, key=lambda p: max(p.shift, p.ratio))
        severity: Severity = "info" if all(n.adversarial for n in norms) else "warning"
        return self.found(
            severity,
            f"{_names(norms)}: in every step there are forwards without gradient, in training mode, on data that "
            f"differ from those of training, d = {worst.shift:.2f} (limit {means:g}), l = {worst.ratio:.2f} "
            f"({spreads:g}), over {worst.batches} steps{_where(norms[0].gradless_lines)}",
            _paths(norms),
            fix=_FIX,
            shift=worst.shift,
            ratio=worst.ratio,
            batches=worst.batches,
            updates=norms[0].resumed.updates,
            first_step=norms[0].resumed.first,
        )

    def bad(self) -> Case:
        """Validation without eval()."""
        return Case(loop=lambda watch: _epochs(watch, forgotten=True))

    def good(self) -> Case:
        """With it."""
        return Case(loop=lambda watch: _epochs(watch, forgotten=False))


def _occasional(episodes: Episodes) -> bool:
    """Whether it came up in no more than half of the steps: what every step does is part of the method."""
    return episodes.times > 0 and 2 * episodes.times <= episodes.of


def _paths(norms: list[LoopNorm]) -> tuple[str, ...]:
    return tuple(site(n.path) for n in norms)


def _names(norms: list[LoopNorm]) -> str:
    return some(_paths(norms))


def _where(lines: tuple[Any, ...]) -> str:
    return f", from {lines[0]}" if lines else ""


def _epochs(watch: Any, forgotten: bool) -> Any:
    import torch

    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            for _ in range(4):
                step(optimizer, model(batch()))
            model.train(forgotten)
            with torch.no_grad():
                for _ in range(3):
                    model(batch())
    return w.report()
