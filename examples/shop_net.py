"""A small network for the examples, as a user would have one: its own class in its own file."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShopNet(nn.Module):
    """Five classes from images [N, 3, H, W]; four norms, one of which nothing can take up."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.mix = nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.bn(self.conv(x)))
        x = x + torch.relu(self.mix(x))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def trained() -> ShopNet:
    """A ShopNet whose norms have seen data: a fresh one has nothing to fold in."""
    torch.manual_seed(0)
    model = ShopNet().train()
    for _ in range(20):
        model(torch.randn(16, 3, 24, 24) * 2 + 1)
    return model.eval()


def batches() -> list[Tensor]:
    """Batches as a loader would give them."""
    torch.manual_seed(1)
    return [torch.randn(8, 3, 24, 24) * 2 + 1 for _ in range(3)]


if __name__ == "__main__":
    torch.save(trained().state_dict(), "shop.pt")
    print("wrote shop.pt")
