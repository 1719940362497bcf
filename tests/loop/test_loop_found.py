"""What must be found: publicly reported bugs in small, each with its remedy, which is clean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_nets import bad, codes, conv_net, images, loader, sgd, step, train, watch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnfix
from bnfix.types import Diagnosis

GRADLESS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "nothing": contextlib.nullcontext,
}


def epochs(model: nn.Module, validate: Callable[[], None], steps: int = 4, n: int = 3) -> Diagnosis:
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(n):
            model.train()
            train(model, optimizer, steps)
            validate()
    return w.report()


@pytest.mark.parametrize("mode", GRADLESS)
@pytest.mark.parametrize("steps", [3, 30])
def test_val_without_eval(mode: str, steps: int) -> None:
    """Pitfall 6; also where no_grad() was forgotten along with eval()."""
    model = conv_net()

    def validate() -> None:
        with GRADLESS[mode]():
            for x in loader(6):
                out = model(x)
                out.mean().item()

    report = epochs(model, validate, steps)
    assert bad(report) == {"BN402"}
    found = report.by_code("BN402")[0]
    assert len(found.sites) == 3
    assert "test_loop_found.py" in found.message
    assert "out = model(x)" in found.message
    if mode != "nothing":
        assert found.measured["updates"] == 18  # the last run too, though nothing came after it
        assert found.measured["first_step"] == steps


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "nothing"])
def test_val_with_eval(mode: str) -> None:
    model = conv_net()

    def validate() -> None:
        model.eval()
        with GRADLESS[mode]():
            for x in loader(6):
                model(x)

    assert not epochs(model, validate).findings


def test_val_without_eval_on_one_large_batch() -> None:
    model = conv_net()

    def validate() -> None:
        with torch.no_grad():
            model(images(64))

    assert bad(epochs(model, validate)) == {"BN402"}


def test_val_in_every_step_on_other_data() -> None:
    """Full-batch training with a validation in each step looks like pseudo labels; only the data tell it apart."""
    model = conv_net()

    def validate() -> None:
        with torch.no_grad():
            model(images(shift=2.0))

    report = epochs(model, validate, 1, 20)
    assert bad(report) == {"BN402"}
    assert report.by_code("BN402")[0].measured["shift"] > 0.5


def test_val_once_at_the_end_is_told() -> None:
    """One validation behind all training can't be told from a warm-up: information."""
    model = conv_net()

    def validate() -> None:
        with torch.no_grad():
            for x in loader(4):
                model(x)

    report = epochs(model, validate, n=1)
    assert (codes(report), bad(report)) == ({"BN402"}, set())


class Frozen(nn.Module):
    """A pretrained backbone, frozen by the book: no gradients, evaluation mode. A new head."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.keeps = conv_net(), nn.Linear(4, 2), keeps
        self.backbone.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        if self.keeps:
            self.backbone.eval()
        return self


@pytest.mark.parametrize("keeps", [False, True])
def test_lightning_2551(keeps: bool) -> None:
    """Lightning-AI/pytorch-lightning#2551: the trainer's train() puts frozen norms into training mode."""
    model = Frozen(keeps)
    report = epochs(model, lambda: None)
    assert bad(report) == (set() if keeps else {"BN403"})
    if not keeps:
        found = report.by_code("BN403")[0]
        assert "train() undid it" in found.message
        assert found.sites == ("backbone.1", "backbone.4", "backbone.9")
        assert found.measured["updates"] == 12


def test_lightning_2551_with_the_trainer() -> None:
    """The same through Lightning itself, which calls train() at the start of each epoch."""
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, keeps: bool) -> None:
            super().__init__()
            self.net = Frozen(keeps)
            self.net.backbone.eval()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(64)), 16)
    for keeps in (False, True):
        module = Module(keeps)
        if not keeps:  # Lightning 2.2 and newer keeps modes as they are; a callback's train() is what undoes them

            class Trains(pl.Callback):  # type: ignore[misc, name-defined]
                def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
                    pl_module.train()

        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[] if keeps else [Trains()],
        )  # fmt: skip
        with watch(module) as w:
            trainer.fit(module, data)
        assert bad(w.report()) == (set() if keeps else {"BN403"})
        assert w.log.steps == 8


def test_eval_that_holds_for_one_epoch_only() -> None:
    """Norms with trainable weights held in evaluation mode, once; the next epoch's train() undoes it."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for epoch in range(3):
            model.train()
            if epoch == 0:
                for m in model.modules():
                    if isinstance(m, nn.modules.batchnorm._BatchNorm):
                        m.eval()
            train(model, optimizer, 4)
    report = w.report()
    assert bad(report) == {"BN403"}
    found = report.by_code("BN403")[0]
    assert (found.measured["updates"], found.measured["first_step"]) == (8, 4)


def test_distillation_with_a_teacher_in_training_mode() -> None:
    teacher, student = conv_net(), conv_net(4)
    with torch.no_grad():
        teacher[0].weight.add_(0.1 * torch.randn_like(teacher[0].weight))  # it has been trained elsewhere
        teacher[3].weight.add_(0.1 * torch.randn_like(teacher[3].weight))
        teacher[8].weight.add_(0.1 * torch.randn_like(teacher[8].weight))
    teacher.requires_grad_(False)
    both = nn.ModuleDict({"teacher": teacher, "student": student})
    optimizer = sgd(student)
    with watch(both, optimizer) as w:
        for _ in range(6):
            x = images()
            with torch.no_grad():
                target = teacher(x)
            step(optimizer, student(x) - target)
    report = w.report()
    assert bad(report) == {"BN403"}
    assert all(s.startswith("teacher") for s in report.by_code("BN403")[0].sites)


@pytest.mark.parametrize("reentrant", [False, True])
def test_pytorch_96136(reentrant: bool) -> None:
    """pytorch/pytorch#96136: checkpointing updates statistics twice. Non-reentrant stops early, the last norm moved."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(6):
            x = images().requires_grad_()
            step(optimizer, model[6:](checkpoint(model[:6], x, use_reentrant=reentrant)))
    report = w.report()
    assert (codes(report), bad(report)) == ({"BN404"}, set())
    found = report.by_code("BN404")[0]
    assert found.sites == ("1", "4")
    assert found.fix is not None
    assert found.fix.options["momentum"] == pytest.approx(1 - 0.9**0.5)
    for path in ("1", "4"):
        norm = next(n for n in w.log.norms if n.path == path)
        assert (norm.recomputed, norm.counted, norm.unseen) == (6, 12, 0)
    assert w.log.steps == 6


def test_the_momentum_that_makes_up_for_recomputation() -> None:
    """Two updates with 1 − √(1 − α) act as one with α."""
    x = images(64)
    once, twice = conv_net()[:2], conv_net()[:2]
    twice[1].momentum = 1 - 0.9**0.5
    once(x)
    checkpoint(twice, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    torch.testing.assert_close(twice[1].running_mean, once[1].running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(twice[1].running_var, once[1].running_var, rtol=1e-5, atol=1e-6)


def test_whole_network_under_reentrant_checkpoint_is_trained() -> None:
    """All of its first forwards are without gradient. No eval() was forgotten."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(3):
            for _ in range(4):
                step(optimizer, checkpoint(model, images().requires_grad_(), use_reentrant=True))
            model.eval()
            with torch.no_grad():
                model(images())
            model.train()
    assert codes(w.report()) == {"BN404"}


def test_averaged_weights_loaded_without_their_buffers() -> None:
    """timm and many others: an EMA of parameters, loaded with strict=False."""
    model = conv_net()
    optimizer = sgd(model)
    ema = {k: p.detach().clone() for k, p in model.named_parameters()}
    with watch(model, optimizer) as w:
        train(model, optimizer, 3)
        model.load_state_dict(ema, strict=False)
        model.eval()
        model(images())
    report = w.report()
    assert codes(report, "error") == {"BN406"}
    found = report.by_code("BN406")[0]
    assert (len(found.sites), found.measured["first_step"]) == (3, 3)
    assert "model.load_state_dict(ema, strict=False)" in found.message


@pytest.mark.parametrize("heal", ["recalibrate", "update_bn", "training", "buffers", "load"])
def test_loaded_without_buffers_and_healed(heal: str) -> None:
    model = conv_net()
    optimizer = sgd(model)
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    ema = {k: p.detach().clone() for k, p in model.named_parameters()}
    with watch(model, optimizer) as w:
        train(model, optimizer, 3)
        model.load_state_dict(ema, strict=False)
        if heal == "recalibrate":
            bnfix.recalibrate(model, list(loader(2)))
        elif heal == "update_bn":
            torch.optim.swa_utils.update_bn(loader(2), model)
        elif heal == "training":
            train(model, optimizer, 30)
        elif heal == "buffers":
            for name, value in whole.items():
                model.get_buffer(name).copy_(value) if "running" in name else None
        else:
            model.load_state_dict(whole)
    assert not w.report().findings


@pytest.mark.parametrize("affine", [True, False])
def test_a_part_of_a_state_dict_is_no_fault(affine: bool) -> None:
    """Only the head is loaded: the norms got neither weights nor statistics."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=affine)), nn.Linear(8, 4))
    with watch(model, sgd(model)) as w:
        model.load_state_dict({"1.weight": torch.ones(4, 8), "1.bias": torch.ones(4)}, strict=False)
    assert not w.report().findings
    with watch(model, sgd(model)) as w:
        model.load_state_dict({k: p.detach() for k, p in model.named_parameters()}, strict=False)
    assert codes(w.report()) == {"BN406"}


class Siamese(nn.Module):
    """Three branches, one encoder, in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = conv_net()

    def forward(self, *branches: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder(x) for x in branches)


@pytest.mark.parametrize("own_forward", [False, True])
@pytest.mark.parametrize("differ", [True, False])
def test_siamese_net_with_cross_modal_triplets(own_forward: bool, differ: bool) -> None:
    """The story that all began with: anchors of one modality, positives and negatives of another."""
    model = Siamese()
    optimizer = sgd(model)
    other = {"shift": 1.5, "scale": 0.5} if differ else {}
    with watch(model, optimizer) as w:
        for _ in range(20):
            a, p, n = images(), images(**other), images(**other)
            out = model(a, p, n) if own_forward else (model.encoder(a), model.encoder(p), model.encoder(n))
            step(optimizer, *out)
    report = w.report()
    code = "BN102" if own_forward else "BN401"  # one forward of the model, or three
    (first, *_) = report.by_code(code)
    assert first.severity == ("warning" if differ else "info")
    if not differ:
        assert codes(report) == {code}
        return
    assert codes(report, "error") == {"BN303"}
    assert bad(report) == {"BN303", code}
    found = report.findings[0]
    assert found.code == "BN303"
    assert found.sites[0] == "encoder.1"
    assert found.measured["means"]["encoder.1"] > 0.5
    assert "3 calls in a step" in found.message
    assert ("self.encoder(x) for x in branches" if own_forward else "model.encoder(a)") in found.message
    assert found.fix is not None
    assert found.fix.verb == "joint"


def test_a_norm_shared_by_pyramid_levels() -> None:
    """SepBN in FPN heads: one head for levels whose features differ."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, levels: list[Tensor]) -> list[Tensor]:
            return [self.head(x) for x in levels]

    model = Pyramid()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(16):
            step(optimizer, *model([images(16), images(16, 1.0)[..., :4, :4], images(16, 2.0)[..., :2, :2]]))
    report = w.report()
    assert bad(report) == {"BN102", "BN303"}
    assert "self.head(x) for x in levels" in report.by_code("BN303")[0].message
    assert [s.name for s in w.log.norms[0].patterns[0].sites] == ["head.1", "head.1@1", "head.1@2"]


def test_accumulation_over_two_samples() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(6):
            optimizer.zero_grad()
            for x in loader(4, 4):
                (model(x).square().mean() / 4).backward()
            optimizer.step()
    report = w.report()
    assert (codes(report), bad(report)) == ({"BN405"}, set())
    assert report.by_code("BN405")[0].sites == ("9",)  # 4 values a channel; the convolutions' norms see 256


def test_backbone_frozen_by_no_grad() -> None:
    """The backbone runs under no_grad() in every step, in training mode; nothing else freezes it."""
    backbone, head = conv_net(), nn.Linear(4, 2)
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    optimizer = sgd(head)
    with watch(model, optimizer) as w:
        for _ in range(8):
            with torch.no_grad():
                features = backbone(images())
            step(optimizer, head(features))
    report = w.report()
    assert bad(report) == {"BN403"}
    assert report.by_code("BN403")[0].measured == {"updates": 8, "steps": 8}


def test_the_line_is_where_the_calls_part_not_the_norms_own() -> None:
    """An encoder with a forward of its own: all its calls run through the same line there."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)).relu()

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            first = self.encoder(a)
            return first, self.encoder(b)

    model = Branches()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(16):
            step(optimizer, *model(images(16), images(16, 2.0)))
    message = w.report().by_code("BN303")[0].message
    assert "first = self.encoder(a)" in message
    assert "self.bn(self.conv(x))" not in message
    lines = [s.line.text for s in w.log.norms[0].patterns[0].sites if s.line is not None]
    assert lines == ["first = self.encoder(a)", "return first, self.encoder(b)"]
