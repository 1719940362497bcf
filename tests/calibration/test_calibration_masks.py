"""Padded positions: what a mask leaves out of a norm's statistics, and masks that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calib_nets import residual
from nets import lived_in
from torch import Tensor, nn
from trap_nets import EXACT, fails

import bnfix
from bnfix.errors import CalibrationError


class Words(nn.Module):
    """An embedding, norms over (N, C, L), and one over what is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(50, 6), nn.Conv1d(6, 5, 1)
        self.bn1, self.bn2, self.pooled = nn.BatchNorm1d(6), nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.bn2(self.conv(self.bn1(self.embed(ids).transpose(1, 2))))
        keep = mask[:, None].float()
        return self.pooled((x * keep).sum(2) / keep.sum(2))


def sentences(count: int = 300, size: int = 15) -> list[dict[str, Tensor]]:
    """Padded to the longest of each batch."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(count // size):
        lengths = torch.randint(3, 12, (size,), generator=generator)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.randint(1, 50, tuple(mask.shape), generator=generator)
        found.append({"ids": ids.masked_fill(~mask, 0), "mask": mask})
    return found


def test_integer_inputs() -> None:
    model = lived_in(Words())
    bnfix.recalibrate(model, sentences())
    assert max(residual(model, sentences(), lambda m, b: m(**b))) <= EXACT


@pytest.mark.parametrize("mask", ["mask", lambda b: b["mask"], lambda b: b["mask"].float()])
def test_masked_positions_do_not_count(mask: Any) -> None:
    model, batches = lived_in(Words()), sentences()
    bnfix.recalibrate(model, batches, mask=mask)
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        getattr(model, n).register_forward_pre_hook(lambda _m, a, n=n: seen.setdefault(n, []).append(a[0]))
        for n in ("bn1", "bn2", "pooled")
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    for name, inputs in seen.items():
        rows = [x.transpose(1, 2)[b["mask"]] if x.dim() == 3 else x for x, b in zip(inputs, batches, strict=True)]
        x, norm = torch.cat(rows).double(), getattr(model, name)
        assert ((x.mean(0) - norm.running_mean).abs() / x.std(0)).max() <= EXACT
        assert (x.var(0) / norm.running_var - 1).abs().max() <= EXACT


def test_a_model_that_leaves_padding_out_by_itself_takes_the_mask_too() -> None:
    """``h[mask]`` in front of a norm: its rows are the positions that count, in other numbers for each batch."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.bn1, self.bn2 = nn.Embedding(50, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            h = self.embed(ids)
            out = torch.zeros_like(h)
            out[mask] = self.bn1(h[mask])
            return self.bn2(out.transpose(1, 2))  # here padding is in the tensor, and has to be masked

    model, batches = lived_in(Packed()), sentences()
    bnfix.recalibrate(model, batches, mask="mask")
    x = torch.cat([model.embed(b["ids"])[b["mask"]] for b in batches]).detach().double()
    assert ((x.mean(0) - model.bn1.running_mean).abs() / x.std(0)).max() <= EXACT
    assert (x.var(0) / model.bn1.running_var - 1).abs().max() <= EXACT
    with torch.no_grad():
        y = model.bn1(x.float()).double()
    assert ((y.mean(0) - model.bn2.running_mean).abs() / y.std(0)).max() <= EXACT
    assert (y.var(0) / model.bn2.running_var - 1).abs().max() <= EXACT


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ("nope", "batch 0: no mask: KeyError: 'nope'"),
        (lambda b: 3, "batch 0: the mask is no tensor"),
        (lambda b: b["mask"][:, :2], "batch 0: bn1: its input has the positions"),
        (lambda b: b["mask"][:5], "batch 0: the mask has 5 rows, and the batch 15 samples"),
        (lambda b: b["mask"] & False, "the mask leaves no position"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, why: str) -> None:
    assert why in fails(lived_in(Words()), sentences(), CalibrationError, mask=mask)


def test_a_mask_that_fits_nothing_is_said_also_where_the_model_swallows_errors() -> None:
    class Swallows(Words):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.bn1(self.embed(ids).transpose(1, 2))
            try:
                return self.pooled(self.bn2(self.conv(x)[..., ::2]).mean(2))
            except Exception:  # noqa: BLE001
                return self.pooled(x[:, :5, 0])

    model = lived_in(Swallows())
    assert "bn2: its input has the positions" in fails(model, sentences(), CalibrationError, mask="mask")
