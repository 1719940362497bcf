"""Public bugs that show where a model meets its data: networks trained on handwritten digits, with the fault in it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from benchmarks.small_nets import Trained
from benchmarks.small_nets import train as train_digits
from public_bugs.bug import bug
from public_bugs.bugs_frozen import norms_of
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import bnfix
from bnfix.types import Diagnosis


def _on(found: Trained, model: nn.Module | None = None) -> Diagnosis:
    return bnfix.check(found.model if model is None else model, data=found.train, forward=found.forward)


@bug("BN304", "happynear/NormFace#4")
def batches_of_one_class(fixed: bool) -> Diagnosis:
    """ "If you do not shuffle the data, all the data in one batch may have the same label"."""

    def by_label(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        order = y.argsort(stable=True)
        return x[order], y[order]

    return _on(train_digits("plain_cnn", epochs=4, shuffle=fixed, train_on=None if fixed else by_label))


@bug("BN302", "fastai/fastai#1352")
def last_batch_of_one_sample(fixed: bool) -> Diagnosis:
    """*Expected more than 1 value per channel when training*, at the end of the first epoch."""
    found = train_digits("cnn_with_head", epochs=4)
    x, y = found.train.dataset.tensors  # type: ignore[attr-defined]
    rest = TensorDataset(x[: 48 * 29 + 1], y[: 48 * 29 + 1])
    data = DataLoader(rest, 48, shuffle=True, drop_last=fixed)
    return bnfix.check(found.model, data=data)


class Pooled(nn.Module):
    """DeepLab's image pooling: a branch whose norm sees one value a sample and channel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.local = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        pool = nn.AdaptiveAvgPool2d(1)
        self.pooled = nn.Sequential(pool, nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.out = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        whole = self.pooled(x).expand(-1, -1, *x.shape[2:])
        return self.out(torch.cat([self.local(x), whole], 1).mean((2, 3)))


@bug("BN301", "yu-changqian/TorchSeg#95")
def batches_of_two_images(fixed: bool) -> Diagnosis:
    """ "When the size of batch_size is too small, the model test is very bad"."""
    return _on(train_digits("plain_cnn", build=Pooled, batch=48 if fixed else 2, epochs=6 if fixed else 2, lr=1e-3))


def _low_momentum(model: nn.Module) -> None:
    for norm in norms_of(model):
        norm.momentum = 0.001


@bug("BN203", "vacancy/Synchronized-BatchNorm-PyTorch#5")
def momentum_too_small_for_so_few_steps(fixed: bool) -> Diagnosis:
    """A default of .001, "when the entire number of training iterations is not much"."""
    return _on(train_digits("plain_cnn", epochs=6, tune=None if fixed else _low_momentum))


def _averaged(net: str, decay: float | None, buffers: bool = False) -> tuple[Trained, nn.Module]:
    """A net, and the average of its parameters from the second third of its training on: exponential, or of all."""
    average: list[nn.Module] = []

    def step(model: nn.Module, number: int) -> None:
        if number == 44:
            average.append(copy.deepcopy(model))
        elif number > 44:
            weight = 1 - decay if decay else 1 / (number - 43)
            for mean, p in zip(average[0].parameters(), model.parameters(), strict=True):
                mean.data.lerp_(p.data, weight)
            for kept, b in zip(average[0].buffers(), model.buffers(), strict=True):
                if buffers:
                    kept.copy_(b)

    return train_digits(net, epochs=6, step=step), average[0].eval()


@bug("BN204", "mosaicml/composer#624")
def weights_averaged_and_no_pass_behind_it(fixed: bool) -> Diagnosis:
    """SWA ends with the last epoch, and nobody gathers statistics for the averaged weights."""
    found, average = _averaged("resnet", None)
    if fixed:
        update_bn(found.train, average)
    return _on(found, average.eval())


@bug("BN204", "pytorch/pytorch#84053")
def averaged_model_with_the_buffers_of_its_first_day(fixed: bool) -> Diagnosis:
    """What ``AveragedModel(use_buffers=False)`` did: its buffers were those that it was copied with."""
    return _on(*_averaged("plain_cnn", 0.95, buffers=fixed))


@bug("BN204", "openvinotoolkit/nncf#41")
def pruned_and_not_adapted(fixed: bool) -> Diagnosis:
    """Compression moves what comes out of each layer; statistics that are adapted bring most of it back."""
    found = train_digits("plain_cnn", epochs=4)
    for conv in found.model.modules():
        if isinstance(conv, nn.Conv2d):
            size = conv.weight.detach().abs()
            conv.weight.data *= size > size.flatten().quantile(0.8)
    if fixed:
        update_bn(found.train, found.model)
    return _on(found, found.model.eval())


class Speech(nn.Module):
    """Convolutions in time over padded utterances; what is padding counts in the norm, and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(6, 12, 3, padding=1), nn.BatchNorm1d(12), nn.Linear(12, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x))) * mask[:, None]
        return self.out(h.sum(2) / mask.sum(1, keepdim=True))


@bug("BN305", "SeanNaren/deepspeech.pytorch#312")
def padding_counts_as_speech(fixed: bool) -> Diagnosis:
    """A trained model is healed by statistics of the frames that are there."""
    rng = torch.Generator().manual_seed(0)
    model = Speech()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = []
    for _ in range(48):
        mask = torch.arange(24) < torch.randint(5, 25, (32, 1), generator=rng)
        x = (1.5 + torch.randn(32, 6, 24, generator=rng)) * mask[:, None]
        batches.append({"x": x, "mask": mask})
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(**batch), torch.randint(4, (32,), generator=rng)).backward()
        optimizer.step()
    if fixed:
        bnfix.recalibrate(model.eval(), batches, mask="mask")
    return bnfix.check(model.eval(), data=batches, mask="mask")
