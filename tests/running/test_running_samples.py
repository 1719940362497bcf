"""Samples of a batch: counted where they can be cut, cut as views, joined to the bit, looked at for NaN."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bnfix.running import Call, check_finite, count, join, replayable, size, split

X, LABELS = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])


class Opaque:
    """A graph, or anything else that moves itself: what it holds is not known."""

    def to(self, device: torch.device) -> Opaque:
        return self


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Call((X,)), 4),
        (Call((X, LABELS), {"mask": torch.ones(4, 1), "scale": 2.0, "mode": None}), 4),
        (Call((X[:0],)), 0),
        (Call((X, torch.ones(3))), None),
        (Call((X, torch.tensor(2.0))), None),  # a number as a tensor
        (Call(([X[0], X[1]],)), None),  # a detector's list of images: the first axis is the channel
        (Call(({"x": X},)), None),
        (Call((3,)), None),
        (Call((Opaque(), X)), None),
        (Call((X,), forward=lambda m, b: m(b)), None),
        (Call((pack_sequence([X[0], X[1]]),)), None),
        (Call((X.to_sparse(),)), None),
        (Call((torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged),)), None),
    ],
)
def test_size_counts_samples_only_where_they_can_be_cut(call: Call, expected: int | None) -> None:
    assert size(call) == expected


def fed(batch: object) -> Call:
    """A whole batch, handed to ``forward=``."""
    return Call((batch,), forward=lambda m, b: m(b[0]))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Call((X, LABELS)), 4),
        (Call(([X[0], X[1]],)), 2),  # a detector's images; the first axis is the channel
        (Call(([X[0], X[1, :, :5], X[2, :, :, :4]],)), 3),
        (Call(([{"image": X[0]}, {"image": X[1]}],)), 2),  # records, as detectron2 has them
        (Call(([X, X[:, :, ::2]],)), 4),  # a pyramid of features
        (Call(({"x": X},)), 4),
        (Call((3,)), 1),
        (fed(((X[0], X[1]), ({"boxes": X[0, 0]}, {"boxes": X[1, 0]}))), 2),  # tuple(zip(*batch)), images and targets
        (fed([X, LABELS]), 4),  # default_collate gives lists
        (fed([X, X + 1, X - 1]), 4),  # triplets
        (fed([X[0], X[1], X[2]]), 3),  # collate_fn=list
        (fed([torch.randn(7, 5, 2), torch.randn(7, 9, 2)]), 7),  # two sequences (N, T, F)
        (fed({"pixels": [X[0], X[1]], "ids": LABELS[:2]}), 2),
        (fed(X), 4),
    ],
)
def test_samples_are_counted_as_far_as_that_can_be_told(call: Call, expected: int) -> None:
    assert count(call) == expected


def test_split_gives_views_and_join_puts_them_together_to_the_bit() -> None:
    x = torch.randn(7, 3, 4, 4).to(memory_format=torch.channels_last)
    call = Call((x, 3), {"ids": torch.arange(7), "mode": "a"})
    parts = split(call, [2, 3])
    assert [size(p) for p in parts] == [2, 1, 4]
    assert parts[2].args[0].data_ptr() == x[3:].data_ptr()
    assert parts[2].args[0].is_contiguous(memory_format=torch.channels_last)
    assert (parts[1].args[1], parts[1].kwargs["mode"]) == (3, "a")
    whole = join(parts)
    assert whole is not None
    assert torch.equal(whole.args[0], x)
    assert whole.args[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(whole.kwargs["ids"], torch.arange(7))
    (uncut,) = split(call, [])
    assert torch.equal(uncut.args[0], x)
    assert join([call]) is call


@pytest.mark.parametrize("at", [[0], [4], [5], [3, 2], [-1], [2, 2]])
def test_split_refuses_cuts_that_leave_a_part_empty(at: list[int]) -> None:
    with pytest.raises(ValueError, match="can't be cut at"):
        split(Call((X,)), at)


def test_split_refuses_what_has_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        split(Call(([X],)), [1])


@pytest.mark.parametrize(
    "other",
    [
        Call((X[..., :4],)),
        Call((X.double(),)),
        Call((X, LABELS)),
        Call((), {"x": X}),
        Call((X,), {"scale": 2.0}),
        Call((X,), forward=lambda m, b: m(b)),
        Call(([X],)),
    ],
)
def test_join_refuses_what_differs_in_more_than_the_number_of_samples(other: Call) -> None:
    assert join([Call((X,)), other]) is None
    assert join([other, Call((X,))]) is None
    assert join([]) is None


def test_join_takes_equal_values_and_identical_objects_only() -> None:
    config = SimpleNamespace(a=1)
    assert join([Call((X, config, 2)), Call((X, config, 2))]) is not None
    assert join([Call((X, config)), Call((X, SimpleNamespace(a=1)))]) is None
    assert join([Call((X, 2)), Call((X, 3))]) is None
    assert join([Call((X, 1)), Call((X, True))]) is None


# ---------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_first_input_with_a_value_that_is_none_is_named(bad: float, dtype: torch.dtype) -> None:
    x = X.clone()
    x[1, 2, 3, 4] = bad
    x = x.to(dtype)
    assert check_finite(Call((X, x))) == "input 1"
    assert check_finite(Call((X, LABELS), {"mask": None, "y": [x]})) == "input y"
    assert check_finite(Call(({"views": [X, X]}, LABELS), {"scale": bad})) is None


def test_sums_that_overflow_are_no_bad_values() -> None:
    assert check_finite(Call((torch.full((100,), 6e4, dtype=torch.float16),))) is None
    assert check_finite(Call((torch.full((9,), 3e38),))) is None


def test_additive_masks_may_hold_minus_infinity() -> None:
    mask = torch.full((4, 4), -torch.inf).triu(1)
    assert check_finite(Call((X, mask))) is None
    mask[0, 0] = torch.nan
    assert check_finite(Call((X, mask))) == "input 1"


def test_values_are_looked_at_in_every_layout() -> None:
    bad = X[0].clone()
    bad[0, 0, 0] = torch.nan
    assert check_finite(Call((bad.to_sparse(),))) == "input 0"
    assert check_finite(Call((torch.nested.nested_tensor([X[0], bad], layout=torch.jagged),))) == "input 0"
    assert check_finite(Call((pack_sequence([X[0], bad]),))) == "input 0"
    assert check_finite(Call((X.to_sparse(),))) is None


class Squares:
    def __iter__(self) -> Iterator[Tensor]:
        yield from X


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from X


class OnceOnly(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        raise StopIteration


def test_iterators_are_not_gone_through_twice() -> None:
    for again in ([X], (X,), X, Squares(), DataLoader(TensorDataset(X)), DataLoader(Stream())):
        assert replayable(again), again
    for once in (iter([X]), (x for x in X), map(abs, X), iter(DataLoader(TensorDataset(X))), DataLoader(OnceOnly())):
        assert not replayable(once), once
