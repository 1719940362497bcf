"""What must stay silent: teachers, and calibration on purpose."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from loop_nets import bad, codes, conv_net, images, loader, sgd, step, train, watch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import bnfix


class WithTeacher(nn.Module):
    """A network and one that follows it."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        self.query = conv_net()
        self.key = copy.deepcopy(self.query)
        if frozen:
            self.key.requires_grad_(False)


def moco_update(m: WithTeacher) -> None:
    for q, k in zip(m.query.parameters(), m.key.parameters(), strict=True):
        k.data = k.data * 0.99 + q.data * 0.01  # as in facebookresearch/moco


def in_place_update(m: WithTeacher) -> None:
    for q, k in zip(m.query.parameters(), m.key.parameters(), strict=True):
        k.data.mul_(0.99).add_(q.data, alpha=0.01)  # as in mean teacher: no version counter moves


def lerp_update(m: WithTeacher) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(m.key.parameters()), list(m.query.parameters()), 0.01)


@pytest.mark.parametrize("update", [moco_update, in_place_update, lerp_update])
@pytest.mark.parametrize("frozen", [True, False])
def test_moco(update: Callable[[WithTeacher], None], frozen: bool) -> None:
    model = WithTeacher(frozen)
    optimizer = sgd(model.query)
    with watch(model, optimizer) as w:
        for _ in range(20):
            one, other = images(), images()
            q = model.query(one)
            with torch.no_grad():
                update(model)
                k = model.key(other)
            step(optimizer, q - k)
    report = w.report()
    assert not report.findings
    keys = [n for n in w.log.norms if n.path.startswith("key")]
    assert len(keys) == 3
    assert all(n.teacher and n.without_grad == 20 for n in keys)


def augmented(x: Tensor) -> Tensor:
    """Brightness and contrast of each image anew, some noise."""
    n = len(x)
    return x * torch.rand(n, 1, 1, 1).add(0.5) + torch.randn(n, 1, 1, 1) + 0.5 * torch.randn_like(x)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_byol(asymmetric: bool) -> None:
    """Both views through the online network; BYOL's augmentations are not of one distribution, on purpose."""
    model = WithTeacher()
    optimizer = sgd(model.query)
    with watch(model, optimizer) as w:
        for _ in range(20):
            x = images()
            one, other = augmented(x), augmented(x) * (0.4 if asymmetric else 1.0)
            with torch.no_grad():
                t1, t2 = model.key(one), model.key(other)
            step(optimizer, model.query(one) - t2, model.query(other) - t1)
            in_place_update(model)
    report = w.report()
    assert report.clean
    assert codes(report) == {"BN401"}  # two forwards a step are told, as information
    if asymmetric:
        assert "momentum teacher" in report.by_code("BN401")[0].message


def test_byol_that_copies_the_buffers_too() -> None:
    model = WithTeacher()
    optimizer = sgd(model.query)
    with watch(model, optimizer) as w:
        for _ in range(12):
            with torch.no_grad():
                t = model.key(images())
            step(optimizer, model.query(images()) - t)
            in_place_update(model)
            for q, k in zip(model.query.buffers(), model.key.buffers(), strict=True):
                k.copy_(q)
    assert not w.report().findings


def test_mean_teacher_is_evaluated_later() -> None:
    """The teacher of a mean teacher is what is used in the end, with the statistics it gathered in training mode."""
    model = WithTeacher(frozen=False)
    optimizer = sgd(model.query)
    with watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            for _ in range(4):
                with torch.no_grad():
                    target = model.key(images())
                step(optimizer, model.query(images()) - target)
                in_place_update(model)
            model.eval()
            with torch.no_grad():
                for x in loader(2):
                    model.key(x)
    assert not w.report().findings


def test_target_network_that_is_copied_now_and_then() -> None:
    """A target that nobody wrote to within the watch is known by its weights: those the trained network began with."""
    model = WithTeacher()
    optimizer = sgd(model.query)
    with watch(model, optimizer) as w:
        for _ in range(6):
            with torch.no_grad():
                target = model.key(images())
            step(optimizer, model.query(images()) - target)
    assert not w.report().findings


def test_teacher_made_inside_is_not_watched_and_not_left_with_hooks() -> None:
    student = conv_net()
    optimizer = sgd(student)
    with watch(student, optimizer) as w:
        teacher = copy.deepcopy(student)
        for _ in range(6):
            with torch.no_grad():
                target = teacher(images())
            step(optimizer, student(images()) - target)
    assert not w.report().findings
    assert all(not m._forward_pre_hooks for m in teacher.modules())


def test_schedule_free_warm_up() -> None:
    """Weights are moved to their average, statistics follow in training mode without gradient, then it is evaluated."""
    model = conv_net()
    optimizer = sgd(model, lr=0.2)
    with watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            train(model, optimizer, 5)
            with torch.no_grad():
                kept = [p.clone() for p in model.parameters()]
                for p in model.parameters():
                    p.mul_(0.7)  # the optimizer's eval(): other weights
                for x in loader(4):
                    model(x)
                model.eval()
                for x in loader(2):
                    model(x)
                for p, k in zip(model.parameters(), kept, strict=True):
                    p.copy_(k)
    assert not w.report().findings


@pytest.mark.parametrize("where", ["end", "every epoch"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn(where: str, momentum: float | None) -> None:
    """update_bn resets statistics; it sets momentum to None, which some norms have anyway."""
    model = conv_net()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = momentum
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(3):
            train(model, optimizer, 4)
            if where == "every epoch":
                update_bn(loader(3), model)
        update_bn(loader(3), model)
    report = w.report()
    assert not report.findings
    assert all(n.calibrated == (12 if where == "every epoch" else 3) for n in w.log.norms)


def test_an_average_that_is_evaluated_and_calibrated_in_turns() -> None:
    """Held in evaluation mode, with gradients on, until ``update_bn`` puts it into training mode for its pass."""
    model = conv_net()
    optimizer, average = sgd(model), AveragedModel(model)
    with watch(nn.ModuleDict({"model": model, "average": average}), optimizer) as w:
        for _ in range(4):
            train(model, optimizer, 5)
            average.update_parameters(model)
            update_bn(loader(3), average)
            average.eval()
            average(images())
    assert not w.report().findings


def test_swa_with_an_averaged_model_made_inside() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        swa = AveragedModel(model)
        for _ in range(3):
            train(model, optimizer, 3)
            swa.update_parameters(model)
        update_bn(loader(3), swa)
    assert not w.report().findings
    assert all(not m._forward_pre_hooks for m in swa.modules())


def test_precise_bn_by_hand_changes_the_momentum() -> None:
    """As fvcore's PreciseBN does it: momentum 1, one forward after the other, training goes on right after."""
    model = conv_net()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(3):
            train(model, optimizer, 4)
            for m in norms:
                m.momentum = 1.0
            with torch.no_grad():
                for x in loader(3):
                    model(x)
            for m in norms:
                m.momentum = 0.1
    assert not w.report().findings


def test_a_momentum_schedule_is_no_calibration() -> None:
    """PointNet lowers the momentum as it trains: forgotten eval() is found all the same."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for epoch in range(3):
            for m in model.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.momentum = 0.1 * 0.5**epoch
            train(model, optimizer, 4)
            with torch.no_grad():
                for x in loader(2):
                    model(x)
    assert bad(w.report()) == {"BN402"}


def test_recalibrate_within_the_loop() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(2):
            train(model, optimizer, 4)
            bnfix.recalibrate(model, list(loader(3)))
            model.train()
            train(model, optimizer, 4)
            bnfix.recalibrate(model, list(loader(3)), method="population")
            model.train()
    assert not w.report().findings


def test_adabn() -> None:
    """Statistics of another domain, gathered on purpose in front of an evaluation there."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(2):
            model.train()
            train(model, optimizer, 6)
            with torch.no_grad():
                for x in loader(6, shift=3.0):
                    model(x)
                model.eval()
                model(images(shift=3.0))
    assert not w.report().findings


def test_declared_updates() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(3):
            train(model, optimizer, 4)
            with w.expected("probing"), torch.no_grad():
                for x in loader(3):
                    model(x)
    report = w.report()
    assert not report.findings
    assert w.log.expected == {"probing": 27}
    assert any("27 updates declared as 'probing'" in line for line in report.seen)
