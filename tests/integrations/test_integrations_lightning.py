"""The Lightning callback, against the real library."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pl = pytest.importorskip("lightning.pytorch")

from calibration.calib_nets import residual  # noqa: E402
from integrations.lightning_nets import Module, far, fit, loader  # noqa: E402

from bnfix.errors import CalibrationError  # noqa: E402
from bnfix.integrations.lightning import RecalibrateCallback  # noqa: E402

ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[n]) for n in (1, 2)),
}


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


def test_a_loader_that_raises_does_not_cost_the_training(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from (batch for i, batch in enumerate(loader()) if i < 3)
        raise OSError("disk gone")

    torch.manual_seed(0)
    module, twin = Module(), Module()
    twin.load_state_dict(module.state_dict())
    torch.manual_seed(1)
    fit(twin, [], tmp_path)
    torch.manual_seed(1)
    callback = RecalibrateCallback(broken(), when="always")
    trainer = fit(module, [callback], tmp_path)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert [m.training for m in module.modules()] == [m.training for m in twin.modules()]
    assert module.trainer is trainer
    assert callback.report is None
    assert isinstance(callback.error, CalibrationError)
    assert "after batch 2: OSError: disk gone" in callback.error.message


def test_a_failure_is_said(tmp_path: Path) -> None:
    callback = RecalibrateCallback([], when="always")
    trainer = fit(Module(), [], tmp_path)
    with pytest.warns(UserWarning, match="not recalibrated, the module is as training left it: the data holds no"):
        callback.on_train_end(trainer, trainer.lightning_module)


def test_the_outcome_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = RecalibrateCallback(loader(False), when="always")
    with caplog.at_level(logging.INFO):
        trainer = fit(Module(), [], tmp_path)
        logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
        callback.on_train_end(trainer, trainer.lightning_module)
    (line,) = [r.getMessage() for r in caplog.records if "bnfix" in r.getMessage()]
    assert line.startswith("bnfix: recalibrated 2 of 2 norms on 96 samples")


@pytest.mark.parametrize("order", ["before", "behind"])
def test_the_average_that_is_validated_and_saved_has_them_too(tmp_path: Path, order: str) -> None:
    """``WeightAveraging`` swaps its own copy in to validate, and saves that one, after the fit too."""
    averaging = getattr(pl.callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    torch.manual_seed(0)

    class Validated(Module):
        def validation_step(self, batch: Any, _index: int) -> None:
            self.validated = far(self)

    callbacks = [averaging(decay=0.9), RecalibrateCallback(loader(False), when="always")]
    module = Validated()
    trainer = fit(module, callbacks if order == "behind" else callbacks[::-1], tmp_path)
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    saved = Module()
    saved.load_state_dict(torch.load(tmp_path / "final.ckpt", weights_only=False)["state_dict"])
    assert far(saved) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(module, [torch.zeros(1)], verbose=False)
    assert module.validated < 1e-5


def test_nothing_but_the_modules_own_norms_is_looked_at(tmp_path: Path) -> None:
    """The trainer hangs on the module, and everything on the trainer: the copies of averaging callbacks, the data."""
    torch.manual_seed(0)
    callback = RecalibrateCallback(when="always")
    fit(Module(), [pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1), callback], tmp_path, epochs=4)
    assert callback.report is not None
    assert {layer.site for layer in callback.report.layers} == {"net.1", "net.5"}
    assert callback.report.never_called == ()


def test_a_forward_that_asks_the_trainer(tmp_path: Path) -> None:
    class Asking(Module):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if self.trainer.global_step > 0 else 0)

    callback = RecalibrateCallback(loader(False), when="always")
    module = Asking()
    trainer = fit(module, [callback], tmp_path)
    assert callback.error is None
    assert callback.report is not None
    assert module.trainer is trainer


def test_batches_come_through_the_modules_own_hooks(tmp_path: Path) -> None:
    class Moving(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + (100 if self.trainer.training else 0), batch[1]]

    torch.manual_seed(0)
    callback = RecalibrateCallback(when="always")
    module = Moving()
    fit(module, [callback], tmp_path)
    assert max(residual(module.net.eval(), [x + 100 for x, _ in loader(shuffle=False)])) < 1e-4  # 100 is 33 σ


def test_as_many_batches_as_an_epoch_has(tmp_path: Path) -> None:
    for options, samples in (({"limit_train_batches": 4}, 64), ({"fast_dev_run": 2}, 32)):
        callback = RecalibrateCallback(when="always")
        fit(Module(), [callback], tmp_path, **options)
        assert callback.report is not None
        assert callback.report.n == samples
        assert callback.report.method == "staged"
    callback = RecalibrateCallback(when="always", max_samples=50)
    fit(Module(), [callback], tmp_path)
    assert callback.report is not None
    assert callback.report.n == 50


def test_data_may_be_made_at_the_end(tmp_path: Path) -> None:
    made: list[Any] = []

    def make(trainer: Any) -> Any:
        made.append(trainer)
        return loader(shuffle=False)

    callback = RecalibrateCallback(make, when="always")
    trainer = fit(Module(), [callback], tmp_path)
    assert made == [trainer]
    assert callback.report is not None
    assert callback.report.n == 96


def test_several_loaders_ask_for_data(tmp_path: Path) -> None:
    class Two(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch["a"], index)

    callback = RecalibrateCallback(when="always")
    fit(Two(), [callback], tmp_path, data={"a": loader(), "b": loader()})
    assert "2 training dataloaders" in str(callback.error)
    assert "RecalibrateCallback(data=loader)" in str(callback.error)


def test_at_fit_end_it_is_behind_the_modules_own_hook(tmp_path: Path) -> None:
    class Halving(Module):
        def on_train_end(self) -> None:
            with torch.no_grad():
                self.net[0].weight.mul_(0.5)

    for at, exact in (("train_end", False), ("fit_end", True)):
        torch.manual_seed(0)
        module = Halving()
        fit(module, [RecalibrateCallback(loader(False), when="always", at=at)], tmp_path)  # type: ignore[arg-type]
        assert (far(module) < 1e-5) is exact


def test_frozen_norms_stay(tmp_path: Path) -> None:
    class Frozen(Module):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    torch.manual_seed(0)
    callback = RecalibrateCallback(loader(False), when="always")
    module = Frozen()
    fit(module, [callback], tmp_path)
    assert callback.report is not None
    assert callback.report.frozen == ("net.1",)
    assert torch.equal(module.net[1].running_mean, torch.zeros(16))  # type: ignore[arg-type]


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    callback = RecalibrateCallback([], when="always")
    fit(Module(), [callback], tmp_path)
    assert callback.error is not None
    callback.data = loader(False)
    fit(Module(), [callback], tmp_path)
    assert callback.error is None
    assert callback.report is not None


class NoForward(Module):
    forward = pl.LightningModule.forward

    def training_step(self, batch: Any, _index: int) -> Tensor:
        found: Tensor = self.net(batch[0]).square().mean()
        return found


def test_what_can_only_fail_is_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="methd"):
        RecalibrateCallback(methd="staged")
    with pytest.raises(ValueError, match="'train_end' or 'fit_end'"):
        RecalibrateCallback(at="epoch_end")  # type: ignore[arg-type]
    module = NoForward()
    with pytest.raises(ValueError, match="NoForward has no forward of its own"):
        fit(module, [RecalibrateCallback()], tmp_path)
    assert module.net[0].weight.grad is None
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match="sharded"):
        RecalibrateCallback().setup(trainer, Module(), "fit")


def test_a_forward_may_be_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = NoForward()
    callback = RecalibrateCallback(loader(False), when="always", forward=lambda m, batch: m.net(batch[0]))
    fit(module, [callback], tmp_path)
    assert far(module) < 1e-5


def test_mixed_precision_is_that_of_the_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Module()
    fit(module, [RecalibrateCallback(loader(False), when="always")], tmp_path, precision="bf16-mixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = far(module)
    assert in_autocast < 1e-2  # chunks of another size round bf16 otherwise
    assert far(module) > in_autocast  # float32 has other statistics


def test_the_library_under_its_other_name(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Module().net

        forward, training_step = Module.forward, Module.training_step
        configure_optimizers = Module.configure_optimizers

    torch.manual_seed(0)
    module: Any = Other()
    callback = RecalibrateCallback(loader(False), when="always")
    averaging = other.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    fit(module, [callback, averaging], tmp_path, epochs=4, trainer=other.Trainer)
    assert callback.error is None
    assert far(module) < 1e-5


def test_without_the_library_the_extra_is_named() -> None:
    code = (
        "import sys\n"
        "for name in ('lightning', 'lightning.pytorch', 'pytorch_lightning'): sys.modules[name] = None\n"
        "import bnfix.integrations\n"
        "from bnfix.errors import MissingDependencyError\n"
        "try: import bnfix.integrations.lightning\n"
        "except MissingDependencyError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENV).stdout
    assert "the Lightning callback needs lightning" in said
    assert "pip install 'bnfix[lightning]'" in said


def test_every_rank_of_ddp_has_the_statistics_of_all(tmp_path: Path) -> None:
    """Two processes, each with its half of the training data; the script forks them."""
    script = Path(__file__).with_name("lightning_ddp.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env=ENV, timeout=300)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert (first["ranks"], first["n"]) == (second["ranks"], second["n"]) == (2, 96)
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    module = Module()
    module.load_state_dict(first["state"])
    assert far(module) < 1e-5
    assert first["failed"] == "the data raised at its first batch: OSError: disk gone"
    assert "rank 0 of 2 failed" in second["failed"]
