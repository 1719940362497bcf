"""Public bugs about what a training loop does between its steps."""

from __future__ import annotations

import torch
from loop.loop_nets import conv_net, images, loader, sgd, step, train
from public_bugs.bug import bug
from public_bugs.bugs_frozen import norms_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnfix
from bnfix.types import Diagnosis


@bug("BN402", "princeton-vl/pytorch_stacked_hourglass#44")
def training_mode_in_validation(fixed: bool) -> Diagnosis:
    """``model.train()`` in both phases; only the gradients are off."""
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(3):
            for phase in ("train", "valid"):
                model.train(phase == "train" or not fixed)
                if phase == "train":
                    train(model, optimizer, 5)
                else:
                    with torch.no_grad():
                        for x in loader(3):
                            model(x)
    return w.report()


class Detector(nn.Module):
    """Like torchvision's: losses in training mode, boxes in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": out.square().mean()} if self.training else {"boxes": out}


@bug("BN402", "weecology/DeepForest#477")
def validation_loss_of_a_detector(fixed: bool) -> Diagnosis:
    """A detector returns losses in training mode alone, so validation runs there; its norms can stay behind."""
    model = Detector()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            for x in loader(5):
                optimizer.zero_grad()
                model(x)["loss"].backward()
                optimizer.step()
            if fixed:
                for norm in norms_of(model):
                    norm.eval()
            with torch.no_grad():
                for x in loader(2):
                    model(x)["loss"].item()
    return w.report()


@bug("BN402", "openpifpaf/openpifpaf#308")
def validation_whose_order_matters(fixed: bool) -> Diagnosis:
    """Validation batches were to be shuffled, for the norms ran on each batch: evaluation mode was what was missing."""
    model = conv_net()
    optimizer = sgd(model)
    videos = [images(16, shift=float(i)) for i in range(4)]
    with bnfix.watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            train(model, optimizer, 8)
            if fixed:
                model.eval()
            with torch.no_grad():
                for x in videos:
                    model(x)
    return w.report()


@bug("BN404", "pytorch/pytorch#96136")
def checkpointing_updates_twice(fixed: bool) -> Diagnosis:
    """The recomputed forward updates statistics once more; norms outside of what is recomputed are left alone."""
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(8):
            x = images().requires_grad_()
            if fixed:  # convolutions alone are recomputed
                y = model[2](model[1](checkpoint(model[0], x, use_reentrant=False)))
                y = model[5](model[4](checkpoint(model[3], y, use_reentrant=False)))
            else:
                y = checkpoint(model[:6], x, use_reentrant=False)
            step(optimizer, model[6:](y))
    return w.report()


@bug("BN405", "open-mmlab/mmcv#1869")
def accumulation_is_no_large_batch(fixed: bool) -> Diagnosis:
    """The fix: a group norm in the layer that has too few values, which needs no batch."""
    model = conv_net()
    if fixed:
        model[9] = nn.GroupNorm(4, 8)
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(8):
            optimizer.zero_grad()
            for x in loader(8, 4):
                (model(x).square().mean() / 8).backward()
            optimizer.step()
    return w.report()


@bug("BN303", "keras-team/keras#11927")
def triplets_through_a_shared_encoder(fixed: bool) -> Diagnosis:
    """Anchors are of another kind than what they are compared with: three forwards, one set of statistics."""
    net = conv_net(8)
    optimizer = sgd(net, lr=0.01)
    encode = bnfix.joint(net) if fixed else lambda *xs: tuple(net(x) for x in xs)
    with bnfix.watch(net, optimizer) as w:
        for _ in range(16):
            a, p, n = encode(images(shift=1.5), images(scale=0.5), images(scale=0.5))
            loss = ((a - p).square().sum(1) - (a - n).square().sum(1) + 0.2).relu().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return w.report()


@bug("BN303", "scikit-adaptation/skada#252")
def source_and_target_domain_in_forwards_of_their_own(fixed: bool) -> Diagnosis:
    """DeepCORAL: labels on the source, alignment on the target, one forward for each."""
    features, head = conv_net(8), nn.Linear(8, 3)
    model = nn.Sequential(features, head)
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(16):
            source, target = images(), images(shift=2.0, scale=0.6)
            if fixed:
                s, t = features(torch.cat([source, target])).chunk(2)
            else:
                s, t = features(source), features(target)
            loss = nn.functional.cross_entropy(head(s), torch.randint(3, (32,))) + (s.T.cov() - t.T.cov()).norm()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return w.report()


class DenseHead(nn.Module):
    """The head of ATSS or RetinaNet: one tower of convolutions for all levels of the pyramid, its norms as told."""

    def __init__(self, levels: int, shared: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(1 if shared else levels)])
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        norms = list(self.norms) * (len(levels) // len(self.norms))
        return [self.out(norm(self.conv(x)).relu()) for norm, x in zip(norms, levels, strict=True)]


@bug("BN303", "open-mmlab/mmdetection#6515")
def one_norm_for_all_levels_of_a_pyramid(fixed: bool) -> Diagnosis:
    """Group norms of a shared head became batch norms: worse in spite of large batches. SepBN is the remedy."""
    model = DenseHead(3, shared=not fixed)
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(16):
            levels = [images(16), images(16, 1.0)[..., :4, :4], images(16, 2.0)[..., :2, :2]]
            step(optimizer, *model(levels))
    return w.report()


@bug("BN406", "huggingface/peft#1732")
def adapters_are_saved_without_buffers(fixed: bool) -> Diagnosis:
    """What was trained is saved and loaded again, ``modules_to_save`` and all; statistics are no parameters."""
    tuned = nn.Sequential(conv_net(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    tuned[0].requires_grad_(False).eval()
    train(tuned, sgd(tuned), 8)
    saved = {k: v.detach() for k, v in tuned.named_parameters() if v.requires_grad}
    if fixed:
        saved |= {k: v for k, v in tuned.named_buffers() if k.startswith("2.")}
    model = nn.Sequential(conv_net(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with bnfix.watch(model) as w:
        model.load_state_dict(saved, strict=False)
        model.eval()
        with torch.no_grad():
            model(images())
    return w.report()
