"""What is read of the data for a check: once, whatever the model is, and counted in samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rules.data_common import Counting, codes
from torch import Tensor, nn

import bnfix
from bnfix.rules.data_cases import batches, conv_net, fit, images, norms_of


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
