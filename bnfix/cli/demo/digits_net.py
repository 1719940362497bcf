"""The network of ``bnfix demo``: a small residual CNN for the 8 x 8 digits that come with scikit-learn.

Four of its five norms follow a convolution or a linear layer and fold away. ``mix_bn`` normalizes the sum of two
branches, and the sum is also what the skip connection carries on: there is no layer that could take it up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Scores for ten digits, [N, 10], from images [N, 1, 8, 8] with values from 0 to 1."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.mix_bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width * 4 * 4, 64)
        self.hidden_bn = nn.BatchNorm1d(64)
        self.classify = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = x + F.relu(self.bn1(self.conv1(x)))
        x = x + F.relu(self.bn2(self.conv2(F.relu(self.mix_bn(x)))))
        x = F.max_pool2d(x, 2).flatten(1)
        scores: Tensor = self.classify(F.relu(self.hidden_bn(self.hidden(x))))
        return scores


def _split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    parts = train_test_split(images.numpy(), digits.target, test_size=360, random_state=0, stratify=digits.target)
    seen, unseen, seen_labels, unseen_labels = (torch.tensor(p) for p in parts)
    return seen, seen_labels, unseen, unseen_labels


def images() -> Tensor:
    """The test images, [360, 1, 8, 8]."""
    return _split()[2]


def labels() -> list[int]:
    """What the test images show."""
    return [int(label) for label in _split()[3]]


def batches() -> Iterator[Tensor]:
    """Test images in batches of 60: what ``--data digits_net.py:batches`` takes."""
    yield from torch.split(images(), 60)


def pale(images: Tensor) -> Tensor:
    """What another scanner makes of the same digits: grey on grey."""
    return 0.3 * images + 0.5


def pale_batches() -> Iterator[Tensor]:
    """Pale training images, without labels, in batches of 64: what ``--data digits_net.py:pale_batches`` takes."""
    yield from torch.split(pale(_split()[0]), 64)


def predictions(model: nn.Module, seen: Tensor | None = None) -> list[int]:
    """The digit that ``model`` sees in each test image, or in each of ``seen``."""
    model.eval()
    with torch.no_grad():
        return [int(i) for i in model(images() if seen is None else seen).argmax(1)]


def train(epochs: int, progress: Callable[[str], None] = print, seed: int = 0) -> DigitsNet:
    """A network trained on the other images, in eval mode."""
    torch.manual_seed(seed)
    seen, labels, _, _ = _split()
    model = DigitsNet()
    steps = epochs * (len(seen) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        progress(f"training, epoch {epoch + 1} of {epochs}")
        order = torch.randperm(len(seen))[: len(seen) // 64 * 64]
        for rows in torch.split(order, 64):
            loss = F.cross_entropy(model(seen[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    trained = train(8)
    right = sum(p == t for p, t in zip(predictions(trained), labels(), strict=True))
    print(f"{right} of {len(labels())} right")
