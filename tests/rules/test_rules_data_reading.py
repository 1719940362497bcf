"""What is read of the data for a check: once, whatever the model is, and counted in samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rules.data_common import Counting, codes
from torch import Tensor, nn

import bnfix
from bnfix.evidence import measuring, of_model
from bnfix.rules.data_cases import batches, conv_net, fit, head_net, images, norms_of, store, trained


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("sort", ["scripted", "traced"])
def test_a_generator_is_read_once_for_a_torchscript_program_too(sort: str) -> None:
    model = fit(conv_net(), batches(images()))
    norms_of(model)[0].running_var.mul_(9)
    script = torch.jit.script(model) if sort == "scripted" else torch.jit.trace(model, images(2))
    data = Counting(batches(images(160)))
    found = bnfix.check(script, data=(batch for batch in data))
    assert (data.passes, data.taken) == (1, 10)
    assert found.seen == ("measured on 160 samples, 10 batches",)
    assert codes(found) == {"BN204"}


class Detector(nn.Module):
    """A list of images (3, H, W), as torchvision's detectors take it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, seen: list[Tensor]) -> Tensor:
        return self.net(torch.stack(list(seen)))


def test_lists_of_images_are_counted_in_images() -> None:
    x = images(192)
    model = fit(Detector().eval(), [[list(part)] for part in batches(x)], lambda m, b: m(b[0]))

    def stream() -> Iterator[Any]:
        for part in batches(x):
            yield tuple(part), tuple({"boxes": torch.ones(i, 4)} for i in range(len(part)))

    found = bnfix.check(model, data=stream(), forward=lambda m, b: m(b[0]))
    assert found.seen == ("measured on 192 samples, 12 batches",)
    assert "BN204" in found.checked
    assert found.clean


# ------------------------------------------------------------------------------ behind the first norm


def by_strength(classes: int, each: int, count: int = 40) -> list[Tensor]:
    """Batches of so many of forty classes; a class is how strong the noise is: no mean tells them apart."""
    rng = torch.Generator().manual_seed(0)
    strength = torch.rand(40, 1, 1, 1, generator=rng) * 4
    drawn = [torch.randperm(40, generator=rng)[:classes].repeat_interleave(each) for _ in range(count)]
    return [strength[d] * torch.randn(len(d), 3, 6, 6, generator=rng) for d in drawn]


def two_norms() -> nn.Module:
    """The second one sees what a rectifier makes of the first one's outputs: means that depend on the strength."""
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 5)]
    return trained(nn.Sequential(*layers))


def test_sorted_batches_are_seen_where_what_they_share_shows() -> None:
    data = by_strength(1, 32)
    (finding,) = bnfix.check(fit(two_norms(), data), data=data).by_code("BN304")
    assert finding.sites == ("3",)
    assert finding.measured["share"] > 0.3


@pytest.mark.parametrize(("classes", "each"), [(8, 4), (8, 16), (32, 1)])
def test_eight_classes_a_batch_stay_clean_at_every_norm(classes: int, each: int) -> None:
    data = by_strength(classes, each)
    assert not bnfix.check(fit(two_norms(), data), data=data).by_code("BN304")


def test_padding_is_seen_behind_strides() -> None:
    rng = torch.Generator().manual_seed(0)
    x = 2 + torch.randn(384, 4, 16, generator=rng)
    counts = torch.arange(16) < 4 * torch.randint(1, 4, (384, 1), generator=rng)
    x = x * counts.unsqueeze(1)
    model = trained(nn.Sequential(nn.Conv1d(4, 6, 2, stride=2, bias=False), nn.BatchNorm1d(6), nn.Conv1d(6, 5, 1)))
    data = [{"input": a, "mask": b} for a, b in zip(batches(x), batches(counts), strict=True)]
    with torch.no_grad():
        seen = model[0](x)
    norm = norms_of(model)[0]
    for padded in (True, False):
        values = seen.transpose(0, 1).flatten(1) if padded else seen.transpose(0, 1)[:, counts[:, ::2]]
        store(norm, values.mean(1), values.var(1))
        found = bnfix.check(model, data=data, mask="mask").by_code("BN305")
        assert bool(found) == padded


def test_shared_norms_are_iterated_as_far_as_the_gate_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarser than recalibrate does it; what the gate reads is the same to a hundredth."""

    def both(model: nn.Module, batch: Any) -> Any:
        return model(batch[0]), model(batch[1])

    pairs = list(zip(batches(images()), batches(images(seed=1) + 1), strict=True))
    model = fit(head_net(), pairs, both)
    norms_of(model)[0].running_var.mul_(3)
    found = [of_model(model, data=pairs, forward=both).data]
    monkeypatch.setattr(measuring, "SETTLED", 0.0)
    found.append(of_model(model, data=pairs, forward=both).data)
    coarse, fine = (d.drift for d in found if d is not None)
    assert coarse is not None
    assert fine is not None
    assert fine.change is not None
    assert fine.change > 0.2
    assert coarse.change == pytest.approx(fine.change, rel=0.01)
    assert coarse.null == pytest.approx(fine.null, rel=0.05)


def test_recalibrate_heals_what_check_warns_of() -> None:
    from bnfix.calibration import judging
    from bnfix.rules.codes.bn204_stale_stats import StaleStats

    asked: dict[str, float] = {}

    class Asking(StaleStats):
        def option(self, evidence: Any, name: str, default: float) -> float:
            asked[name] = default
            return default

    data = batches(images())
    list(Asking().check(of_model(fit(conv_net(), data), data=data)))
    assert (asked["change"], asked["over_null"]) == (judging.CHANGE, judging.OVER_NULL)
