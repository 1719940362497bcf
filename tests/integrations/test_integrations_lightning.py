"""The Lightning callback, against the real library."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pl = pytest.importorskip("lightning.pytorch")

from calibration.calib_nets import residual  # noqa: E402

from bnfix.errors import CalibrationError  # noqa: E402
from bnfix.integrations.lightning import RecalibrateCallback  # noqa: E402


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
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
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
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


def test_statistics_are_the_fixed_point_at_the_end_of_a_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = RecalibrateCallback(loader(shuffle=False), when="always")
    module = Module()
    fit(module, [callback], tmp_path)
    assert callback.report is not None
    assert callback.report.changed
    assert callback.report.n == 96
    assert far(module) < 1e-5  # float32; without the callback about 1 (the next test)


def test_without_the_callback_they_are_far_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Module()
    fit(module, [], tmp_path)
    assert far(module) > 0.5


def test_the_trainers_own_data_are_the_default(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = RecalibrateCallback(when="always")
    module = Module()
    fit(module, [callback], tmp_path)
    assert callback.report is not None
    assert "element 0 of 2" in callback.report.used
    assert far(module) < 1e-5  # shuffled, but the same samples


@pytest.mark.parametrize("order", ["before", "behind"])
def test_averaged_weights_get_statistics_of_their_own(tmp_path: Path, order: str) -> None:
    torch.manual_seed(0)
    callback = RecalibrateCallback(loader(shuffle=False), when="always")
    averaging = pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    module = Module()
    fit(module, [callback, averaging] if order == "before" else [averaging, callback], tmp_path, epochs=4)
    assert far(module) < 1e-5


def test_weight_averaging_too(tmp_path: Path) -> None:
    averaging = getattr(pl.callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    torch.manual_seed(0)
    module = Module()
    fit(module, [averaging(), RecalibrateCallback(loader(shuffle=False), when="always")], tmp_path)
    assert far(module) < 1e-5


def test_needed_changes_what_is_stale_and_leaves_what_is_healthy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stale, healthy = RecalibrateCallback(loader(shuffle=False)), RecalibrateCallback(loader(shuffle=False))
    fit(Module(momentum=1e-3), [stale], tmp_path)
    module = Module(momentum=0.3)
    fit(module, [healthy], tmp_path, epochs=20)
    assert stale.report is not None
    assert stale.report.changed
    assert healthy.report is not None
    assert not healthy.report.changed
    assert healthy.report.output_change is not None
    assert healthy.report.output_change < 0.35


def test_the_trained_weights_and_modes_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, calibrated = Module(), Module()
    calibrated.load_state_dict(plain.state_dict())
    for module, callbacks in ((plain, []), (calibrated, [RecalibrateCallback(loader(False), when="always")])):
        torch.manual_seed(1)
        fit(module, callbacks, tmp_path)
    for (name, a), b in zip(plain.named_parameters(), calibrated.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [m.training for m in plain.modules()] == [m.training for m in calibrated.modules()]


def test_a_loader_that_raises_leaves_the_trained_module(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from (batch for i, batch in enumerate(loader()) if i < 3)
        raise OSError("disk gone")

    torch.manual_seed(0)
    module, twin = Module(), Module()
    twin.load_state_dict(module.state_dict())
    torch.manual_seed(1)
    fit(twin, [], tmp_path)
    torch.manual_seed(1)
    with pytest.raises(CalibrationError, match=r"after batch 2.*disk gone"):
        fit(module, [RecalibrateCallback(broken(), when="always")], tmp_path)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_mixed_precision_is_that_of_the_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Module()
    fit(module, [RecalibrateCallback(loader(False), when="always")], tmp_path, precision="bf16-mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = far(module)
    assert in_autocast < 1e-2  # chunks of another size round bf16 otherwise
    assert far(module) > in_autocast  # float32 has other statistics
