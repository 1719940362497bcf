"""A guard around a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from bnfix.api.asked import check_model

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from bnfix.loop import Watch
    from bnfix.types import Diagnosis, Evidence


def watch(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    strict: bool = False,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Watch:
    """Watch the norms of ``model`` while it is trained: changes nothing, and leaves nothing behind.

    ::

        with bnfix.watch(model, optimizer) as w:
            train()
        print(w.report())

    Each batch norm gets a hook in front of its forward that counts; in some of the steps (the first 16, then every
    16th) the moments of each batch are read off the running statistics. The loop stays plain PyTorch.

    Args:
        model: what is trained; DDP and ``torch.compile`` wrappers may be around it (give the wrapper: what it does is
            looked at too). Inside a compiled graph updates are counted, not seen; the report says so.
        optimizer: one or several. Steps of all optimizers are heard of without it too; with it the report says so
            where none of them holds parameters of the model.
        strict: raise at the first error instead of only reporting it, at the line of the loop that does it.
        select: codes of the rules that are wanted (``BN4``); all of them by default.
        ignore: codes that are not.
        options: thresholds by code, as in ``[tool.bnfix]``.

    Returns:
        A context manager. ``report()`` is the :class:`bnfix.Diagnosis`, behind the block as inside it; ``log`` what it
        was judged by; ``expected("calibration")`` a context for updates that are wanted.

    Raises:
        TypeError: ``model`` is no module, or ``optimizer`` no optimizer.
        ValueError: a code that fits no rule.
        WatchError: with ``strict``, from inside the loop or at the end of the block.
    """
    from bnfix import rules
    from bnfix.loop import Watch

    check_model(model)
    chosen = rules.Selection(tuple(select), tuple(ignore), loop=True)
    if unknown := chosen.unknown():
        raise ValueError(f"no rule is called {', '.join(unknown)}")
    thresholds = dict(options or {})

    def judge(evidence: Evidence) -> Diagnosis:
        from dataclasses import replace

        return rules.judge(replace(evidence, options=thresholds), chosen)

    given = list(optimizer) if isinstance(optimizer, Iterable) else optimizer
    return Watch(model, given, judge=judge, strict=strict)
