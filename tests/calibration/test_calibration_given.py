"""What is given beside values: lengths that are none, buffers that are filled anew, masks, keys, generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from calib_nets import residual
from nets import lived_in
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trap_nets import EXACT, Two, exact, images

import bnfix
from bnfix.errors import CalibrationError


class Unsure(list[Tensor]):
    """What ``len`` says of it is no number of batches."""

    def __init__(self, said: Any) -> None:
        super().__init__(images())
        self.said = said

    def __len__(self) -> int:
        if isinstance(self.said, Exception):
            raise self.said
        return int(self.said)


@pytest.mark.parametrize("said", [RuntimeError("not now"), -5, 1 << 70, 0], ids=str)
def test_a_length_that_is_none(said: Any) -> None:
    lines: list[str] = []
    exact(Two(), images(), data=Unsure(said), progress=lines.append)
    assert not any("about 0 samples" in line for line in lines)


def test_more_samples_than_were_asked_for_are_not_said_to_be_asked_for() -> None:
    """With ``forward=`` a batch is not cut."""
    report = bnfix.recalibrate(Two(), images(), max_samples=20, forward=lambda m, b: m(b))
    assert report.n == 32
    assert "the 32 samples of the batches read fit" in report.why


class OneBuffer(DataLoader[Tensor]):
    """A loader of the user's class, which hands out one tensor, filled anew (as for a CUDA graph)."""

    memory = torch.empty(16, 3, 6, 6)

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        for batch in super().__iter__():
            yield self.memory.copy_(batch)


def test_one_buffer_from_a_loader_of_the_users_class() -> None:
    """Its batches were taken for those of torch's own collating: 2.9 σ off."""
    exact(Two(), images(), data=OneBuffer(torch.cat(images()), batch_size=16))  # type: ignore[arg-type]


def padded(masks_too: Callable[[Tensor], Any]) -> tuple[list[dict[str, Any]], Tensor]:
    """Sequences (8, 5, 7) with masks, and all positions that count, (5, n)."""
    g = torch.Generator().manual_seed(2)
    batches, seen = [], []
    for i in range(6):
        x, mask = torch.randn(8, 5, 7, generator=g) * (1 + i) + i, torch.rand(8, 7, generator=g) < 0.2 + 0.1 * i
        mask[:, 0] = True
        batches.append({"input": x, "mask": masks_too(mask)})
        seen.append(x.transpose(0, 1)[:, mask])
    return batches, torch.cat(seen, 1).double()


@pytest.mark.parametrize("how", ["one buffer", "NumPy"])
def test_masks_in_a_buffer_that_is_filled_anew_and_of_numpy(how: str) -> None:
    """A list holds its batches, not what a function makes of them: .52 σ off. NumPy's were "no tensor"."""
    batches, seen = padded((lambda m: m) if how == "one buffer" else (lambda m: m.numpy()))
    memory, norm = torch.empty(8, 7, dtype=torch.bool), nn.BatchNorm1d(5)
    fill: Any = (lambda b: memory.copy_(b["mask"])) if how == "one buffer" else "mask"
    bnfix.recalibrate(norm, batches, mask=fill)
    torch.testing.assert_close(norm.running_mean.double(), seen.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), seen.var(1), rtol=1e-5, atol=1e-5)


class Views(Two):
    """Takes several views of each sample at once."""

    def forward(self, views: list[Tensor]) -> Tensor:  # type: ignore[override]
        return torch.stack([super(Views, self).forward(v) for v in views]).mean(0)


def test_a_key_that_the_signature_names_may_hold_a_list() -> None:
    """Nothing is ambiguous there: it was refused."""
    model, other = Views(), Views()
    other.load_state_dict(model.state_dict())
    data = [{"views": [b, 2 * b], "label": torch.zeros(16)} for b in images()]
    report = bnfix.recalibrate(model, data)
    assert report.used.startswith("keys views")
    bnfix.recalibrate(other, [b["views"] for b in data], forward=lambda m, b: m(b))
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_parts_of_a_pair_for_two_inputs_are_offered() -> None:
    class Both(Two):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(a + b)

    with pytest.raises(CalibrationError) as caught:
        bnfix.recalibrate(Both(), [((b, b), torch.zeros(16)) for b in images()])
    assert "forward=lambda m, b: m(*b[0])" in str(caught.value.hint)


def test_a_forward_that_is_a_generator_runs() -> None:
    """None of its lines had run: "no batch norm was reached"."""

    def each(model: nn.Module, batch: Tensor) -> Iterator[Tensor]:
        for part in batch.split(4):
            yield model(part)

    model = lived_in(Two())
    bnfix.recalibrate(model, images(), forward=each)
    assert max(residual(model, images())) <= EXACT
