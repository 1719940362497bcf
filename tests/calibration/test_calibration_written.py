"""What is written, what stays (frozen norms, modes, momentum), and how it comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import distances, residual
from nets import bits, lived_in, same_bits
from torch import Tensor, nn
from trap_nets import EXACT, Two, everything, exact, fails, images, mixed_modes

import bnfix
from bnfix.errors import CalibrationError

# Frozen norms, modes, momentum.


def test_norms_that_are_frozen_by_their_class() -> None:
    """Detectron2's and bnfix's own normalise by F.batch_norm: that alone does not ask for new statistics."""

    class FrozenNorm(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var)  # type: ignore[arg-type]

    model = Two()
    model.bn1 = FrozenNorm(4)
    model = lived_in(model)
    before = bits(model)
    report = bnfix.recalibrate(model, images())
    assert report.frozen == ("bn1",)
    assert {k for k, v in bits(model).items() if not torch.equal(v, before[k])} >= {"bn2.running_mean"}
    assert all(torch.equal(v, before[k]) for k, v in bits(model).items() if k.startswith("bn1."))
    assert bnfix.recalibrate(model, images(), include_frozen=True).frozen == ()
    assert not torch.equal(bits(model)["bn1.running_mean"], before["bn1.running_mean"])


def test_frozen_norms_and_the_modes_of_all_modules() -> None:
    model = mixed_modes()
    before, rest = bits(model.bn1), everything(model)
    report = bnfix.recalibrate(model, images())
    assert report.frozen == ("bn1",)
    assert same_bits(model.bn1, before)
    assert everything(model) == rest
    assert max(distances(model, images())["bn2"]) <= EXACT
    report = bnfix.recalibrate(model, images(), include_frozen=True)
    assert report.frozen == ()
    assert max(residual(model, images())) <= EXACT
    assert everything(model) == rest


def test_nothing_is_frozen_in_a_model_in_evaluation_mode() -> None:
    model = Two()
    report = exact(model, images())
    assert report.frozen == ()
    assert not any(m.training for m in model.modules())


def test_a_model_whose_norms_are_all_frozen() -> None:
    model = mixed_modes()
    model.bn2.eval()
    assert "include_frozen=True" in fails(model, images(), CalibrationError)


def test_num_batches_tracked_and_momentum_stay() -> None:
    model = mixed_modes()
    model.bn2.num_batches_tracked.fill_(777)  # type: ignore[union-attr, operator]
    bnfix.recalibrate(model, images())
    assert model.bn2.num_batches_tracked == 777
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.03)


COUNTERS = [(0.1, 0, 44), (0.1, 5, 44), (0.1, 44, 44), (0.03, 77, 152), (0.3, 0, 25), (None, 0, 25), (None, 3, 3)]
"""Of 25 batches read: as many as leave 1 % of the initial values; at least what was read where nothing was counted."""


@pytest.mark.parametrize(("momentum", "before", "after"), COUNTERS)
def test_a_counter_never_says_that_initial_values_are_left(momentum: float | None, before: int, after: int) -> None:
    model = mixed_modes()
    model.bn2.momentum = momentum  # type: ignore[union-attr, assignment]
    model.bn2.num_batches_tracked.fill_(before)  # type: ignore[union-attr, operator]
    report = bnfix.recalibrate(model, images())
    assert model.bn2.num_batches_tracked == after
    assert momentum is None or (1 - momentum) ** after <= 0.01
    report.undo()
    assert model.bn2.num_batches_tracked == before


# Back again, and not at all.


def test_undo_gives_the_bits_back() -> None:
    model = mixed_modes()
    before = bits(model)
    report = bnfix.recalibrate(model, images())
    assert not same_bits(model, before)
    report.undo()
    assert same_bits(model, before)
    with pytest.raises(CalibrationError, match="nothing to undo"):
        report.undo()


def test_undo_refuses_after_training() -> None:
    model = lived_in(Two())
    report = bnfix.recalibrate(model, images())
    model.train()(images()[0])
    moved = bits(model)
    with pytest.raises(CalibrationError, match=r"bn1.running_mean has changed since"):
        report.undo()
    assert same_bits(model, moved)


def test_undo_refuses_where_the_tensors_are_others() -> None:
    for change in (lambda m: m.double(), lambda m: setattr(m, "bn1", nn.BatchNorm2d(4))):
        model = lived_in(Two())
        report = bnfix.recalibrate(model, images())
        change(model)
        now = bits(model)
        with pytest.raises(CalibrationError, match=r"bn1.running_mean is another tensor by now"):
            report.undo()
        assert same_bits(model, now)


def test_undo_reaches_layers_whose_wrapper_is_gone() -> None:
    model = lived_in(Two())
    before = bits(model)
    report = bnfix.recalibrate(nn.Sequential(model).eval(), images())
    assert not same_bits(model, before)
    report.undo()
    assert same_bits(model, before)


def test_a_dry_run_changes_nothing() -> None:
    model = mixed_modes()
    before, rest = bits(model), everything(model)
    report = bnfix.recalibrate(model, images(), dry_run=True)
    assert same_bits(model, before)
    assert everything(model) == rest
    assert report.dry_run
    assert not report.changed
    done = copy.deepcopy(model)
    assert bnfix.recalibrate(done, images()).layers == report.layers  # what it measures is what would be written
    with pytest.raises(CalibrationError, match="nothing to undo"):
        report.undo()


def test_only_when_needed() -> None:
    model, shuffled = lived_in(Two()), list(torch.cat(images())[torch.randperm(400)].split(16))
    assert bnfix.recalibrate(model, shuffled, when="needed").changed
    good = bits(model)
    report = bnfix.recalibrate(model, shuffled, when="needed")
    assert not report.changed
    assert same_bits(model, good)
    assert any("leave the model as it is" in line for line in report.advice)


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, lambda names: (n for n in names), lambda n: dict.fromkeys(n).keys()]
)
def test_names_that_no_layer_has_are_refused_however_they_come(kind: Any) -> None:
    name = next(n for n, m in Two().named_modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(CalibrationError, match="select names 'typo'"):
        bnfix.recalibrate(Two(), images(), select=kind([name, "typo"]))
    report = bnfix.recalibrate(Two(), images(), select=kind([name]))
    assert [row.site for row in report.layers] == [name]


def test_what_is_selected_and_frozen_is_said_to_be_frozen() -> None:
    model = Two()
    name, norm = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    norm.eval()
    for select in (f"^{name}$", [name], lambda path, _: path == name):
        with pytest.raises(CalibrationError, match="all 1 norms that are selected are frozen") as caught:
            bnfix.recalibrate(model, images(), select=select)
        assert "include_frozen=True" in str(caught.value.hint)


def test_undo_of_layers_that_went_on_without_their_wrapper() -> None:
    """It wrote into tensors that nobody had any more, and said nothing."""
    model = Two()
    lived_in(model)
    before = bits(model)
    report = bnfix.recalibrate(nn.Sequential(model).eval(), images())
    report.undo()
    assert same_bits(model, before)
    report = bnfix.recalibrate(nn.Sequential(model).eval(), images())
    model.double()
    with pytest.raises(CalibrationError, match="another tensor by now"):
        report.undo()


def test_undo_of_the_layers_that_are_left() -> None:
    """A part of what was recalibrated is gone with the wrapper: nobody misses it."""
    kept, gone = Two(), Two()
    for model in (kept, gone):
        lived_in(model)
    before = bits(kept)
    report = bnfix.recalibrate(nn.Sequential(kept, nn.AdaptiveAvgPool2d(6), nn.Conv2d(4, 3, 1), gone).eval(), images())
    del gone, model
    report.undo()
    assert same_bits(kept, before)


def test_counters_of_norms_that_stay_may_be_anything() -> None:
    model = Two()
    first, second = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    first.num_batches_tracked = torch.tensor([3.0, float("nan")])
    name = next(n for n, m in model.named_modules() if m is second)
    assert bnfix.recalibrate(model, images(), select=[name]).changed
