"""Forwards that remember earlier ones: what a norm sees depends on what ran before, on a counter or a first call.

There is no fixed point of samples for them, only that of a pass: the batches in this order, from the state in which
the model is. Where a first run changed something that might be remembered, a second one shows whether it matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bnfix.calibration.ambient import Turn
from bnfix.calibration.chunks import Chunk
from bnfix.calibration.ledger import Place
from bnfix.calibration.plain import listen
from bnfix.calibration.session import Session
from bnfix.errors import CalibrationError
from bnfix.running import kept_random
from bnfix.stats import SampleSums

RESET = "where it is to start afresh with each batch:  forward=lambda m, b: (m.reset(), m(b))[1]"
_NEAR, _ROUNDING = 1e-3, 1e-6
"""What kernels of an accelerator, and sums of threads in any order, may differ by in two runs: of the largest value."""


def look_for_memory(session: Session, chunk: Chunk, ran: nn.Module, others: Chunk | None = None) -> None:
    """See whether the forward of ``chunk``, which has just run on ``ran``, remembers; set ``session.remembers``.

    It is run twice, and once more behind ``others``: what only a first batch sets shows there.

    Args:
        session: untouched but for that run.
        chunk: a few samples.
        ran: the model, or a replica of it.
        others: other samples, if there are any.
    """
    changed = session.changed(ran)
    if not changed:
        return
    session.remembers = changed[0]  # so that all is rewound
    session.rewind()
    try:
        with kept_random():
            turn = Turn.now(session.device)
            runs = []
            for which in (chunk, chunk, others, chunk):
                if which is others:
                    session.rewind()
                if which is not None:
                    Turn.seeded(turn, 0, session.device).put_all(session.device)
                    runs.append(listen(session.model, which, session.norms)[0])
            turn.put(session.device)
        near = _ROUNDING if session.device.type == "cpu" else _NEAR
        matters = not (alike(runs[0], runs[1], near=near) and alike(runs[0], runs[-1], near=near))
    except (CalibrationError, MemoryError, RuntimeError):  # RuntimeError: no memory
        matters = True  # nobody knows; what else fails will fail again, and be told
    finally:
        session.rewind()
    if matters:
        session.advice = f"it keeps {session.remembers} from call to call; {RESET}"
    else:
        session.remembers = ""


def alike(a: Mapping[Place, SampleSums], b: Mapping[Place, SampleSums], *, near: float = 0.0) -> bool:
    """Whether norms saw the same in two runs of one chunk, up to ``near`` of the largest value."""
    return a.keys() == b.keys() and all(_same(a[p].s, b[p].s, near) and _same(a[p].q, b[p].q, near) for p in a)


def _same(a: Any, b: Any, near: float) -> bool:
    if not near or a.shape != b.shape or not a.numel():
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= near * a.abs().max())
