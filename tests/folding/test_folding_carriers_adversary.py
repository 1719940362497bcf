"""What stands between a norm and a layer, made to deceive: every axis of the same size, memory that is shared, values
that are kept, hooks in between. Whether a norm is folded or refused, the outputs stay, and so does what is kept.

All in float64, where nothing but an error of the fold is as large as 1e-12.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foldcheck import _flat
from nets import bits, lived_in, same_bits
from torch import Tensor, nn

import bnfix
from bnfix import Result

Way = Callable[[Any, Tensor], Any]
TOLERANCE = 1e-12


class Kit(nn.Module):
    """Layers and norms on four channels; the forward of a subclass uses some of them."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv, norm, transposed = (
            getattr(nn, f"Conv{rank}d"),
            getattr(nn, f"BatchNorm{rank}d"),
            getattr(nn, f"ConvTranspose{rank}d"),
        )
        self.a, self.b, self.c = conv(4, 4, 1), conv(4, 4, 3, padding=1, bias=False), conv(4, 4, 1, bias=False)
        self.wide, self.one, self.deep = conv(4, 8, 1), conv(4, 1, 1), conv(4, 4, 1, groups=4)
        self.next, self.then = conv(4, 4, 2), conv(4, 3, 1, bias=False)
        self.padded, self.same = conv(4, 4, 3, padding=1), conv(4, 4, 3, padding="same")
        self.mirror = conv(4, 4, 3, padding=1, padding_mode="reflect")
        self.around = conv(4, 4, 3, padding=(1,) * (rank - 1) + (2,), padding_mode="circular", groups=2)
        self.up, self.point, self.gaps = transposed(4, 4, 2), transposed(4, 4, 1), transposed(4, 4, 1, stride=2)
        self.eight = conv(8, 4, 1)
        self.lin, self.lin2, self.all = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4**rank, 3)
        self.bn, self.bn2, self.bn8, self.flat, self.flat8 = (
            norm(4),
            norm(4),
            norm(8),
            nn.BatchNorm1d(4),
            nn.BatchNorm1d(8),
        )
        self.drop, self.nothing, self.pool = nn.Dropout(0.5), nn.Identity(), nn.AdaptiveAvgPool2d(1)
        self.kept: Any = None


def kit(way: Way, rank: int = 2) -> nn.Module:
    return lived_in(type("Net", (Kit,), {"forward": way})(rank)).double()


def held(model: nn.Module, x: Tensor) -> Result:
    """Fold by the plan alone: a model that does the same, gradients or not. No proof is there to catch a wrong plan."""
    before = bits(model)
    result = bnfix.fold(model, x, verify=False)
    assert same_bits(model, before)
    assert [r.reason for r in result.refusals if r.defect] == []
    assert result.model is not None
    other = torch.randn(x.shape).double() * 1.5
    for grad in (False, True):
        try:
            expected = _seen(model, other, grad)
        except RuntimeError:  # PyTorch allows less with gradients on
            assert grad
            continue
        for _ in range(2):
            found = _seen(result.model, other, grad)
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert a.shape == b.shape
                assert (a - b).abs().max().item() <= TOLERANCE * max(1.0, b.abs().max().item()), (result.edits, grad)
    if bnfix.fold(result.model, x, dry_run=True).edits:  # planned, and perhaps found not to be possible
        again = bnfix.fold(result.model, x, verify=False).edits
        assert not again, f"a second fold changes {[e.site for e in again]}"
    return result


def _seen(model: nn.Module, x: Tensor, grad: bool) -> list[Tensor]:
    with torch.set_grad_enabled(grad):
        found = _flat(model(x.clone()))
    kept = getattr(model, "kept", None)
    found = [*found, *(_flat(kept) if kept is not None else [])]
    model.kept = None  # type: ignore[assignment]  # no tensor with a history, which can't be copied
    return [t.detach().clone() for t in found]


IMAGE, TOKENS = (4, 4, 4, 4), (4, 4, 4)  # every axis like the channels


@pytest.mark.parametrize("first", range(4))
def test_every_permutation_of_equal_axes(first: int) -> None:
    for order in itertools.permutations(range(4)):
        if order[0] == first:
            held(kit(lambda m, x, p=order: m.bn(m.b(x).permute(p))), torch.randn(IMAGE).double())  # type: ignore[misc]
            held(kit(lambda m, x, p=order: m.mirror(m.bn(x.relu()).permute(p))), torch.randn(IMAGE).double())  # type: ignore[misc]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_every_permutation_of_equal_axes_of_tokens(order: tuple[int, ...]) -> None:
    ways: list[Way] = [
        lambda m, x: m.bn(m.a(x).permute(order)),
        lambda m, x: m.bn(m.lin(x).permute(order)),
        lambda m, x: m.lin(m.bn(x.relu()).permute(order)),
        lambda m, x: m.next(m.bn(x.relu()).permute(order)),
        lambda m, x: m.lin2(m.bn(m.lin(x).permute(order)).permute(order)),
    ]
    for way in ways:
        held(kit(way, 1), torch.randn(TOKENS).double())


TOKEN_WAYS: dict[str, Way] = {
    "linear, no transposition": lambda m, x: m.bn(m.lin(x)),
    "norm, then linear over the length": lambda m, x: m.lin(m.bn(x.relu())),
    "LeViT": lambda m, x: m.flat(m.lin(x).flatten(0, 1)).reshape_as(x),
    "LeViT behind a convolution": lambda m, x: m.flat(m.a(x).flatten(0, 1)).reshape_as(x),
    "LeViT turned": lambda m, x: m.flat(m.a(x).mT.flatten(0, 1)).reshape_as(x),
    "LeViT, then another": lambda m, x: m.lin2(m.flat(m.lin(x).flatten(0, 1)).reshape_as(x)).relu(),
    "batch beside channels": lambda m, x: m.flat8(m.a(x).reshape(2, 8, 4)),
    "batch over channels": lambda m, x: m.bn(m.a(x).reshape(4, 4, 4).transpose(0, 1)),
    "reshape of the whole": lambda m, x: m.flat8(m.lin(x).reshape(-1, 8)),
    "reshape as a transposition would": lambda m, x: m.bn(m.a(x).reshape(-1).view(4, 4, 4).mT),
    "heads": lambda m, x: m.flat(m.lin(x).view(4, 4, 2, 2).permute(0, 2, 1, 3).reshape(8, 4, 2)),
    "heads as channels": lambda m, x: m.lin2(m.bn(x.relu()).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2).mT),
    "one channel widened": lambda m, x: m.bn(m.one(x).expand(-1, 4, -1)),
    "one place widened": lambda m, x: m.bn(m.a(x[..., :1]).expand(-1, -1, 4)),
    "batch widened": lambda m, x: m.bn(m.a(x[:1]).expand(4, -1, -1)),
    "widened, then changed": lambda m, x: m.bn(m.a(x[..., :1]).expand(-1, -1, 4)).add_(1),
    "widened, then viewed": lambda m, x: m.bn(m.a(x[..., :1]).expand(-1, -1, 4)).view(16, 4),
    "windows, then changed": lambda m, x: m.bn(m.a(x).unfold(-1, 2, 1)[..., 0]).relu_(),
    "windows": lambda m, x: m.bn(m.a(x).unfold(-1, 2, 1).flatten(2)).relu_(),
    "transposed, then viewed": lambda m, x: m.bn(m.lin(x).transpose(1, 2)).view(4, 16),
    "transposed, copied, then viewed": lambda m, x: m.bn(m.lin(x).transpose(1, 2).contiguous()).view(4, 16),
    "part, then viewed": lambda m, x: m.bn(m.a(torch.cat([x, x], -1))[..., ::2]).view(4, 16),
    "attention": lambda m, x: m.lin2((x @ x.mT).softmax(-1) @ m.bn(m.lin(x).mT).mT),
    "attention over the other axis": lambda m, x: m.lin2((x @ x.mT).softmax(-2) @ m.bn(x.relu().mT).mT),
    "attention, values turned": lambda m, x: m.lin2((x @ x.mT).softmax(-1) @ m.bn(x.relu())),
    "attention, on the right": lambda m, x: m.lin2((m.bn(x.relu()) @ (x @ x.mT).softmax(-1)).mT),
    "attention without softmax": lambda m, x: m.lin2((x @ x.mT).sigmoid() @ m.bn(x.relu().mT).mT),
    "attention masked": lambda m, x: m.lin2((x @ x.mT).softmax(-1).tril() @ m.bn(x.relu().mT).mT),
    "attention by norm": lambda m, x: m.bn(((x @ x.mT).softmax(-1) @ m.lin(x)).mT),
    "attention in one call": lambda m, x: m.lin2(F.scaled_dot_product_attention(x, x, m.bn(x.relu().mT).mT)),
    "attention, causal": lambda m, x: m.lin2(
        F.scaled_dot_product_attention(x, x, m.bn(x.relu().mT).mT, is_causal=True)
    ),
    "attention, one row masked": lambda m, x: m.lin2(
        F.scaled_dot_product_attention(x, x, m.bn(x.relu().mT).mT, attn_mask=torch.arange(4)[:, None] > 0)
    ).nan_to_num(),
    "attention, norm as key too": lambda m, x: m.lin2(F.scaled_dot_product_attention(x, y := m.bn(x.relu().mT).mT, y)),
    "einsum": lambda m, x: m.lin2(torch.einsum("nij,njc->nic", (x @ x.mT).softmax(-1), m.bn(x.relu().mT).mT)),
    "a row of ones": lambda m, x: m.lin2(torch.cat([m.bn(x.relu().mT).mT, torch.ones_like(x)], 1)),
    "linear by hand": lambda m, x: m.bn((x @ m.lin.weight.T + m.lin.bias).mT),
    "mean of tokens": lambda m, x: m.lin(m.bn(x.relu()).mean(-1)),
    "mean of channels": lambda m, x: m.lin(m.bn(x.relu()).mean(1)),
    "mean of all": lambda m, x: m.lin(m.bn(x.relu()).mean().expand(4, 4)),
    "mean of the batch": lambda m, x: m.lin(m.bn(x.relu()).mean(0)),
    "first token": lambda m, x: m.lin(m.bn(x.relu())[:, :, 0]),
    "first channel": lambda m, x: m.lin(m.bn(x.relu())[:, 0]),
    "first of the batch": lambda m, x: m.next(m.bn(x.relu())[:1]),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKEN_WAYS)
def test_tokens(name: str) -> None:
    held(kit(TOKEN_WAYS[name], 1), torch.randn(TOKENS).double())


POOLS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True, "padding": 1, "count_include_pad": False},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": (0, 1)},
    {"kernel_size": 2, "divisor_override": 3},
    {"kernel_size": 2, "divisor_override": 4},
    {"kernel_size": 3, "padding": 1, "count_include_pad": False, "divisor_override": 9},
]


@pytest.mark.parametrize("options", POOLS, ids=str)
def test_average_pooling(options: dict[str, Any]) -> None:
    x = torch.randn(IMAGE).double()
    held(kit(lambda m, x: m.bn(F.avg_pool2d(m.b(x), **options))), x)
    held(kit(lambda m, x: m.then(F.avg_pool2d(m.bn(x.relu()), **options))), x)
    held(kit(lambda m, x: m.lin(F.adaptive_avg_pool2d(F.avg_pool2d(m.bn(x.relu()), **options), 1).flatten(1))), x)


BACKWARD: dict[str, Way] = {
    "cat with itself": lambda m, x: m.bn8(torch.cat([y := m.a(x), y], 1)),
    "cat with itself, lengthwise": lambda m, x: m.bn(torch.cat([y := m.a(x), y], 2)),
    "cat with itself, in the batch": lambda m, x: m.bn(torch.cat([y := m.a(x), y])),
    "cat of one layer's calls": lambda m, x: m.bn8(torch.cat([m.a(x), m.a(x.relu())], 1)),
    "cat of one layer's calls, lengthwise": lambda m, x: m.bn(torch.cat([m.a(x), m.a(x.relu())], 3)),
    "cat lengthwise": lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], -1)),
    "cat with the input": lambda m, x: m.bn8(torch.cat([m.a(x), x], 1)),
    "cat with zeros": lambda m, x: m.bn8(torch.cat([m.a(x), torch.zeros_like(x)], 1)),
    "cat of parts, crosswise": lambda m, x: m.bn(torch.cat([m.a(x)[:, 2:], m.b(x)[:, :2]], 1)),
    "cat of overlapping parts": lambda m, x: m.bn(torch.cat([(y := m.a(x))[:, :3], y[:, 3:]], 1)),
    "cat, the parts in another order": lambda m, x: m.bn(torch.cat([(y := m.a(x))[:, 2:], y[:, :2]], 1)),
    "cat of one part twice": lambda m, x: m.bn(torch.cat([(y := m.a(x))[:, 2:], y[:, 2:]], 1)),
    "cat that is an output too": lambda m, x: (m.bn8(y := torch.cat([m.a(x), m.b(x)], 1)), y),
    "cat of which a part is read": lambda m, x: (m.bn8(y := torch.cat([m.a(x), m.b(x)], 1)), y[:, 1]),
    "stack": lambda m, x: nn.functional.relu(m.bn(torch.stack([m.a(x), m.b(x)], 2).flatten(2, 3))),
    "parts, one of them twice": lambda m, x: (m.bn((p := m.wide(x).chunk(2, 1))[0]), p[0] * 2, p[1]),
    "parts, one of them normalised": lambda m, x: (m.bn((p := m.wide(x).chunk(2, 1))[0]), p[1] * 2),
    "parts under one norm": lambda m, x: m.bn((p := m.wide(x).chunk(2, 1))[0]) * m.bn(p[1]),
    "parts under two norms": lambda m, x: m.bn((p := m.wide(x).chunk(2, 1))[0]) * m.bn2(p[1]),
    "parts under two norms, then in place": lambda m, x: m.bn((p := m.wide(x).chunk(2, 1))[0]).relu_() * m.bn2(p[1]),
    "a part under two norms": lambda m, x: m.bn((p := m.wide(x).chunk(2, 1))[0]) * m.bn2(p[0]) + p[1],
    "parts that overlap": lambda m, x: m.bn((y := m.wide(x))[:, :4]) * m.bn2(y[:, 3:7]),
    "parts that touch": lambda m, x: m.bn((y := m.wide(x))[:, :4]) * m.bn2(y[:, 4:]),
    "every second": lambda m, x: m.bn((y := m.wide(x))[:, ::2]) * m.bn2(y[:, 1::2]),
    "norm, then norm on a part": lambda m, x: m.bn2(m.bn8(m.wide(x))[:, 2:6]),
    "norm, then norm on each part": lambda m, x: m.bn((y := m.bn8(m.wide(x)))[:, 4:]) + m.bn2(y[:, :4]),
    "norm on parts, joined, norm": lambda m, x: m.bn8(
        torch.cat([m.bn((p := m.wide(x).chunk(2, 1))[0]), m.bn2(p[1])], 1)
    ),
    "places apart": lambda m, x: (m.bn((y := m.a(x))[..., 1:]), y[..., :1]),
    "part of the batch": lambda m, x: (m.bn((y := m.a(x))[1:]), y[:1]),
    "sum with itself": lambda m, x: m.bn((y := m.a(x)) + y),
    "sum of one layer's calls": lambda m, x: m.bn(m.a(x) + m.a(x.relu())),
    "sum of two": lambda m, x: m.bn(m.a(x) + m.b(x)),
    "sum of three": lambda m, x: m.bn(m.a(x) + m.b(x) + m.c(x)),
    "sum of three, one twice": lambda m, x: m.bn(m.a(x) + m.b(x) + m.a(x).flip(2)),
    "sum, in place": lambda m, x: m.bn(m.a(x).add_(m.b(x))),
    "sum with a factor": lambda m, x: m.bn(torch.add(m.a(x), m.b(x), alpha=2)),
    "sum with the input": lambda m, x: m.bn(m.a(x) + x),
    "sum with a number": lambda m, x: m.bn(m.a(x) + 1),
    "sum with a parameter": lambda m, x: m.bn(m.a(x) + m.c.weight.sum()),
    "difference": lambda m, x: m.bn(m.a(x) - m.b(x)),
    "sum, one widened": lambda m, x: m.bn(m.a(x) + m.b(x).mean((2, 3), keepdim=True)),
    "sum, one widened over channels": lambda m, x: m.bn(m.a(x) + m.one(x)),
    "sum, both widened": lambda m, x: m.bn(m.a(x)[:, :, :1] + m.c(x)[..., :1]),
    "sum, one term read again": lambda m, x: (m.bn(m.a(x) + (y := m.b(x))), y),
    "sum, one term normalised": lambda m, x: m.bn2(m.bn(m.a(x)) + m.b(x)),
    "sum, both terms normalised by one": lambda m, x: m.bn2(m.bn(m.a(x)) + m.bn(m.b(x))),
    "sum of norm and its input": lambda m, x: m.bn2(m.bn(y := m.a(x)) + y),
    "sum, normalised twice": lambda m, x: m.bn2(y := m.a(x) + m.b(x)) + m.bn(y),
    "sum of parts": lambda m, x: m.bn((p := m.wide(x).chunk(2, 1))[0] + p[1]),
    "one norm on a sum and on a term": lambda m, x: m.bn(m.a(x) + m.b(x)) + m.bn(m.c(x)),
    "zeros beside": lambda m, x: m.bn(F.pad(m.a(x), (1, 1))),
    "zeros as channels": lambda m, x: m.bn8(F.pad(m.a(x), (0, 0, 0, 0, 0, 4))),
    "cut": lambda m, x: m.bn(F.pad(m.a(x), (-1, 0))),
    "reflected": lambda m, x: m.bn(F.pad(m.a(x), (1, 2, 0, 1), mode="reflect")),
    "reflected channels": lambda m, x: m.bn8(F.pad(m.a(x)[:, None], (0, 0, 0, 0, 2, 2), mode="replicate").squeeze(1)),
    "pixels": lambda m, x: m.bn(F.pixel_unshuffle(m.one(x), 2)),
    "pixels back": lambda m, x: m.flat(F.pixel_shuffle(m.a(x), 2).reshape(4, 4, -1)),
    "turned by 90": lambda m, x: m.bn(m.a(x).rot90(1, (1, 2))),
    "rolled channels": lambda m, x: m.bn(m.a(x).roll(1, 1)),
    "repeated channels": lambda m, x: m.bn8(m.a(x).repeat(1, 2, 1, 1)),
    "repeated places": lambda m, x: m.bn(m.a(x).repeat(2, 1, 1, 3)),
    "chosen channels": lambda m, x: m.bn(m.wide(x)[:, [7, 0, 0, 1]]),
    "interpolated": lambda m, x: m.bn(F.interpolate(m.a(x), scale_factor=1.5, mode="bilinear")),
    "interpolated, bicubic": lambda m, x: m.bn(F.interpolate(m.a(x), scale_factor=0.7, mode="bicubic")),
    "interpolated, antialias": lambda m, x: m.bn(F.interpolate(m.a(x), size=(3, 3), mode="bilinear", antialias=True)),
    "interpolated, area": lambda m, x: m.bn(F.interpolate(m.a(x), size=(3, 3), mode="area")),
    "grid sample": lambda m, x: m.bn(F.grid_sample(m.a(x), x[:, :2].permute(0, 2, 3, 1), align_corners=False)),
    "transposed with gaps": lambda m, x: m.bn(m.gaps(x)),
    "dtype there and back": lambda m, x: m.bn(m.a(x).float().double()),
    "complex": lambda m, x: m.bn(torch.view_as_real(torch.complex(m.a(x), m.b(x)))[..., 0]),
    "largest of one": lambda m, x: m.bn(F.max_pool2d(m.a(x), 1)),
    "sorted": lambda m, x: m.bn(m.a(x).sort(-1)[0]),
    "unused norm's value": lambda m, x: (m.bn(y := m.a(x)), y)[1],
    "norm used for its shape": lambda m, x: m.a(x) * m.bn(m.b(x)).shape[1],
    "norm on the input": lambda m, x: m.bn(x).relu(),
    "norm of what it gives": lambda m, x: m.bn(m.bn(m.a(x))),
    "norm on two sizes": lambda m, x: m.bn(m.a(x)).mean() * m.bn(m.a(x[..., 1:])),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    held(kit(BACKWARD[name]), torch.randn(IMAGE).double())


FORWARD: dict[str, Way] = {
    "unpadded": lambda m, x: m.next(m.bn(x)),
    "zeros beside": lambda m, x: m.padded(m.bn(x)),
    "same": lambda m, x: m.same(m.bn(x)),
    "zeros by hand": lambda m, x: m.next(F.pad(m.bn(x), (1, 0, 1, 0))),
    "reflected by hand": lambda m, x: m.next(F.pad(m.bn(x), (1, 0, 1, 0), mode="reflect")),
    "reflected": lambda m, x: m.mirror(m.bn(x)),
    "circular in groups": lambda m, x: m.around(m.bn(x)),
    "depthwise": lambda m, x: m.deep(m.bn(x)),
    "transposed": lambda m, x: m.up(m.bn(x)),
    "transposed point": lambda m, x: m.point(m.bn(x)),
    "transposed with gaps": lambda m, x: m.gaps(m.bn(x)),
    "one padded, one not": lambda m, x: m.padded(y := m.bn(x)) + m.a(y),
    "two layers": lambda m, x: m.mirror(y := m.bn(x)) + m.a(y),
    "one layer twice": lambda m, x: m.a(y := m.bn(x)) * m.a(y.flip(2)),
    "one layer on two norms": lambda m, x: m.a(m.bn(x)) * m.a(m.bn2(x)),
    "one layer, once without": lambda m, x: m.a(m.bn(x)) * m.a(x),
    "one layer on one norm twice": lambda m, x: m.a(m.bn(x)) * m.a(m.bn(x.relu())),
    "one norm before two layers": lambda m, x: m.a(m.bn(x)) * m.mirror(m.bn(x.relu())),
    "one norm, once to the output": lambda m, x: m.a(m.bn(x)) * m.bn(x.relu()),
    "norm given back too": lambda m, x: (m.a(y := m.bn(x)), y),
    "norm added behind": lambda m, x: m.a(y := m.bn(x)) + y,
    "norm on both sides": lambda m, x: m.bn2(m.next(m.bn(x))),
    "norm on both sides, cat": lambda m, x: m.bn8(torch.cat([m.a(y := m.bn(x)), m.mirror(y)], 1)),
    "norm on both sides of a shared layer": lambda m, x: m.bn2(m.a(m.bn(m.a(x)))),
    "norm behind norm": lambda m, x: m.next(m.bn2(m.bn(x))),
    "norm behind norm, read between": lambda m, x: m.next(m.bn2(y := m.bn(x))) + m.next(y),
    "flattened": lambda m, x: m.all(torch.cat([m.bn(x)[..., 0], m.bn(x)[..., 1]], 1).flatten(1)[:, :16]),
    "flattened, channels last": lambda m, x: m.all(m.bn(x)[..., 0].mT.flatten(1)),
    "pooled": lambda m, x: m.lin(m.pool(m.bn(x)).flatten(1)),
    "pooled, then dropout": lambda m, x: m.lin(m.drop(m.pool(m.bn(x)).flatten(1))),
    "mean": lambda m, x: m.lin(m.bn(x).mean((2, 3))),
    "mean of channels": lambda m, x: m.lin(m.bn(x).mean((1, 2))),
    "sum of places": lambda m, x: m.lin(m.bn(x).sum((2, 3))),
    "largest": lambda m, x: m.lin(m.bn(x).amax((2, 3))),
    "linear over the width": lambda m, x: m.lin(m.bn(x)),
    "linear over channels": lambda m, x: m.lin(m.bn(x).permute(0, 2, 3, 1)),
    "linear over channels of a part": lambda m, x: m.lin(m.bn(x)[:, :, 1].mT),
    "part to one layer, part to another": lambda m, x: m.eight(torch.cat([(y := m.bn(x))[:, :2], y, y[:, 2:]], 1)),
    "part dropped": lambda m, x: m.eight(torch.cat([m.bn(x)[:, :2], x, x[:, :2]], 1)),
    "cat with the input": lambda m, x: m.eight(torch.cat([m.bn(x), x], 1)),
    "cat with itself": lambda m, x: m.eight(torch.cat([y := m.bn(x), y], 1)),
    "cat of two norms": lambda m, x: m.eight(torch.cat([m.bn(x), m.bn2(x)], 1)),
    "cat of one norm's calls": lambda m, x: m.eight(torch.cat([m.bn(x), m.bn(x.relu())], 1)),
    "cat in the batch": lambda m, x: m.next(torch.cat([m.bn(x), x])),
    "cat lengthwise": lambda m, x: m.next(torch.cat([m.bn(x), x], 2)),
    "sum with itself": lambda m, x: m.next((y := m.bn(x)) + y),
    "sum of two norms": lambda m, x: m.next(m.bn(x) + m.bn2(x.relu())),
    "sum with the input": lambda m, x: m.next(m.bn(x) + x),
    "chunks": lambda m, x: m.eight(torch.cat([m.bn8(torch.cat([x, x * 2], 1)).chunk(2, 1)[1], x], 1)),
    "chunks each to a layer": lambda m, x: m.next((p := m.bn8(torch.cat([x, x * 2], 1)).chunk(2, 1))[0]) + m.next(p[1]),
    "chunks to two layers": lambda m, x: m.a((p := m.bn8(torch.cat([x, x * 2], 1)).chunk(2, 1))[0]) + m.mirror(p[1]),
    "widened": lambda m, x: m.a(m.bn(x[..., :1]).expand(-1, -1, -1, 4)),
    "widened by zeros": lambda m, x: m.eight(F.pad(m.bn(x), (0, 0, 0, 0, 2, 2))),
    "repeated channels": lambda m, x: m.eight(m.bn(x).repeat(1, 2, 1, 1)),
    "rolled": lambda m, x: m.a(m.bn(x).roll((1, 1), (1, 2))),
    "shuffled": lambda m, x: m.around(F.channel_shuffle(m.bn(x), 2)),
    "masked": lambda m, x: m.a(m.bn(x).masked_fill(x > 0.5, 0)),
    "weighted": lambda m, x: m.a(m.bn(x) * x.sigmoid()),
    "as a weight": lambda m, x: F.conv2d(x, m.bn(x)),
    "as a bias": lambda m, x: F.linear(x, m.lin.weight, m.bn(x)[0, 0, 0]),
    "as both": lambda m, x: F.conv2d(y := m.bn(x), y),
    "functional": lambda m, x: F.conv2d(m.bn(x), m.c.weight),
    "functional, with another bias": lambda m, x: F.conv2d(m.bn(x), m.c.weight, m.a.bias) + m.a(x),
    "bias shared": lambda m, x: F.conv2d(m.bn(x), m.a.weight, m.padded.bias) + m.padded(x),
    "unbatched": lambda m, x: m.next(m.bn(x)[0]),
    "unbatched, other axis": lambda m, x: m.next(m.bn(x)[:, 0]),
    "layer under no_grad": lambda m, x: _no_grad(m, x),
}  # fmt: skip


def _no_grad(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    with torch.no_grad():
        out: Tensor = m.next(y)
    return out


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    """Behind a sigmoid: nothing takes the norm up there."""
    held(kit(lambda m, x: FORWARD[name](m, x.sigmoid())), torch.randn(IMAGE).double())


def _then(*steps: Callable[[dict[str, Any]], object]) -> Way:
    """A forward of several statements on the names m, x, y, z; what the last one gives is returned."""

    def way(m: Any, x: Tensor) -> Any:
        names: dict[str, Any] = {"m": m, "x": x}
        out: object = None
        for step in steps:
            out = step(names)
        return out

    return way


def _put(name: str, value: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda v: v.update({name: value(v)})


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "relu_": lambda t: t.relu_(),
    "mul_": lambda t: t.mul_(2),
    "a part": lambda t: t[:, :2].mul_(2),
    "a channel set": lambda t: t.__setitem__((slice(None), 1), 0.5),
    "a view": lambda t: t.flatten(1)[:, 1::2].add_(1),
    "detached": lambda t: t.detach().add_(1),
    "data": lambda t: t.data.add_(1),
    "chunk": lambda t: t.chunk(2, 1)[1].mul_(3),
    "expanded": lambda t: t.view_as(t).add_(t.flip(1)),
    "functional": lambda t: F.relu(t, inplace=True),
    "out=": lambda t: torch.add(t, 1, out=t),
    "copy_": lambda t: t.copy_(t.sin()),
    "several at once": lambda t: torch._foreach_mul_([t.sin(), t], 2.0),
    "index_fill_": lambda t: t.index_fill_(1, torch.tensor([0]), 0.5),
    "transpose_": lambda t: t.transpose_(2, 3),
    "diagonal": lambda t: t.diagonal(dim1=1, dim2=2).fill_(1.0),
    "unbind": lambda t: t.unbind(1)[0].mul_(2),
    "as_strided": lambda t: t.as_strided((4,), (1,)).mul_(2),
    "unfold": lambda t: t.unfold(2, 2, 2)[..., 0].mul_(2),
    "real": lambda t: t.real.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_in_place(change: str) -> None:
    """A value is changed while another name, which a fold may turn into the same memory, is still to be read."""
    act = CHANGES[change]

    def input_behind(m: Any, x: Tensor) -> Any:
        x = x.sigmoid()
        y = m.bn(x)
        act(x)
        return m.next(y)

    def input_behind_and_read(m: Any, x: Tensor) -> Any:
        x = x.sigmoid()
        y = m.bn(x)
        act(x)
        return m.next(y), x

    def output(m: Any, x: Tensor) -> Any:
        y = m.bn(x.sigmoid())
        act(y)
        return m.next(y)

    def output_behind(m: Any, x: Tensor) -> Any:
        x = x.sigmoid()
        y = m.bn(x)
        z = m.next(y)
        act(y)
        return z, x

    def through_a_view(m: Any, x: Tensor) -> Any:
        x = x.sigmoid()
        y = m.bn(x.transpose(2, 3))
        act(x)
        return m.next(y.transpose(2, 3))

    def layers_output_before(m: Any, x: Tensor) -> Any:
        y = m.b(x)
        view = y.flatten(2).view_as(y)
        act(y)
        return m.bn(view)

    def layers_output_behind(m: Any, x: Tensor) -> Any:
        y = m.b(x)
        z = m.bn(y)
        act(y)
        return z

    def norms_output(m: Any, x: Tensor) -> Any:
        y = m.bn(m.drop(m.b(x)).roll(1, 1))
        act(y)
        return y * 2

    def norm_of_a_part(m: Any, x: Tensor) -> Any:
        y = m.wide(x)
        left, right = y.chunk(2, 1)
        z = m.bn(left)
        act(z)
        return z, right

    def other_part(m: Any, x: Tensor) -> Any:
        y = m.wide(x)
        z = m.bn(y[:, 4:])
        act(y[:, :4])
        return z, y[:, :4]

    def overlapping_part(m: Any, x: Tensor) -> Any:
        y = m.wide(x)
        z = m.bn(y[:, 4:])
        act(y[:, 2:6])
        return z, y[:, :2]

    def norm_of_a_widened(m: Any, x: Tensor) -> Any:
        y = m.bn(m.a(x[:1, :, :1]).expand(4, -1, 4, -1))
        act(y)
        return y.sin()

    def term_of_a_sum(m: Any, x: Tensor) -> Any:
        y, z = m.a(x), m.b(x)
        s = y + z
        act(y)
        return m.bn(s), y

    usual: list[Way] = [input_behind, norms_output, layers_output_before]
    thorough: list[Way] = [
        input_behind_and_read, output, output_behind, through_a_view, layers_output_behind, norm_of_a_part, other_part,
        overlapping_part, norm_of_a_widened, term_of_a_sum,
    ]  # fmt: skip
    for way in usual + (thorough if change in ("mul_", "a view", "out=", "transpose_") else []):
        model = kit(way)
        try:
            model(torch.randn(IMAGE).double())
        except RuntimeError:
            continue
        held(model, torch.randn(IMAGE).double())


KEEPS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda t: t,
    "detached": lambda t: t.detach(),
    "a part": lambda t: t[:, 1:],
    "a view": lambda t: t.flatten(1),
    "in a list": lambda t: [t],
    "in a dict": lambda t: {"y": t},
    "a copy": lambda t: t.clone(),
    "its mean": lambda t: t.mean((2, 3)),
    "its mean as a number": lambda t: t.detach().mean(),
}


@pytest.mark.parametrize("keep", KEEPS)
def test_kept_for_whoever_asks_later(keep: str) -> None:
    store = KEEPS[keep]

    def layer(m: Any, x: Tensor) -> Any:
        y = m.b(x)
        m.kept = store(y)
        return m.bn(y)

    def between(m: Any, x: Tensor) -> Any:
        y = m.drop(m.b(x)).flip(2)
        m.kept = store(y)
        return m.bn(y.roll(1, 2))

    def cat(m: Any, x: Tensor) -> Any:
        y = torch.cat([m.a(x), m.b(x)], 1)
        m.kept = store(y)
        return m.bn8(y)

    def sum_(m: Any, x: Tensor) -> Any:
        y = m.a(x) + m.b(x)
        m.kept = store(y)
        return m.bn(y)

    def pooled(m: Any, x: Tensor) -> Any:
        y = F.avg_pool2d(m.a(x), 2)
        m.kept = store(y)
        return m.bn(y)

    def other_part(m: Any, x: Tensor) -> Any:
        y = m.wide(x)
        m.kept = store(y[:, 4:])
        return m.bn(y[:, :4])

    def same_part(m: Any, x: Tensor) -> Any:
        y = m.wide(x)
        m.kept = store(y[:, :4])
        return m.bn(y[:, :4])

    def forward(m: Any, x: Tensor) -> Any:
        y = m.bn(x.sigmoid())
        m.kept = store(y)
        return m.next(y)

    def forward_between(m: Any, x: Tensor) -> Any:
        y = m.drop(m.bn(x.sigmoid())).flip(2)
        m.kept = store(y)
        return m.next(y.roll(1, 2))

    def forward_cat(m: Any, x: Tensor) -> Any:
        y = torch.cat([m.bn(x.sigmoid()), x], 1)
        m.kept = store(y)
        return m.eight(y)

    def forward_pool(m: Any, x: Tensor) -> Any:
        y = m.pool(m.bn(x.sigmoid()))
        m.kept = store(y)
        return m.lin(y.flatten(1))

    def forward_behind_the_layer(m: Any, x: Tensor) -> Any:
        y = m.next(m.bn(x.sigmoid()))
        m.kept = store(y)
        return y * 2

    def norm_behind_the_layer(m: Any, x: Tensor) -> Any:
        y = m.bn(m.a(x))
        m.kept = store(y)
        return m.next(y)

    usual: list[Way] = [between, forward, forward_between, other_part]
    thorough: list[Way] = [
        layer, cat, sum_, pooled, same_part, forward_cat, forward_pool, forward_behind_the_layer, norm_behind_the_layer,
    ]  # fmt: skip
    for way in usual + (thorough if keep in ("itself", "a view") else []):
        held(kit(way), torch.randn(IMAGE).double())


HOOKS: dict[str, Any] = {
    "doubles": ("hook", lambda m, i, o: o * 2),
    "watches": ("hook", lambda m, i, o: None),
    "keeps": ("hook", lambda m, i, o: setattr(m, "seen", o)),
    "doubles before": ("pre", lambda m, i: (i[0] * 2,)),
    "keeps before": ("pre", lambda m, i: setattr(m, "seen", i[0])),
}
HOOKED: dict[str, tuple[str, Way]] = {
    "dropout": ("drop", lambda m, x: m.bn(m.drop(m.a(x)))),
    "identity": ("nothing", lambda m, x: m.bn(m.nothing(m.a(x)))),
    "pool": ("pool", lambda m, x: m.flat(m.pool(m.a(x)).flatten(1))),
    "layer": ("a", lambda m, x: m.bn(m.drop(m.a(x)).flip(2))),
    "norm": ("bn", lambda m, x: m.bn(m.drop(m.a(x)).flip(2))),
    "one of two layers": ("b", lambda m, x: m.bn(m.a(x) + m.b(x))),
    "dropout ahead": ("drop", lambda m, x: m.next(m.drop(m.bn(x.sigmoid())))),
    "pool ahead": ("pool", lambda m, x: m.lin(m.pool(m.bn(x.sigmoid())).flatten(1))),
    "layer ahead": ("next", lambda m, x: m.next(m.drop(m.bn(x.sigmoid())))),
    "norm ahead": ("bn", lambda m, x: m.next(m.drop(m.bn(x.sigmoid())))),
    "norm before a norm": ("bn", lambda m, x: m.bn2(m.bn(m.a(x)))),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", HOOKED)
def test_hook_on_what_stands_between(hook: str, place: str) -> None:
    name, way = HOOKED[place]
    model = kit(way)
    kind, function = HOOKS[hook]
    part = model.get_submodule(name)
    part.register_forward_hook(function) if kind == "hook" else part.register_forward_pre_hook(function)
    x = torch.randn(IMAGE).double()
    result = held(model, x)
    if hook.startswith("keeps") and result.model is not None:
        with torch.no_grad():
            model(x), result.model(x)
        seen = result.model.get_submodule(name)
        if hasattr(seen, "seen"):  # what was registered on a norm that is gone sees nothing any more
            assert torch.allclose(seen.seen, part.seen, rtol=0, atol=1e-9)
        else:
            assert name in {e.site for e in result.edits}


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_on_a_block_between(hook: str) -> None:
    """On a container that ends, or begins, between the layer and the norm."""
    kind, function = HOOKS[hook]
    for split in ([1, 2], [2, 1]):
        layers = iter([nn.Conv2d(4, 4, 3), nn.Dropout(0.3), nn.BatchNorm2d(4)])
        blocks = [nn.Sequential(*(next(layers) for _ in range(n))) for n in split]
        for one in range(len(blocks)):
            model = lived_in(nn.Sequential(*blocks)).double()
            handle = getattr(model[one], "register_forward_hook" if kind == "hook" else "register_forward_pre_hook")(
                function
            )
            held(model, torch.randn(IMAGE).double())
            handle.remove()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_norm_then_padded_layer(rank: int, mode: str, padding: int | str) -> None:
    """Stride, dilation, groups, even kernels: whatever the padding puts there, the outputs stay."""
    if rank == 3 and mode == "reflect":
        mode = "replicate"
    conv: Any = getattr(nn, f"Conv{rank}d")
    norm: Any = getattr(nn, f"BatchNorm{rank}d")
    for kernel, stride, dilation, groups in ((3, 1, 1, 1), (2, 1 if padding == "same" else 2, 2, 2)):
        layer = conv(4, 8, kernel, stride, padding, dilation, groups, bias=kernel == 3, padding_mode=mode)
        model = lived_in(nn.Sequential(nn.Sigmoid(), norm(4), layer, nn.ReLU())).double()
        held(model, torch.randn(2, 4, *(5,) * rank).double())


def test_layer_between_two_norms_shared_with_a_third() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.n1, self.n2, self.n3 = nn.Conv2d(4, 4, 1), *(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.n2(self.conv(self.n1(x.sigmoid()))) + self.n3(self.conv(x.relu()))
            return out

    held(lived_in(Shares()).double(), torch.randn(IMAGE).double())


@pytest.mark.parametrize("tied", ["weight", "bias", "both"])
@pytest.mark.parametrize("ahead", [False, True])
def test_tied_to_a_layer_elsewhere(tied: str, ahead: bool) -> None:
    def way(m: Any, x: Tensor) -> Any:
        y = m.padded(m.drop(m.bn(x.sigmoid()))) if ahead else m.bn(m.mirror(x).flip(2))
        return y, m.padded(x) if not ahead else m.mirror(x)

    model = kit(way)
    if tied in ("weight", "both"):
        model.mirror.weight = model.padded.weight
    if tied in ("bias", "both"):
        model.mirror.bias = model.padded.bias
    held(model, torch.randn(IMAGE).double())


def test_two_signatures_that_agree_on_one_only() -> None:
    """What is per channel at one batch size is not at another."""
    model = kit(lambda m, x: m.flat8(m.a(x).reshape(-1, 8, 4)), 1)
    few, many = torch.randn(2, 4, 4).double(), torch.randn(4, 4, 4).double()
    result = bnfix.fold(model, [few, many])
    assert result.model is not None
    for x in (few, many):
        assert torch.allclose(result.model(x), model(x), rtol=0, atol=1e-11)
    assert not any(r.defect for r in result.refusals)
