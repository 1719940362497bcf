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

import bnfix  # noqa: E402
from bnfix.errors import CalibrationError  # noqa: E402
from bnfix.integrations.lightning import RecalibrateCallback  # noqa: E402

ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[n]) for n in (1, 2)),
}


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the callback warns of; ``fit`` silences warnings."""
    texts: list[str] = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_warn", texts.append)
    return texts


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
    first, second = (torch.load(tmp_path / f"bad-worse-good-{n}.pt", weights_only=False) for n in (0, 1))
    assert first["ranks"]["good"] == second["ranks"]["good"] == (2, 96)
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    module = Module()
    module.load_state_dict(first["state"])
    assert far(module) < 1e-5
    assert first["errors"]["bad"] == "the data raised at its first batch: OSError: disk gone"
    assert "rank 0 of 2 failed" in second["errors"]["bad"]
    # A data function that raises on one rank only: none hangs, all keep an error (B2).
    assert second["errors"]["worse"] == "the data function raised FileNotFoundError: rank1.npy"
    assert "rank 1 of 2 failed" in first["errors"]["worse"]
    assert "the data function raised FileNotFoundError: rank1.npy" in first["errors"]["worse"]
    # What one rank's training_step does to its batches keeps all from being recalibrated (A1).
    first, second = (torch.load(tmp_path / f"unlike-{n}.pt", weights_only=False) for n in (0, 1))
    assert first["ranks"]["unlike"] is second["ranks"]["unlike"] is None
    assert second["errors"]["unlike"].startswith(UNLIKE)
    assert first["errors"]["unlike"].startswith("rank 1 of 2 failed")
    assert UNLIKE in first["errors"]["unlike"]


UNLIKE = "training_step feeds the network with something else than the batches as they come: in the first one net.1 saw"


class Prepared(Module):
    """What comes to ``training_step`` is not what the network is trained on."""

    prepare: Any = staticmethod(lambda x: (x - 5) / 30)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step((self.prepare(batch[0]), batch[1]), index)


def with_and_without(module: Module, callback: Any, where: Path, given: Any = None, **options: Any) -> Module:
    """Trains ``module`` with the callback, and a twin of it without."""
    twin = type(module)()
    twin.load_state_dict(module.state_dict())
    for each, callbacks in ((twin, []), (module if given is None else given, [callback])):
        torch.manual_seed(1)
        fit(each, callbacks, where, **options)
    return twin


def differing(module: Module, twin: Module) -> set[str]:
    return {name for name, value in twin.state_dict().items() if not torch.equal(value, module.state_dict()[name])}


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("plain", {}),
        ("plain", {"fast_dev_run": True}),
        ("plain", {"precision": "bf16-mixed"}),
        ("plain", {"accumulate_grad_batches": 4}),
        ("compiled", {}),
        ("compiled inside", {}),
    ],
)
def test_a1_what_training_step_does_to_its_batches_is_found_out(
    tmp_path: Path, warned: list[str], way: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    callback, module = RecalibrateCallback(when="always"), Prepared()
    if way == "compiled inside":
        module.net.compile(backend="eager")
    given = torch.compile(module, backend="eager") if way == "compiled" else None
    twin = with_and_without(module, callback, tmp_path, given, **options)
    assert differing(module, twin) == set()
    assert callback.report is None
    assert isinstance(callback.error, CalibrationError)
    assert callback.error.message.startswith(UNLIKE)
    assert "variances 0.0011 times as large" in callback.error.message  # 1/30², eps is little beside it
    assert callback.error.hint is not None
    assert callback.error.hint.splitlines() == [
        "bnfix called forward with element 0 of 2 (element 1, 16 float32, was left out)",
        "do to a batch what training_step does:  RecalibrateCallback(forward=lambda m, b: m(m.prepare(b[0])))",
        "or pass a loader whose batches are prepared:  RecalibrateCallback(loader)",
    ]
    first, last = warned
    assert first.startswith(f"bnfix: this fit will not be recalibrated: {UNLIKE}")
    assert last.startswith(f"bnfix: not recalibrated, the module is as training left it: {UNLIKE}")


def test_a1_either_remedy_that_the_hint_names_is_one(tmp_path: Path, warned: list[str]) -> None:
    prepared = [Prepared.prepare(x) for x, _ in loader(shuffle=False)]
    for callback in (
        RecalibrateCallback(when="always", forward=lambda m, b: m(m.prepare(b[0]))),
        RecalibrateCallback(prepared, when="always"),
    ):
        torch.manual_seed(0)
        module = Prepared()
        fit(module, [callback], tmp_path)
        assert callback.error is None
        assert max(residual(module.net.eval(), prepared)) < 1e-5
    assert warned == []


class Siamese(Module):
    """Two calls a step: one of them is what bnfix feeds."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step((batch[0] * 20, batch[1]), index) + super().training_step(batch, index)


class Drawing(Module):
    """Dropout in front of the first norm, with other random numbers than in bnfix's look, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(0, torch.nn.Dropout(0.8))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x = batch[0] + torch.randn_like(batch[0])  # a third of its standard deviation
        return super().training_step((x, batch[1]), index)


class Switching(Module):
    """Prepares in forward what is evaluated, and in training_step what is trained on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.training else x / 30)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step((batch[0] / 30, batch[1]), index)


@pytest.mark.parametrize("kind", [Module, Siamese, Drawing, Switching])
@pytest.mark.parametrize("way", ["plain", "bf16-mixed", "compiled"])
def test_a1_no_false_alarm_and_the_training_is_the_same_to_the_bit(
    tmp_path: Path, warned: list[str], kind: type[Module], way: str
) -> None:
    """The look draws no random number of the training's, and leaves no hook, no buffer, no mode."""
    torch.manual_seed(0)
    callback, module = RecalibrateCallback(when="always"), kind()
    given = torch.compile(module, backend="eager") if way == "compiled" else None
    twin = with_and_without(module, callback, tmp_path, given, **({"precision": way} if way == "bf16-mixed" else {}))
    assert callback.error is None
    assert warned == []
    assert all("running" in name or "tracked" in name for name in differing(module, twin))
    assert [m.training for m in module.modules()] == [m.training for m in twin.modules()]
    assert vars(module).keys() - {"forward", "training_step"} >= vars(twin).keys()
    assert "log" not in vars(module)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a1_nothing_is_compiled_for_the_look(tmp_path: Path) -> None:
    """Neither in it nor behind it: code that was compiled with a hook would be compiled anew without it."""
    from torch._dynamo.utils import counters

    compiled = []
    for callbacks in ([], [RecalibrateCallback(when="always")]):
        torch._dynamo.reset()
        counters.clear()
        module = Module()
        module.net.compile(backend="eager")
        fit(module, callbacks, tmp_path)
        compiled.append(counters["frames"]["total"])
    assert compiled == [1, 1]


def test_a1_a_step_that_raises_leaves_no_hook(tmp_path: Path) -> None:
    class Raising(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            assert len(torch.nn.modules.module._global_forward_pre_hooks) == 1
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fit(Raising(), [RecalibrateCallback()], tmp_path)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a1_a_skipped_epoch_leaves_no_hook_and_no_verdict(tmp_path: Path) -> None:
    class Skipping(Prepared):
        def on_train_batch_start(self, _batch: Any, _index: int) -> int | None:
            return -1 if self.current_epoch == 0 else None

        def on_train_batch_end(self, *_: Any) -> None:
            assert not torch.nn.modules.module._global_forward_pre_hooks

    callback = RecalibrateCallback(when="always")
    fit(Skipping(), [callback], tmp_path)
    assert callback.error is None


def test_a1_a_look_that_fails_costs_nothing(tmp_path: Path, warned: list[str]) -> None:
    class Picky(Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("not in evaluation mode")
            return super().forward(x)

    torch.manual_seed(0)
    callback, module = RecalibrateCallback(when="always"), Picky()
    assert differing(module, with_and_without(module, callback, tmp_path)) == set()
    assert "the forward failed: RuntimeError: not in evaluation mode" in str(callback.error)
    assert len(warned) == 1  # at the end, not at the first batch


def test_a1_a_second_fit_is_looked_at_anew(tmp_path: Path) -> None:
    callback = RecalibrateCallback(when="always")
    fit(Prepared(), [callback], tmp_path)
    assert callback.error is not None
    fit(Module(), [callback], tmp_path)
    assert callback.error is None
    fit(Prepared(), [callback], tmp_path)
    assert callback.error is not None


def test_a1_what_forward_logs_is_logged_by_the_training_alone(tmp_path: Path) -> None:
    """Neither by the look nor at the end, where Lightning forbids it."""

    class Logging(Module):
        def forward(self, x: Tensor) -> Tensor:
            self.log("mean", x.mean())
            self.log_dict({"max": x.max()})
            return super().forward(x)

    found = []
    for callbacks in ([], [RecalibrateCallback(when="always")]):
        torch.manual_seed(0)
        trainer = fit(Logging(), callbacks, tmp_path)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert callbacks[0].error is None
    assert found[0].keys() == {"mean", "max"}
    assert found[0] == found[1]


class Transferring(Module):
    """Each transfer hook has its share in what the network is trained on."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 100, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 3, batch[1]]


@pytest.mark.parametrize("data", ["default", "loader", "list", "generator", "function"])
def test_a2_data_that_are_given_come_through_the_transfer_hooks_too(tmp_path: Path, data: str) -> None:
    given: Any = {
        "default": None,
        "loader": loader(),
        "list": list(loader()),
        "generator": (batch for batch in loader()),
        "function": lambda trainer: loader(),
    }[data]
    torch.manual_seed(0)
    callback, module = RecalibrateCallback(given, when="always"), Transferring()
    fit(module, [callback], tmp_path)
    assert callback.error is None
    assert callback.report is not None
    assert callback.report.n == 96
    assert max(residual(module.net.eval(), [(x + 100) * 3 for x, _ in loader(shuffle=False)])) < 1e-3  # 100 is 33 σ


def test_a2_calls_are_made_as_they_are_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    calls = [bnfix.Call((x,)) for x, _ in loader(shuffle=False)]
    callback, module = RecalibrateCallback(calls, when="always"), Transferring()
    fit(module, [callback], tmp_path)
    assert callback.error is None
    assert far(module) < 1e-5


def test_a2_an_iterator_is_not_gone_through_twice(tmp_path: Path) -> None:
    for data, again in ((loader(False), True), (iter(loader(False)), False)):
        callback = RecalibrateCallback(data, when="always", certify="full", method="population")
        fit(Module(), [callback], tmp_path)
        assert callback.report is not None
        assert (callback.report.residual_fresh is not None) is again


@pytest.mark.parametrize(
    "error", [RuntimeError("r"), KeyError("k"), OSError("o"), StopIteration(), MemoryError(), AssertionError("a")]
)
def test_b2_a_data_function_that_raises_does_not_cost_the_training(
    tmp_path: Path, warned: list[str], error: Exception
) -> None:
    def data(_trainer: Any) -> Any:
        raise error

    torch.manual_seed(0)
    callback, module = RecalibrateCallback(data, when="always"), Module()
    assert differing(module, with_and_without(module, callback, tmp_path)) == set()
    assert callback.report is None
    assert isinstance(callback.error, CalibrationError)
    assert callback.error.message.startswith(f"the data function raised {type(error).__name__}")
    assert callback.error.__cause__ is error
    (said,) = warned
    assert said.startswith("bnfix: not recalibrated, the module is as training left it: the data function raised")


def test_b2_whatever_else_raises_does_not_cost_it_either(tmp_path: Path) -> None:
    calls = []

    def select(path: str, _module: Any) -> bool:
        calls.append(path)
        if len(calls) > 2:  # behind the training: twice it is asked at the start
            raise KeyError(path)
        return True

    callback = RecalibrateCallback(loader(), when="always", select=select)
    fit(Module(), [callback], tmp_path)
    assert isinstance(callback.error, KeyError)
    callback = RecalibrateCallback(lambda trainer: None, when="always")  # type: ignore[arg-type,return-value]
    fit(Module(), [callback], tmp_path)
    assert isinstance(callback.error, TypeError)
    assert str(callback.error) == "data is what a training loop iterates over, not NoneType"


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"when": "z"}, ValueError, "when is one of 'always', 'needed', not 'z'"),
        ({"method": "q"}, ValueError, "method is one of 'auto', 'staged', 'population', 'online', not 'q'"),
        ({"certify": "x"}, ValueError, "certify is one of 'replay', 'full', None, not 'x'"),
        ({"max_samples": -1}, ValueError, "max_samples is at least 1, not -1"),
        ({"max_samples": 1.5}, TypeError, "max_samples is a number of samples, not 1.5"),
        ({"tol": -1}, ValueError, "tol is a positive number, not -1"),
        ({"data": 5}, TypeError, "data is what a training loop iterates over, not int"),
    ],
)
def test_b3_wrong_values_are_refused_at_construction(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        RecalibrateCallback(**wrong)
    assert str(raised.value) == text


class Normless(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 1))
        self.register_buffer("scale", torch.ones(4))


class Late(Module):
    """Has its layers only when they are configured, as large modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = self.net
        del self.net

    def configure_model(self) -> None:
        self.net = self.whole


class Functional(Module):
    """Norms that no module stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 1))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.nn.functional.batch_norm(x, self.mean, self.var, training=self.training))


def test_b3_a_module_without_norms_is_refused_before_the_training(tmp_path: Path) -> None:
    for module, callback, text in (
        (Normless(), RecalibrateCallback(), "the model has no norm with running statistics"),
        (Module(), RecalibrateCallback(select=["net.9"]), "select names 'net.9', and the model has no such layer"),
        (Module(), RecalibrateCallback(select="conv"), "select='conv' fits no norm of the model"),
    ):
        with pytest.raises(CalibrationError, match=text):
            fit(module, [callback], tmp_path)
        assert module.net[0].weight.grad is None


def test_b3_what_may_succeed_is_not_refused(tmp_path: Path) -> None:
    for module, select in ((Late(), None), (Functional(), None), (Module(), iter(["net.1", "net.5"]))):
        callback = RecalibrateCallback(when="always", select=select)
        fit(module, [callback], tmp_path)
        assert callback.error is None
        assert callback.report is not None
        assert callback.report.changed


def test_b4_norms_that_no_forward_reaches_are_named(tmp_path: Path, warned: list[str]) -> None:
    class Headed(Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = torch.nn.Sequential(*(torch.nn.BatchNorm1d(1) for _ in range(5)))

        def training_step(self, batch: Any, _index: int) -> Tensor:
            return (self.heads(self(batch[0])).squeeze(1) - batch[1]).square().mean()

    callback = RecalibrateCallback(when="always")
    fit(Headed(), [callback], tmp_path)
    assert callback.report is not None
    assert callback.report.never_called == tuple(f"heads.{n}" for n in range(5))
    (said,) = warned
    assert said.startswith("bnfix: no forward reached heads.0, heads.1, heads.2 and 2 more: ")
    assert "RecalibrateCallback(forward=lambda m, b: m.head(m(b[0])))" in said
    warned.clear()
    callback = RecalibrateCallback(when="always", forward=lambda m, b: m.heads(m(b[0])))
    fit(Headed(), [callback], tmp_path)
    assert warned == []
