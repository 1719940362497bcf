"""A guard around a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

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
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    per_layer_ignores: Mapping[str, str | Iterable[str]] | None = None,
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
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
        select, ignore, per_layer_ignores, thresholds: as for :func:`bnfix.check`.

    Returns:
        A context manager. ``report()`` is the :class:`bnfix.Diagnosis`, behind the block as inside it; ``log`` what it
        was judged by; ``expected("calibration")`` a context for updates that are wanted.

    Raises:
        TypeError: ``model`` is no module, or ``optimizer`` no optimizer.
        ValueError: a code or a threshold that there is not; names those that are near.
        WatchError: with ``strict``, from inside the loop or at the end of the block.
    """
    from dataclasses import replace

    from bnfix import rules
    from bnfix.api.checking import _asked
    from bnfix.api.fixing import python_line, with_lines
    from bnfix.loop import Watch

    check_model(model)
    selection, limits = _asked(select, ignore, per_layer_ignores or {}, thresholds or {})
    chosen = replace(selection, loop=True)

    def judge(evidence: Evidence) -> Diagnosis:
        found = rules.judge(replace(evidence, options=limits), chosen)
        return with_lines(found, lambda _, fix: python_line(fix))

    given = list(optimizer) if isinstance(optimizer, Iterable) else optimizer
    return Watch(model, given, judge=judge, strict=strict)
