"""Small training loops for the examples of rules; torch is imported inside."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_CHILD = """
import pickle, sys
from importlib import import_module
import torch.distributed as dist
import bnfix
folder, module, function, rank, world = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=int(world))
report = getattr(import_module(module), function)(bnfix.watch)
with open(f"{folder}/report{rank}", "wb") as file:
    pickle.dump(report, file)
dist.barrier()
dist.destroy_process_group()
"""


def net(width: int = 8) -> nn.Sequential:
    """Two layers and a norm between them, for inputs with 8 features."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))


def sgd(*modules: nn.Module) -> Optimizer:
    """An optimizer for all of them."""
    import torch

    return torch.optim.SGD([p for m in modules for p in m.parameters()], 0.05)


def batch(n: int = 32, shift: float = 0.0) -> Tensor:
    """Noise, (n, 8), with this mean."""
    import torch

    return torch.randn(n, 8) + shift


def step(optimizer: Optimizer, *outputs: Tensor) -> None:
    """One optimizer step on some loss of these outputs."""
    optimizer.zero_grad()
    loss: Any = sum(o.square().mean() for o in outputs)
    loss.backward()
    optimizer.step()


def on_ranks(function: Callable[[Any], Any], world: int = 2) -> list[Any]:
    """``function(bnfix.watch)`` in several processes of one gloo group; what each of them returns, by rank.

    Raises:
        RuntimeError: one of them failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = function.__module__, function.__qualname__
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", _CHILD, folder, *name, str(rank), str(world)],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=120)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        if any(process.returncode for process in started):
            raise RuntimeError("\n".join(said))
        return [pickle.loads((Path(folder) / f"report{rank}").read_bytes()) for rank in range(world)]
