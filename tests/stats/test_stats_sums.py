"""Per-sample sums: right for every layout, dtype, grouping and mask, without a copy where there is a view."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnfix.stats import pool, sample_sums
from bnfix.stats.sums import _fused

# Sums of n float32 values that are added in blocks: a few roundings of 6e-8 of the sum of magnitudes.
TOLERANCE = 1e-6

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "N,C": lambda: torch.randn(6, 5),
    "N,C transposed": lambda: torch.randn(5, 6).t(),
    "N,C sliced": lambda: torch.randn(6, 9)[:, 2:7],
    "N,C every other": lambda: torch.randn(6, 10)[:, ::2],
    "N,C,L": lambda: torch.randn(6, 5, 70),
    "N,C,L in (N,L,C) memory": lambda: torch.randn(6, 70, 5).transpose(1, 2),
    "N,C,1": lambda: torch.randn(6, 5, 1),
    "2x1": lambda: torch.randn(6, 5, 2, 1),
    "4x4, by products": lambda: torch.randn(6, 5, 4, 4),
    "5x5, product and norm": lambda: torch.randn(6, 5, 5, 5),
    "4x4 rows of a wider one": lambda: torch.randn(6, 5, 4, 9)[..., :4],
    "9x9": lambda: torch.randn(6, 5, 9, 9),
    "40x50, cut runs": lambda: torch.randn(6, 5, 40, 50),
    "prime, uncut": lambda: torch.randn(2, 5, 1, 2053),
    "channels_last": lambda: torch.randn(6, 5, 9, 9).to(memory_format=torch.channels_last),
    "channels_last 1x1": lambda: torch.randn(6, 5, 1, 1).to(memory_format=torch.channels_last),
    "channels_last, in blocks": lambda: torch.randn(7, 40, 50, 50).to(memory_format=torch.channels_last),
    "channels_last, a block a sample": lambda: torch.randn(3, 40, 99, 99).to(memory_format=torch.channels_last),
    "one channel, channels_last": lambda: torch.randn(6, 1, 9, 9).to(memory_format=torch.channels_last),
    "channels of channels_last": lambda: torch.randn(6, 9, 8, 8).to(memory_format=torch.channels_last)[:, 2:7],
    "channels_last transposed": lambda: torch.randn(6, 5, 8, 9).to(memory_format=torch.channels_last).transpose(2, 3),
    "channels_last_3d": lambda: torch.randn(6, 5, 3, 4, 5).to(memory_format=torch.channels_last_3d),
    "N,C,D,H,W": lambda: torch.randn(6, 5, 3, 4, 5),
    "channels": lambda: torch.randn(6, 9, 8, 8)[:, 2:7],
    "expanded rows": lambda: torch.randn(1, 5, 8, 8).expand(6, -1, -1, -1),
    "expanded positions": lambda: torch.randn(6, 5, 1, 1).expand(-1, -1, 8, 8),
    "expanded channels": lambda: torch.randn(6, 1, 8, 8).expand(-1, 5, -1, -1),
    "flipped": lambda: torch.randn(6, 5, 8, 8).flip(0)[:, :, ::2],
    "permuted": lambda: torch.randn(8, 5, 6, 8).permute(2, 1, 0, 3),
}


def by_hand(x: Tensor, group: int = 1) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares in float64, of values in any order."""
    x = x.double().reshape(len(x) // group, group, x.shape[1], -1)
    return x.sum((1, 3)), (x * x).sum((1, 3))


def close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    return bool(((found.double() - expected).abs() <= TOLERANCE * scale).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, "all"])
def test_every_layout_has_the_sums_of_its_values(layout: str, dtype: torch.dtype, group: int | str) -> None:
    x = LAYOUTS[layout]().to(dtype)
    samples = 1 if group == "all" else len(x) // group if len(x) % group == 0 else len(x)
    s, q = by_hand(x, len(x) // samples)
    found = sample_sums(x, samples)
    assert found.s.dtype == found.q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.s.shape == found.q.shape == s.shape
    assert found.n == x[0, 0].numel() * (len(x) // samples)
    magnitudes, _ = by_hand(x.abs(), len(x) // samples)
    assert close(found.s, s, magnitudes)
    assert close(found.q, q, q)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_the_same_to_the_bit_another_time(layout: str) -> None:
    x = LAYOUTS[layout]()
    first, second = sample_sums(x), sample_sums(x)
    assert torch.equal(first.s, second.s)
    assert torch.equal(first.q, second.q)


class _Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name in ("aten::clone", "aten::_to_copy", "aten::copy_", "aten::contiguous"):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "layout",
    [
        "N,C,L",
        "N,C,L in (N,L,C) memory",
        "9x9",
        "40x50, cut runs",
        "4x4, by products",
        "channels_last",
        "channels_last, in blocks",
        "channels of channels_last",
        "channels_last_3d",
        "channels",
        "N,C,D,H,W",
    ],
)
def test_no_activation_is_copied(layout: str) -> None:
    x = LAYOUTS[layout]()
    with _Copies() as copies:
        sample_sums(x)
    assert copies.seen == []


def test_the_copies_would_be_seen() -> None:
    with _Copies() as copies:
        LAYOUTS["channels_last"]().flatten(2)
    assert copies.seen


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 1, 1)])
def test_sums_survive_a_write_to_the_input(shape: tuple[int, ...]) -> None:
    """With one position a sum is the value: a model that goes on in place must not change it."""
    x = torch.randn(shape)
    found = sample_sums(x)
    kept = found.s.clone()
    x.zero_()
    assert torch.equal(found.s, kept)


@pytest.mark.parametrize("layout", ["N,C", "4x4, by products", "9x9", "channels_last"])
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_one_bad_value_stays_in_its_sample_and_channel(layout: str, poison: float) -> None:
    x = LAYOUTS[layout]()
    x[2, 3] = poison
    found = sample_sums(x)
    bad = ~(found.s.isfinite() & found.q.isfinite())
    expected = torch.zeros_like(bad)
    expected[2, 3] = True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("layout", ["N,C", "4x4, by products", "9x9", "channels_last"])
def test_autocast_changes_no_bit(layout: str) -> None:
    x = LAYOUTS[layout]()
    plain = sample_sums(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample_sums(x)
    assert torch.equal(found.s, plain.s)
    assert torch.equal(found.q, plain.q)


def _no_product(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("a product of matrices, which may be computed in bfloat16")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_precision_of_products_does_not_reach_sums(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users set it for speed, and it holds for float32 on some CPUs too."""
    x = torch.randn(6, 5, 4, 4)
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "mv", _no_product)
    torch.set_float32_matmul_precision(precision)
    try:
        found = sample_sums(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert close(found.q, by_hand(x)[1], by_hand(x)[1])
    with pytest.raises(AssertionError, match="bfloat16"):
        sample_sums(x)


def test_precision_set_through_the_newer_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch ≥ 2.9 then refuses to say what the older one is."""

    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "mv", _no_product)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    x = torch.randn(6, 5, 4, 4)
    assert close(sample_sums(x).q, by_hand(x)[1], by_hand(x)[1])


def test_gradients_are_not_followed() -> None:
    x = torch.randn(6, 5, 4, 4, requires_grad=True) * 2
    found = sample_sums(x)
    assert not found.s.requires_grad
    assert not found.q.requires_grad


@pytest.mark.parametrize("rows", [7, 3])
def test_rows_that_are_no_whole_samples_are_units_themselves(rows: int) -> None:
    x = torch.randn(rows, 4, 5)
    found = sample_sums(x, 5)
    assert found.s.shape == (rows, 4)
    assert found.n == 5


def test_rows_are_grouped_sample_by_sample() -> None:
    x = torch.randn(4, 3, 5, 6, 6)  # samples, frames
    found = sample_sums(x.flatten(0, 1), 4)
    assert found.n == 3 * 36
    assert torch.allclose(found.s, x.sum((1, 3, 4)), atol=1e-4)


def test_an_empty_chunk_has_no_samples() -> None:
    for shape in ((0, 4), (0, 4, 5, 5)):
        found = sample_sums(torch.empty(shape), 0)
        assert found.s.shape == (0, 4)


MASKS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.rand(6) > 0.5,
    "positions": lambda: torch.rand(6, 8, 9) > 0.5,
    "columns of all": lambda: torch.rand(1, 1, 9) > 0.5,
    "columns of each": lambda: torch.rand(6, 1, 9) > 0.5,
    "nothing": lambda: torch.zeros(6, 8, 9, dtype=torch.bool),
    "everything": lambda: torch.ones(6, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_masked_positions_count_nowhere(name: str, group: int, memory: torch.memory_format) -> None:
    mask = MASKS[name]()
    x = torch.randn(6, 5, 8, 9).to(memory_format=memory)
    full = mask.reshape(mask.shape + (1,) * (3 - mask.dim())).expand(6, 8, 9)
    expected, squares = by_hand(torch.where(full[:, None], x, 0), group)
    poisoned = torch.where(full[:, None], x, torch.nan).contiguous(memory_format=memory)
    found = sample_sums(poisoned, 6 // group, mask)
    assert isinstance(found.n, Tensor)
    assert found.n.tolist() == full.reshape(6 // group, -1).sum(1).tolist()
    assert found.n.dtype == torch.float64
    assert torch.allclose(found.s.double(), expected, atol=1e-4)
    assert torch.allclose(found.q.double(), squares, atol=1e-4)


@pytest.mark.parametrize("shape", [(5,), (6, 9, 8), (6, 7), (6, 8, 9, 1)])
def test_a_mask_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the mask has shape"):
        sample_sums(torch.randn(6, 5, 8, 9), None, torch.ones(shape, dtype=torch.bool))


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype bool"):
        sample_sums(torch.randn(6, 5, 8, 9), None, torch.ones(6))


@pytest.mark.parametrize("layout", ["N,C,L", "9x9", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_cuda_takes_has_the_same_values(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout]().to(dtype)
    s, q = _fused(x.flatten(2), 2)
    assert s.dtype == q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert close(s, by_hand(x)[0], by_hand(x.abs())[0])
    assert close(q, by_hand(x)[1], by_hand(x)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_nothing_waits(layout: str) -> None:
    x = LAYOUTS[layout]().cuda()
    mask = torch.ones(len(x), dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sample_sums(x)
        sample_sums(x, len(x), mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert close(found.q.cpu(), by_hand(x.cpu())[1], by_hand(x.cpu())[1])


@given(
    samples=st.integers(1, 5), repeats=st.integers(1, 4), inner=st.integers(1, 3), masked=st.booleans(),
    far=st.sampled_from([0.0, 1e4]),
)  # fmt: skip
def test_repeats_are_rows_in_another_order(samples: int, repeats: int, inner: int, masked: bool, far: float) -> None:
    """(repeats, N, inner) rows give what the same rows give sample by sample, where channels are computed anew too."""
    x = torch.randn(repeats, samples, inner, 3, 4) + torch.tensor([0.0, far, 1.0]).view(3, 1)
    mask = torch.rand(repeats, samples, inner, 4) < 0.7 if masked else None
    inside = x.transpose(0, 1).flatten(0, 2), None if mask is None else mask.transpose(0, 1).flatten(0, 2)
    across = x.flatten(0, 2), None if mask is None else mask.flatten(0, 2)
    a = sample_sums(inside[0], samples, inside[1])
    b = sample_sums(across[0], samples, across[1], repeats)
    assert b.s.shape == (samples, 3)
    torch.testing.assert_close(torch.as_tensor(a.n), torch.as_tensor(b.n), rtol=0, atol=0)
    torch.testing.assert_close(a.s, b.s)
    torch.testing.assert_close(a.q, b.q)
    one, other = pool([a], [inside[0]], [inside[1]]), pool([b], [across[0]], [across[1]])
    # The order of float32 sums; what float64 took over is the same to 1e-9.
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.m2, other.m2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.gram[3], other.gram[3], rtol=1e-3, atol=1e-4)
