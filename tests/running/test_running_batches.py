"""What a batch is: bound to the signature of the forward, and refused where it could be meant in several ways."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from bnfix.errors import PassError
from bnfix.running import bind

X, OTHER, LABELS = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])


def taking(forward: Callable[..., Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with one parameter and this forward (without self)."""
    model = nn.Linear(2, 2).to(dtype)
    model.forward = forward  # type: ignore[method-assign]
    return model


def one(x: Tensor) -> Tensor:
    return x


def with_option(x: Tensor, scale: float = 1.0) -> Tensor:
    return x * scale


def two(x: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
    return x * mask * scale


def all_optional(x: Any = None, y: Any = None) -> Any:
    return x if y is None else y


def anything(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def several(*xs: Tensor) -> Any:
    return xs


def by_name(x: Tensor, *, mask: Tensor) -> Tensor:
    return x * mask


def only_by_position(x: Tensor, /, *, mask: Any = None) -> Any:
    return x, mask


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


class Named(NamedTuple):
    label: Tensor
    mask: Tensor | None
    x: Tensor


class Given(NamedTuple):
    label: Tensor
    x: Tensor
    y: Tensor | None


@pytest.mark.parametrize(
    ("forward", "batch", "args", "kwargs", "used"),
    [
        (one, X, (X,), {}, "the batch"),
        (one, (X, LABELS), (X,), {}, "element 0 of 2 (element 1, 4 int64, was left out)"),
        (one, [X, LABELS], (X,), {}, "element 0 of 2 (element 1, 4 int64, was left out)"),
        (one, Pair(X, LABELS), (X,), {}, "element 0 of 2 (element 1, 4 int64, was left out)"),
        (one, Named(LABELS, OTHER[:, :1], X), (), {"x": X}, "fields x of label, mask, x"),
        (two, Named(LABELS, OTHER, X), (), {"x": X, "mask": OTHER}, "fields x, mask of label, mask, x"),
        (with_option, Named(LABELS, None, X), (), {"x": X}, "fields x of label, mask, x"),
        (all_optional, Given(LABELS, X, None), (), {"x": X, "y": None}, "fields x, y of label, x, y"),
        (anything, Pair(X, LABELS), (X,), {}, "element 0 of 2 (element 1, 4 int64, was left out)"),
        (one, (X,), (X,), {}, "element 0 of 1"),
        (one, (X, LABELS, "a.png"), (X,), {},
         "element 0 of 3 (element 1, 4 int64, and element 2, 'a.png', were left out)"),
        (with_option, (X, LABELS), (X,), {}, "element 0 of 2 (element 1, 4 int64, was left out)"),
        (two, (X, OTHER, LABELS), (X, OTHER), {}, "elements 0 and 1 of 3 (element 2, 4 int64, was left out)"),
        (two, (X, OTHER), (X, OTHER), {}, "elements 0 and 1 of 2"),
        (one, (X, torch.ones(4)), (X,), {}, "element 0 of 2 (element 1, 4 float32, was left out)"),
        (all_optional, X, (X,), {}, "the batch"),
        (all_optional, (X, LABELS), (X,), {}, "element 0 of 2 (element 1, 4 int64, was left out)"),
        (anything, X, (X,), {}, "the batch"),
        (anything, (X, LABELS), (X,), {}, "element 0 of 2 (element 1, 4 int64, was left out)"),
        (anything, {"x": X, "n": 3}, (), {"x": X, "n": 3}, "keys x, n of x, n"),
        (several, X, (X,), {}, "the batch"),
        (one, {"x": X, "label": LABELS}, (), {"x": X}, "keys x of x, label"),
        (one, UserDict(x=X, label=LABELS), (), {"x": X}, "keys x of x, label"),
        (two, {"label": LABELS, "mask": OTHER, "x": X}, (), {"x": X, "mask": OTHER}, "keys x, mask of label, mask, x"),
        (by_name, {"mask": OTHER, "x": X}, (), {"x": X, "mask": OTHER}, "keys x, mask of mask, x"),
        (only_by_position, {"mask": LABELS, "x": X}, (X,), {"mask": LABELS}, "keys x, mask of mask, x"),
        (one, ({"x": X, "id": LABELS}, LABELS), (), {"x": X},
         "keys x of x, id of element 0 of 2 (element 1, 4 int64, was left out)"),
        (one, ({"image": X}, LABELS), ({"image": X},), {}, "element 0 of 2 (element 1, 4 int64, was left out)"),
    ],
)  # fmt: skip
def test_batch_goes_where_the_signature_says(
    forward: Any, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any], used: str
) -> None:
    bound = bind(batch, taking(forward))
    assert bound.used == used
    assert len(bound.call.args) == len(args)
    assert all(_same(found, expected) for found, expected in zip(bound.call.args, args, strict=True))
    assert list(bound.call.kwargs) == list(kwargs)
    assert all(_same(bound.call.kwargs[k], v) for k, v in kwargs.items())


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[k], expected[k]) for k in expected)
    return found is expected if isinstance(expected, Tensor) else bool(found == expected)


@pytest.mark.parametrize(
    ("forward", "batch", "ways"),
    [
        # anchors, positives, negatives; two views with their labels; pairs of a regression on images
        (one, (X, OTHER, OTHER), ["[m(v) for v in b]", "m(torch.cat(b))", "m(b[0])"]),
        (one, (X, OTHER, LABELS), ["[m(v) for v in b[:2]]", "m(torch.cat(b[:2]))", "m(b[0])"]),
        (one, (X, LABELS, OTHER), ["[m(v) for v in (b[0], b[2])]", "m(torch.cat((b[0], b[2])))", "m(b[0])"]),
        (one, (X, OTHER), ["[m(v) for v in b]", "m(torch.cat(b))", "m(b[0])"]),
        (one, (X, torch.cat([OTHER, OTHER])), ["[m(v) for v in b]", "m(torch.cat(b))", "m(b[0])"]),
        (one, (X, [OTHER, OTHER]), ["[m(v) for v in (b[0], *b[1])]", "m(torch.cat((b[0], *b[1])))", "m(b[0])"]),
        (one, ([X, OTHER], LABELS), ["[m(v) for v in b[0]]", "m(torch.cat(b[0]))", "m(b[0])"]),
        (anything, (X, OTHER, LABELS), ["[m(v) for v in b[:2]]", "m(torch.cat(b[:2]))", "m(b[0])"]),
        (one, {"x": X, "x2": OTHER}, ["[m(v) for v in (b['x'], b['x2'])]", "m(torch.cat((b['x'], b['x2'])))",
                                      "m(x=b['x'])"]),
        (one, {"x": [X, OTHER], "y": LABELS}, ["[m(v) for v in b['x']]", "m(torch.cat(b['x']))", "m(x=b['x'])"]),
        (two, (X, OTHER, OTHER), ["m(b[0], b[1])"]),
        (several, (X, torch.randn(4, 5)), ["m(*b)", "m(b[0])"]),
    ],
)  # fmt: skip
def test_batch_that_could_be_meant_in_several_ways_is_refused_with_lines_that_work(
    forward: Any, batch: Any, ways: list[str]
) -> None:
    model = taking(forward)
    with pytest.raises(PassError) as caught:
        bind(batch, model)
    lines = [line.split("forward=", 1)[1] for line in (caught.value.hint or "").splitlines()]
    assert [line.removeprefix("lambda m, b: ") for line in lines][: len(ways)] == ways
    for line in lines:  # every line does what it says, pasted as it stands
        bound = bind(batch, model, eval(line, {"torch": torch}))
        assert bound.used == "the whole batch, by forward="
        out = bound.call.apply(model if forward in (two, several) or "m(x=" in line else nn.Identity())
        if "for v" in line:
            assert [tuple(t.shape[1:]) for t in out] == [(3, 8, 8)] * len(out)
            assert len(out) >= 2
        elif "cat" in line:
            assert len(out) >= 8


@pytest.mark.parametrize(
    ("forward", "batch"),
    [
        (one, (X, torch.randn(4, 5))),  # a regression target
        (one, (X, torch.randn(4, 1, 8, 8))),  # a density map: another number of channels
        (one, (X, torch.zeros(4, 3, 8, 8, dtype=torch.int64))),  # a segmentation mask
        (one, (torch.randn(4), torch.randn(4))),  # nothing but the batch axis to compare
        (one, (LABELS[:, None], torch.randn(4, 1))),  # tokens and their weights
        (two, {"x": X, "mask": OTHER}),
    ],
)
def test_targets_of_another_kind_are_no_twins(forward: Any, batch: Any) -> None:
    bind(batch, taking(forward))


@pytest.mark.parametrize(
    ("forward", "batch", "message"),
    [
        (two, X, "the batch has 1 element, and the forward requires 2"),
        (two, (X,), "the batch has 1 element, and the forward requires 2"),
        (one, (), "the batch has 0 elements, and the forward requires 1"),
        (by_name, (X, OTHER), r"forward\(x, mask\) requires mask by name"),
        (two, {"x": X, "y": LABELS}, r"keys \['x', 'y'\], and forward\(x, mask, scale\) requires mask too"),
        (one, {"image": X}, r"\['image'\], and forward\(x\) names none"),
        (one, SimpleNamespace(pixels=X), "type SimpleNamespace can't be bound"),
        (one, "abc", "type str can't be bound"),
        (one, np.array([{}], dtype=object), "array of type object"),
    ],
)
def test_batch_that_does_not_fit_says_so_and_how_to_feed_it(forward: Any, batch: Any, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        bind(batch, taking(forward))
    assert "forward=lambda m, b: m(" in (caught.value.hint or "")


def test_dtype_is_that_of_the_model_for_float32_alone() -> None:
    model = taking(lambda x, ids, wide: x, torch.bfloat16)
    call = bind((X, LABELS, X.double()), model).call
    assert [a.dtype for a in call.args] == [torch.bfloat16, torch.int64, torch.float64]
    assert torch.equal(call.args[0], X.bfloat16())
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3).half(), nn.BatchNorm2d(4))  # half convolutions, float32 norms
    assert bind(X, mixed).call.args[0].dtype == torch.float16
    without = nn.BatchNorm2d(3, affine=False).double()  # no parameters: the buffers say it
    assert bind(X, without).call.args[0].dtype == torch.float64


@pytest.mark.parametrize(("given", "wanted"), [("float64", "float32"), ("float16", "float32"), ("float64", "bfloat16")])
def test_inputs_of_one_other_type_become_that_of_the_model_and_it_is_said(given: str, wanted: str) -> None:
    x, dtype = X.to(getattr(torch, given)), getattr(torch, wanted)
    bound = bind((x, LABELS), taking(one, dtype))
    assert torch.equal(bound.call.args[0], x.to(dtype))
    assert bound.used.endswith(f", {given} as {wanted}")
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3).half(), nn.BatchNorm2d(4))  # no one type: nobody knows which is meant
    assert bind(X.double(), mixed).call.args[0].dtype == torch.float64
    assert bind(X.half(), taking(one, torch.float16)).used == "the batch"


def test_float32_batches_of_a_float32_model_are_not_copied() -> None:
    assert bind((X, LABELS), taking(one)).call.args[0] is X


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batch_moves_to_the_device_of_the_model(device: str) -> None:
    model = nn.Conv2d(3, 4, 3).to(device)
    assert bind((X, LABELS), model).call.args[0].device.type == device
    nested = {"views": [X, (OTHER,)], "graph": Graph(X), "id": LABELS, "name": "a"}
    (batch,) = bind(nested, model, lambda m, b: m(b["views"][0])).call.args
    found = [batch["views"][0], batch["views"][1][0], batch["graph"].x, batch["id"]]
    assert [t.device.type for t in found] == [device] * 4
    assert nested["graph"].x is X  # type: ignore[union-attr]


class Graph:
    """Moves itself in place, as torch_geometric's Data."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Graph:
        self.x = self.x.to(device)
        return self


class Molecules:
    """Moves itself in place and returns nothing, as chemprop's BatchMolGraph."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> None:
        self.x = self.x.to(device)


def test_object_that_moves_itself_and_returns_nothing() -> None:
    given = Molecules(X)
    (found,) = bind(given, nn.Linear(2, 2, device="meta")).call.args
    assert isinstance(found, Molecules)
    assert found.x.device.type == "meta"
    assert given.x is X
    (found,) = bind(given, nn.Linear(2, 2)).call.args
    assert torch.equal(found.x, X)


def test_a_named_tuple_that_could_be_meant_in_several_ways_is_refused_with_its_own_lines() -> None:
    with pytest.raises(PassError, match="several inputs") as refused:
        bind(Named(LABELS, OTHER, X), taking(one))
    assert "m(x=b.x)" in refused.value.hint
    assert "for v in (b.x, b.mask)" in refused.value.hint


class Record:
    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize(("batch", "part"), [({"x": X}, "m(b['x'])"), (Record(X), "m(b.x)")])
def test_a_forward_that_may_take_the_batch_apart_itself_is_told_of_both_lines(batch: Any, part: str) -> None:
    with pytest.raises(PassError) as refused:
        bind(batch, taking(lambda batch: batch))
    first, second = refused.value.hint.splitlines()
    assert first.endswith(part)
    assert second.endswith("forward=lambda m, b: m(b)")
    with pytest.raises(PassError) as refused:
        bind(batch, taking(lambda image, depth: image))
    assert refused.value.hint.splitlines() == [first]


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping that moves itself, as transformers' BatchEncoding."""

    def to(self, device: torch.device) -> Encoding:
        self.data = {k: v.to(device) for k, v in self.data.items()}
        return self


def test_objects_that_move_themselves_go_whole_to_a_forward_of_one_input() -> None:
    bound = bind(Graph(X), taking(one))
    assert isinstance(bound.call.args[0], Graph)
    assert bound.used == "the batch, a Graph"
    with pytest.raises(PassError, match="1 element"):
        bind(Graph(X), taking(two))
    tokens = Encoding(input_ids=LABELS, extra=LABELS)
    assert list(bind(tokens, taking(lambda input_ids=None: input_ids)).call.kwargs) == ["input_ids"]
    assert isinstance(bind(tokens, taking(one)).call.args[0], Encoding)
    assert bind((Graph(X), LABELS), taking(one)).used == "element 0 of 2 (element 1, 4 int64, was left out)"


def test_packed_sequence_is_one_input_and_keeps_its_sizes_on_the_cpu() -> None:
    packed = pack_sequence([torch.randn(3, 2), torch.randn(5, 2)], enforce_sorted=False)
    call = bind(packed, taking(one, torch.float16)).call
    (found,) = call.args
    assert isinstance(found, PackedSequence)
    assert found.data.dtype == torch.float16
    assert torch.equal(found.batch_sizes, packed.batch_sizes)
    lstm = nn.LSTM(2, 3).double()
    expected = lstm(packed.to(torch.float64))[0].data
    assert torch.equal(call.map(lambda t: packed.data.double()).apply(lstm)[0].data, expected)
    moved = bind(packed, nn.Linear(2, 2, device="meta")).call.args[0]
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")


def test_numpy_arrays_become_tensors_and_it_is_said() -> None:
    array = X.double().numpy()
    bound = bind((array, LABELS.numpy()), taking(one))
    assert torch.equal(bound.call.args[0], X)
    assert bound.used.endswith("read from NumPy arrays (float64 as float32, int64)")
    assert bind(array, taking(one, torch.float64)).call.args[0].dtype == torch.float64
    assert bind({"x": array.astype(">f4")}, taking(one)).used == "keys x of x, read from NumPy arrays (float32)"
    bind(array, taking(one)).call.args[0].zero_()
    assert array.any()  # a copy: a forward that works in place does not change the user's
    with pytest.raises(PassError, match="several inputs"):
        bind((array, array), taking(one))
    assert bind((array,), taking(one), lambda m, b: m(b)).call.args[0][0] is array  # forward= gets what was loaded


def test_scripted_models_are_bound_too() -> None:
    assert bind((X, LABELS), torch.jit.script(nets.conv_bn())).call.args[0] is X
