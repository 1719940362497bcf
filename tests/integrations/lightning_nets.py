"""A module, its data and a fit, for tests of the Lightning callback."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from calibration.calib_nets import residual
from torch import Tensor, nn


class Module(pl.LightningModule):  # type: ignore[misc]
    """A net with norms; ``momentum`` so low that the running statistics hardly leave their initial values."""

    def __init__(self, momentum: float = 1e-3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(16, 8), nn.BatchNorm1d(8, momentum=momentum), nn.ReLU(), nn.Linear(8, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, _index: int) -> Tensor:
        x, y = batch
        return (self(x).squeeze(1) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


def loader(shuffle: bool = True) -> torch.utils.data.DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=generator) * 3 + 5
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1)), batch_size=16, shuffle=shuffle)


def fit(module: Module, callbacks: list[Any], where: Path, epochs: int = 3, data: Any = None, **options: Any) -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = options.pop("trainer", pl.Trainer)(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=where, callbacks=callbacks, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data if data is not None else loader())
    return trainer


def far(module: Module) -> float:
    """The residual of the module as it stands, by plain forwards and hooks of the test's own."""
    return float(max(residual(module.net.eval(), [x for x, _ in loader(shuffle=False)])))
