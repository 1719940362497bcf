"""Recalibrations as the verb returns them; means, variances, errors and divergences that belong to one another."""

from __future__ import annotations

import dataclasses
import math
import random

from bnfix.types import LayerStats, Recalibration, Residual


def layer(
    site: str,
    channels: int = 16,
    drift: float = 0.1,
    *,
    call: int = 0,
    samples: int = 256,
    positions: int = 196,
    seed: int = 0,
) -> LayerStats:
    """A norm whose means moved by some ``drift`` standard deviations and whose variances by as much, relatively."""
    rng = random.Random(f"{site}@{call}/{seed}")
    mean = [2 * rng.random() - 1 for _ in range(channels)]
    var = [0.2 + 2 * rng.random() for _ in range(channels)]
    before = [m + drift * math.sqrt(v) * (2 * rng.random() - 1) for m, v in zip(mean, var, strict=True)]
    stored = [v * math.exp(drift * (2 * rng.random() - 1)) for v in var]
    known = samples > 1
    se_mean = [math.sqrt(0.1 * v / samples) if known else math.nan for v in var]
    se_var = [v * math.sqrt(0.2 / samples) if known else math.nan for v in var]
    kl = [
        0.5 * (v / s - 1 - math.log(v / s) + (m - b) ** 2 / s)
        for m, v, b, s in zip(mean, var, before, stored, strict=True)
    ]
    z = [(m - b) / e for m, b, e in zip(mean, before, se_mean, strict=True)]
    after = tuple(mean), tuple(var)
    columns = (tuple(before), tuple(stored), *after, *after, tuple(se_mean), tuple(se_var), tuple(z), tuple(kl))
    return LayerStats(site, call, samples * positions, samples, *columns)


def resnet50() -> list[LayerStats]:
    """The 53 norms of a ResNet-50, 26,560 channels; the deeper the more they drifted."""
    layers = [layer("bn1", 64, 0.01, positions=112 * 112)]
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        size = 112 // 2**stage
        for block in range(blocks):
            at, drift = f"layer{stage}.{block}", 0.02 * stage**2 + 0.01 * block
            layers += [layer(f"{at}.bn{n}", width, drift, positions=size**2) for n in (1, 2)]
            layers.append(layer(f"{at}.bn3", 4 * width, drift, positions=size**2))
            if block == 0:
                layers.append(layer(f"{at}.downsample.1", 4 * width, drift, positions=size**2))
    return layers


def dead(stats: LayerStats) -> LayerStats:
    """``stats`` with three channels without spread: dead before and now, since lately, and no longer."""
    var, stored, kl = list(stats.var), list(stats.var_before), list(stats.kl)
    var[:2], stored[0], stored[2], kl[:3] = [0.0, 0.0], 0.0, 0.0, [0.0, math.inf, math.inf]
    new = tuple(var)
    return dataclasses.replace(stats, var=new, var_after=new, var_before=tuple(stored), kl=tuple(kl))


MANY_NORMS = Recalibration(
    tuple(resnet50()),
    method="staged",
    why="all 256 samples fit (2.7 GB of 4 GB)",
    n=256,
    batches=16,
    forwards=1.03,
    replay=0.0,
    output_change=0.82,
    output_null=0.031,
    probe=64,
    used="element 0 of each tuple → x",
    seconds={"total": 41.3, "reading": 0.8, "estimating": 38.2, "judging": 2.3},
)
FEW_NORMS = Recalibration(
    (
        layer("stem.bn", drift=0.02),
        layer("body.0.bn", drift=0.9),
        layer("shared.bn", drift=0.3),
        layer("shared.bn", drift=0.4, call=1),
        layer("features.stage3.blocks.11.token_mixer.reparam.norm", drift=0.2),
    ),
    method="staged",
    why="shared.bn is called twice in a forward: its statistics are pooled and iterated",
    n=256,
    batches=4,
    passes=2,
    forwards=9.0,
    engine="one chunk",
    residual_before=Residual(1.2, 0.85),
    residual=Residual(3.9e-7, 6.4e-8),
    residual_fresh=Residual(0.03, 0.05),
    replay=0.0,
    iterations=8,
    output_change=0.21,
    frozen=("backbone.bn1", "backbone.bn2", "backbone.bn3", "backbone.bn4"),
    never_called=("aux.bn",),
    left=("head.bn", "teacher.bn"),
    left_why={"teacher.bn": "a script module, whose norms can't be seen"},
    used="key 'image' → x, key 'mask' → mask",
    ranks=2,
    advice=(
        "the call sites of shared.bn differ by 0.6 σ: no statistics fit both",
        "a norm for each call site   model = bnfix.unshare(model, example).model",
    ),
    notes=("test data leaks into statistics: calibrate on training data",),
)
PLANNED = Recalibration(
    (layer("bn", drift=0.3),),
    method="population",
    why="the loader has no end",
    n=4096,
    batches=128,
    engine="stream",
    changed=False,
    dry_run=True,
    residual_before=Residual(0.42, 0.3),
    output_change=0.12,
    output_null=0.03,
)
LEFT = Recalibration(
    (layer("bn1", drift=0.01), layer("bn2", drift=0.012)),
    method="staged",
    why="all samples fit",
    n=512,
    batches=8,
    changed=False,
    replay=0.0,
    output_change=0.021,
    output_null=0.018,
    advice=("recalibration changes nothing here: leave it",),
)
ONE_SAMPLE = Recalibration(
    (dead(layer("bn1", drift=0.5, samples=1)), layer("bn2", drift=0.5, samples=1)),
    method="online",
    why="batches of one",
    n=1,
    batches=1,
    engine="stream",
    residual=Residual(0.31, math.nan),
    output_change=math.nan,
)
NO_NORM = Recalibration((), method="staged", why="", n=0)
ALL_KEPT = Recalibration((), method="staged", why="", n=64, frozen=("bn1", "bn2"), never_called=("",))

RECALIBRATIONS = {
    "recalibrated-many": MANY_NORMS,
    "recalibrated-few": FEW_NORMS,
    "recalibrated-plan": PLANNED,
    "recalibrated-left": LEFT,
    "recalibrated-one-sample": ONE_SAMPLE,
    "recalibrated-no-norm": NO_NORM,
    "recalibrated-all-kept": ALL_KEPT,
}
