"""What others offer for the same job, each behind one signature: ``run(model, batches)``, in place.

``torch.optim.swa_utils.update_bn`` comes with torch. fvcore and AIMET are no dependencies of bnfix, not even of its
tests: fvcore pulls in seven packages and AIMET half a gigabyte. Where they are installed (``pip install fvcore
aimet-torch``) tests and benchmarks run them too, else they say that they are absent.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Run = Callable[[nn.Module, list[Any]], None]


def update_bn(model: nn.Module, batches: list[Any]) -> None:
    """torch's: puts all of the model into training mode itself, and puts the modes back."""
    torch.optim.swa_utils.update_bn(batches, model)


def fvcore(model: nn.Module, batches: list[Any]) -> None:
    """fvcore's precise BN: treats the norms that are in training mode; the mode of all others is the caller's."""
    stats = importlib.import_module("fvcore.nn.precise_bn")
    stats.update_bn_stats(model, batches, num_iters=len(batches))


def aimet(model: nn.Module, batches: list[Any]) -> None:
    """AIMET's re-estimation over all batches: by itself it stops after 100."""
    aimet_torch = importlib.import_module("aimet_torch.bn_reestimation")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # a progress bar
        aimet_torch.reestimate_bn_stats(model, batches, num_batches=len(batches))


PEERS: dict[str, tuple[Run, str]] = {
    "update_bn": (update_bn, "torch"),
    "fvcore": (fvcore, "fvcore"),
    "AIMET": (aimet, "aimet_torch"),
}
"""By name: how to run it, and the package that it needs."""


def present() -> dict[str, Run]:
    """The peers that can run here."""
    return {name: run for name, (run, package) in PEERS.items() if importlib.util.find_spec(package)}


def absent() -> str:
    """A sentence for the foot of a table: which peers are not installed; empty if all are."""
    missing = [name for name in PEERS if name not in present()]
    return f"Not installed: {', '.join(missing)}. " if missing else ""
