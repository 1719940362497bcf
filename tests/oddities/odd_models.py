"""Models and loaders that look odd to a check, and are meant."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.small_nets import Trained
from benchmarks.small_nets import train as train_digits
from loop.loop_nets import conv_net, images, sgd, step, train
from oddities.oddity import oddity
from public_bugs.bugs_frozen import norms_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bnfix
from bnfix.types import Diagnosis


def _digits(name: str = "plain_cnn", **how: Any) -> Trained:
    return train_digits(name, **{"epochs": 4, **how})


@oddity
def validation_loader_in_order_with_a_tail_of_one() -> Diagnosis:
    found = _digits("cnn_with_head")
    x, y = found.val.dataset.tensors  # type: ignore[attr-defined]
    order = y.argsort(stable=True)[:353]
    data = DataLoader(TensorDataset(x[order], y[order]), 16)
    return bnfix.check(found.model, data=data, role="val")


@oddity
def training_loader_that_can_not_tell_its_length() -> Diagnosis:
    found = _digits()

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from found.train.dataset

    return bnfix.check(found.model, data=DataLoader(Stream(), 32))


@oddity
def augmentation_in_the_loader() -> Diagnosis:
    """Trained with noise and other brightness, as the loader gives them."""

    def augmented(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        n = len(x)
        return x * (0.6 + 0.8 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn_like(x), y

    found = _digits(train_on=augmented)
    return bnfix.check(found.model, data=found.train)


@oddity
def classes_and_samples_in_each_batch() -> Diagnosis:
    """Re-identification: P = 8 classes with K = 4 samples each."""
    found = _digits()
    x, y = found.train.dataset.tensors  # type: ignore[attr-defined]
    rng = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(40):
        chosen = torch.randperm(10, generator=rng)[:8]
        rows = [torch.nonzero(y == c).flatten() for c in chosen]
        rows = [r[torch.randperm(len(r), generator=rng)[:4]] for r in rows]
        batches.append((x[torch.cat(rows)], y[torch.cat(rows)]))
    return bnfix.check(found.model, data=batches)


@oddity
def two_views_of_one_distribution() -> Diagnosis:
    """Contrastive learning: one encoder, two views, two forwards."""
    model = conv_net(8)
    optimizer = sgd(model)
    views = [(x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)) for x in (images() for _ in range(48))]
    for a, b in views:
        step(optimizer, model(a) - model(b), model(a).mean(0) - 1)
    model.eval()
    return bnfix.check(model, data=views, forward=lambda m, pair: (m(pair[0]), m(pair[1])))


class Residual(nn.Module):
    """A block whose last scale begins at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


@oddity
def branches_that_begin_at_zero() -> Diagnosis:
    """Zero-init γ, trained so little that the last blocks are closed still."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *[Residual(8) for _ in range(3)])
    frozen = [b.bn2.weight.requires_grad_(False) for b in model[3:]]
    optimizer = sgd(model)
    for _ in range(40):
        step(optimizer, model(images()))
    assert not any(w.any() for w in frozen)
    return bnfix.check(model.eval(), images())


@oddity
def counter_at_zero_and_good_statistics() -> Diagnosis:
    """Converted from a framework that doesn't count."""
    model = conv_net()
    train(model, sgd(model), 40)
    for norm in norms_of(model):
        norm.num_batches_tracked.zero_()
    return bnfix.check(model.eval(), images())


@oddity
def no_counter_at_all() -> Diagnosis:
    """A state_dict from before torch 0.4.1."""
    model = conv_net()
    train(model, sgd(model), 40)
    return bnfix.check({k: v for k, v in model.state_dict().items() if "num_batches" not in k})


@oddity
def norm_on_the_raw_input() -> Diagnosis:
    """Instead of means and deviations in the code: a norm without weights in front, and TensorFlow's momentum."""
    norm = nn.BatchNorm2d(3, affine=False, momentum=0.01, eps=1e-3)
    model = nn.Sequential(norm, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    optimizer = sgd(model)
    data = [images(shift=4.0) for _ in range(48)]
    for _ in range(8):
        for x in data:
            step(optimizer, model(x))
    return bnfix.check(model.eval(), data=data)


@oddity
def neck_of_a_re_identification_net() -> Diagnosis:
    """BNNeck: the last layer is a norm, its shift frozen at 0; features in front of it go to the triplet loss."""
    neck = nn.BatchNorm1d(8)
    neck.bias.requires_grad_(False)
    model = nn.Sequential(conv_net(8), neck)
    train(model, sgd(model), 40)
    return bnfix.check(model.eval(), images())


@oddity
def several_norms_of_which_one_is_used() -> Diagnosis:
    """Slimmable and domain-specific networks: a norm for each width or domain, and one that is chosen."""

    class Domains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.domain = nn.Conv2d(3, 8, 3), 0
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[self.domain](self.conv(x)).relu()

    model = Domains()
    optimizer = sgd(model)
    for i in range(120):
        model.domain = i % 3
        step(optimizer, model(images(shift=float(model.domain))))
    model.domain = 0
    return bnfix.check(model.eval(), images())


@oddity
def statistics_of_all_batches() -> Diagnosis:
    """``momentum=None`` averages over all batches; told as information."""
    model = conv_net()
    for norm in norms_of(model):
        norm.momentum = None  # type: ignore[assignment]
    train(model, sgd(model), 60)
    return bnfix.check(model.eval(), images())


@oddity
def one_image_a_batch() -> Diagnosis:
    """pix2pix: a generator whose norms see one image at a time, 8 by 8 positions in the narrowest place."""

    def unit(inp: int, out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

    model = nn.Sequential(unit(3, 8, 1), unit(8, 16, 2), nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    rng = torch.Generator().manual_seed(0)
    data = [torch.randn(1, 3, 16, 16, generator=rng) for _ in range(240)]
    for x in data:
        step(optimizer, model(x) - x.flip(1))
    return bnfix.check(model.eval(), data=data)


@oddity
def half_precision_for_inference() -> Diagnosis:
    """``model.half().eval()``: as detectors are deployed, and as some libraries save their checkpoints."""
    model = conv_net()
    train(model, sgd(model), 40)
    return bnfix.check(model.half().eval(), images().half())


@oddity
def dead_channels_of_a_trained_net() -> Diagnosis:
    """Filters that never fire: constant channels, in file and data alike."""
    found = _digits()
    first: Any = found.model[0][0]  # type: ignore[index]
    with torch.no_grad():
        first.weight[:4] = 0
    bnfix.recalibrate(found.model, found.train)
    return bnfix.check(found.model.eval(), data=found.train)


@oddity
def frozen_class_in_a_detector() -> Diagnosis:
    from torchvision.ops import FrozenBatchNorm2d

    def unit(inp: int, out: int, norm: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inp, out, 3, padding=1, bias=False), norm, nn.ReLU())

    frozen = FrozenBatchNorm2d(8)
    frozen.running_mean.normal_()
    model = nn.Sequential(unit(3, 8, frozen), unit(8, 8, nn.BatchNorm2d(8)))
    data = [images(2) for _ in range(48)]
    optimizer = sgd(model)
    for x in data:
        step(optimizer, model(x))
    return bnfix.check(model.train(), data=data)


@oddity
def lazy_norms_before_their_first_batch() -> Diagnosis:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    return bnfix.check(model)


@oddity
def weights_standardised_by_a_batch_norm() -> Diagnosis:
    """timm's ScaledStdConv and big_vision's: F.batch_norm in training mode, on weights."""
    from timm.layers import ScaledStdConv2d

    model = nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.SiLU(), ScaledStdConv2d(8, 8, 3)).eval()
    return bnfix.check(model, images())


@oddity
def monte_carlo_dropout_behind_the_norms() -> Diagnosis:
    """Dropout stays on in evaluation, norms don't."""
    model = nn.Sequential(conv_net(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    train(model, sgd(model), 40)
    model.eval()
    model[2].train()
    return bnfix.check(model, images())
