"""The network of ``bnfix demo``: three branches of one encoder, for the 8 x 8 digits that come with scikit-learn.

It learns that a digit (the anchor) is nearer to another of its class (the positive) than to one of another class (the
negative). Anchors are images as they are, positives and negatives are inverted: two kinds of input. The encoder is
called three times a step, so each of its norms sees both kinds, one after the other.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import bnfix

Triplet = tuple[Tensor, Tensor, Tensor]
Point = tuple[int, float, float]
"""Step, loss in train(), loss in eval(): same weights, same unseen triplets."""
EVERY = 10


class Skip(nn.Sequential):
    """What the layers make of their input, and the input itself."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x + made


class Encoder(nn.Sequential):
    """A vector [N, 32] for each image [N, 1, 8, 8]: encoder, projection and prediction, four norms.

    Three of them follow a linear layer and fold away. The input of ``mix.bn`` is also what the skip connection carries
    on: there is no layer that could take it up.
    """

    def __init__(self, width: int = 128) -> None:
        mix = Skip(OrderedDict(bn=nn.BatchNorm1d(width), relu=nn.ReLU(), linear=nn.Linear(width, width)))
        encoder = {"flat": nn.Flatten(), **layers("stem", 64, width), "mix": mix}
        heads = {**layers("project", width, 64), **layers("predict", 64, 32)}
        super().__init__(OrderedDict(encoder | heads | {"out": nn.Linear(32, 32)}))


def layers(name: str, inputs: int, outputs: int) -> dict[str, nn.Module]:
    """A linear layer, its norm, and what makes it bend."""
    norm = nn.BatchNorm1d(outputs)
    return {name: nn.Linear(inputs, outputs), f"{name}_bn": norm, f"{name}_relu": nn.ReLU()}


class Siamese(nn.Module):
    """Anchor, positive and negative, one after the other: three forwards of one network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Encoder()

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Triplet:
        return self.net(anchor), self.net(positive), self.net(negative)


class Digits:
    """1200 images to learn from, 597 to judge by, [N, 1, 8, 8] with values from 0 to 1, sorted by class; triplets."""

    def __init__(self, seed: int = 0) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        self.draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=self.draw)
        seen, unseen = (part[labels[part].argsort(stable=True)] for part in (order[:1200], order[1200:]))
        self.seen, self.seen_labels = images[seen], labels[seen]
        self.unseen, self.unseen_labels = images[unseen], labels[unseen]

    def triplets(self, count: int, *, unseen: bool = False) -> Triplet:
        """Anchors, positives and negatives, ``count`` of each, drawn at random."""
        images, labels = (self.unseen, self.unseen_labels) if unseen else (self.seen, self.seen_labels)
        sizes = labels.bincount(minlength=10)
        mine = torch.randint(10, (count,), generator=self.draw)
        other = (mine + torch.randint(1, 10, (count,), generator=self.draw)) % 10

        def one_of(classes: Tensor) -> Tensor:
            place = (torch.rand(count, generator=self.draw) * sizes[classes]).long()
            return images[(sizes.cumsum(0) - sizes)[classes] + place]

        return one_of(mine), 1 - one_of(mine), 1 - one_of(other)


def triplets() -> Iterator[Triplet]:
    """Triplets to learn from in ten batches of 128: what ``--data siamese_net.py:triplets`` takes."""
    digits = Digits()
    for _ in range(10):
        yield digits.triplets(128)


def images() -> Iterator[Tensor]:
    """Images to judge by in batches of 64: what ``--data siamese_net.py:images`` takes."""
    yield from torch.split(Digits().unseen, 64)


def loss(model: nn.Module, triplets: Triplet) -> Tensor:
    """The triplet loss on the unit sphere with margin 1: at 1.0 positives are no nearer than negatives."""
    a, p, n = (F.normalize(vectors, dim=1) for vectors in model(*triplets))
    return F.triplet_margin_loss(a, p, n, margin=1.0)


def train(model: Siamese, steps: int, progress: Callable[[str], None] = print) -> list[Point]:
    """A plain training loop; the loss on unseen triplets before it, and after every tenth step, in both modes."""
    digits, probe, curve = Digits(), Siamese(), list[Point]()
    unseen = digits.triplets(1000, unseen=True)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    for step in range(steps + 1):
        if step:
            model.train()
            value = loss(model, digits.triplets(64))
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if step % EVERY == 0 or step == steps:
            in_train, in_eval = in_both_modes(model, probe, unseen)
            curve.append((step, in_train, in_eval))
            progress(f"training, step {step} of {steps}: loss {in_train:.2f} in train(), {in_eval:.2f} in eval()")
    model.eval()
    return curve


@torch.no_grad()
def in_both_modes(model: nn.Module, probe: nn.Module, unseen: Triplet) -> tuple[float, float]:
    """The loss of ``model`` in train() and eval() mode, measured on ``probe``, so that its statistics stay."""
    losses = []
    for training in (True, False):
        probe.load_state_dict(model.state_dict())
        losses.append(loss(probe.train(training), unseen).item())
    return losses[0], losses[1]


@torch.no_grad()
def eval_loss(model: nn.Module) -> float:
    """The loss of ``model`` in eval() mode on the unseen triplets of the training curve."""
    return loss(model.eval(), Digits().triplets(1000, unseen=True)).item()


def anchor_encoder(model: nn.Module) -> nn.Module:
    """What is shipped: the branch of the anchors, with the norms of the first call where each call has its own."""
    branch = copy.deepcopy(model.get_submodule("net"))
    for path, norm in list(branch.named_modules()):
        if isinstance(norm, bnfix.NormPerCall):
            branch.set_submodule(path, norm[0])
    return branch.eval()


@torch.no_grad()
def neighbours(embed: Callable[[Tensor], Tensor]) -> list[int]:
    """For each unseen image the class that most of its five nearest among the others have, by their vectors."""
    digits = Digits()
    known, asked = (F.normalize(embed(images), dim=1).numpy() for images in (digits.seen, digits.unseen))
    return [int(i) for i in KNeighborsClassifier(5).fit(known, digits.seen_labels).predict(asked)]


def labels() -> list[int]:
    """What the unseen images show."""
    return [int(label) for label in Digits().unseen_labels]


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the network is small: more threads are slower
    train(Siamese(), 600)
