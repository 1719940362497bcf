"""Where bnfix comes from: a Siamese network that is fine in training mode and lost in evaluation mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfix

datasets = pytest.importorskip("sklearn.datasets")


def mlp(width: int, hidden: int, out: int) -> list[nn.Module]:
    return [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)]


class Siamese(nn.Module):
    """Encoder, projection and prediction, as in the write-up; each norm is called three times."""

    def __init__(self) -> None:
        super().__init__()
        encoder = [*mlp(64, 128, 64), nn.BatchNorm1d(64), nn.ReLU()]
        self.net = nn.Sequential(*encoder, *mlp(64, 64, 64), *mlp(64, 32, 32))

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        return self.net(a), self.net(p), self.net(n)


class Digits:
    """Cross-modal triplets of digits: the anchor as it is, the others inverted."""

    def __init__(self, seed: int) -> None:
        x, y = datasets.load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
        self.draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.x), generator=self.draw)
        self.train, self.test = order[:1200], order[1200:]

    def triplets(self, of: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        by_class = [of[self.y[of] == c] for c in range(10)]

        def one(c: int) -> Tensor:
            return by_class[c][torch.randint(len(by_class[c]), (1,), generator=self.draw)][0]

        anchors = of[torch.randint(len(of), (count,), generator=self.draw)]
        classes = self.y[anchors].tolist()
        others = [(c + int(torch.randint(1, 10, (1,), generator=self.draw))) % 10 for c in classes]
        p, n = torch.stack([one(c) for c in classes]), torch.stack([one(c) for c in others])
        return self.x[anchors], 1 - self.x[p], 1 - self.x[n]


def loss(outputs: Any) -> Tensor:
    return F.triplet_margin_loss(*(F.normalize(o, dim=1) for o in outputs), margin=1.0)


def test_unshare_and_recalibrate_bring_a_lost_siamese_network_back_without_training() -> None:
    torch.manual_seed(0)
    digits = Digits(0)
    model = Siamese()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(800):
        value = loss(model(*digits.triplets(digits.train, 64)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    test = digits.triplets(digits.test, 1000)
    model.eval()
    loader = [digits.triplets(digits.train, 128) for _ in range(10)]
    with torch.no_grad():
        lost = loss(model(*test)).item()
        apart = bnfix.unshare(model, loader[0]).model
        assert loss(apart(*test)).item() == lost  # nothing has changed yet, to the bit
        report = bnfix.recalibrate(apart, loader)
        healed = loss(apart(*test)).item()
        bnfix.recalibrate(model, loader)
        pooled = loss(model(*test)).item()
    assert len(report.layers) == 3 * 4
    print(f"eval loss {lost:.3f}, un-shared and recalibrated {healed:.3f}, pooled {pooled:.3f}")
    assert lost > 0.6
    assert healed < 0.1
    assert pooled > 3 * healed  # one set of statistics fits no branch
