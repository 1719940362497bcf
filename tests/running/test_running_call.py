"""The one form of an input, and a model that is left as it was found."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import nets
import numpy as np
import pytest
import torch
from nets import bits, lived_in, same_bits
from torch import Tensor, nn

from bnfix.errors import PassError
from bnfix.running import Call, as_call, batch_call, guess_call, map_tensors, preserved, variations


def test_call_runs_on_copies() -> None:
    x = torch.ones(2)
    Call((x,)).run(nn.ReLU(inplace=True))
    Call((x,)).run(_Doubles())
    assert torch.equal(x, torch.ones(2))


class _Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_signature_reads_like_shapes() -> None:
    call = Call((torch.ones(1, 3, 8, 8), [torch.ones(2)]), {"mask": torch.ones(1, 8, dtype=torch.bool), "top": 5})
    assert call.signature == "(1x3x8x8, [2], mask=1x8 bool, top=5)"


class Pair(NamedTuple):
    a: Tensor
    b: str


def test_tensors_are_found_wherever_they_are_nested() -> None:
    @dataclass
    class Box:
        inside: Tensor
        note: str = "kept"

    value = (torch.ones(1), [torch.ones(2)], {"k": torch.ones(3)}, Pair(torch.ones(4), "x"), Box(torch.ones(5)))
    changed = map_tensors(value, lambda t: t + 1)
    assert [t.numel() for t in Call(changed).tensors()] == [1, 2, 3, 4, 5]
    assert changed[3].b == "x"
    assert changed[4].note == "kept"
    assert torch.equal(changed[2]["k"], torch.full((3,), 2.0))


def test_batch_of_a_loader_is_bound_to_what_the_forward_requires() -> None:
    model = nets.conv_bn()
    x, y = torch.ones(2, 3, 8, 8), torch.tensor([0, 1])
    assert batch_call((x, y), _TakesOne(model)).args == (x,)
    assert batch_call({"x": x, "label": y}, _TakesOne(model)).kwargs == {"x": x}
    assert batch_call(x, model).args == (x,)


class _TakesOne(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(x) * scale  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("batch", "views"),
    [
        ((torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)), "b"),
        (([torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)], torch.tensor([1])), "b[0]"),
    ],
    ids=["anchor positive negative", "two views"],
)
def test_batch_that_could_be_meant_in_several_ways_is_refused(batch: object, views: str) -> None:
    with pytest.raises(PassError) as caught:
        batch_call(batch, _TakesOne(nets.conv_bn()))
    assert f"[m(v) for v in {views}]\n" in (caught.value.hint or "")
    assert f"m(torch.cat({views}))\n" in (caught.value.hint or "")


def test_batch_that_does_not_fit_names_both_sides() -> None:
    with pytest.raises(PassError, match=r"\['image'\].*forward\(x, scale\)"):
        batch_call({"image": torch.ones(1)}, _TakesOne(nets.conv_bn()))


def test_model_is_left_as_it_was_found_also_by_an_interrupt() -> None:
    model = lived_in(nn.Sequential(*nets.conv_bn(), nn.Dropout(0.5))).train()
    model[1].eval()
    before, flags, names = (
        bits(model),
        [m.training for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
    )
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(KeyboardInterrupt), preserved(model):  # noqa: PT012
        model.eval()
        model[1].train()
        model(torch.randn(4, 3, 8, 8))
        model[0].stash = torch.ones(3)
        model[1].running_mean = torch.zeros(4)
        model[2] = nn.Identity()
        torch.set_grad_enabled(False)
        torch.backends.mkldnn.enabled = False
        random.random(), np.random.rand()
        raise KeyboardInterrupt
    assert same_bits(model, before)
    assert [m.training for m in model.modules()] == flags
    assert [sorted(vars(m)) for m in model.modules()] == names
    assert isinstance(model[2], nn.Dropout)
    assert torch.is_grad_enabled()
    assert torch.backends.mkldnn.enabled
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(5, 2, 3)), (1, 5, 224, 224)),
        (nn.Sequential(nn.Linear(7, 2)), (1, 7)),
        (nn.Sequential(nn.Conv1d(4, 2, 3)), (1, 4, 128)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 3)), (1, 1, 32, 32)),
    ],
    ids=["conv2d", "linear", "conv1d", "small images"],
)
def test_input_is_deduced_from_the_layers_and_tried(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert guess_call(model).args[0].shape == shape


def test_nothing_deduced_is_an_error_that_names_what_was_tried() -> None:
    with pytest.raises(PassError, match="tried 1x3x224x224"):
        guess_call(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(17, 3)))


def test_second_batch_size_and_second_spatial_size_where_they_are_accepted() -> None:
    found, refused = variations(nets.conv_bn(), as_call(torch.randn(1, 3, 64, 64)))
    assert [c.signature for c in found] == ["2x3x64x64", "1x3x96x96"]
    assert not refused
    fixed = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    found, refused = variations(fixed, as_call(torch.randn(1, 3, 8, 8)))
    assert [c.signature for c in found] == ["2x3x8x8"]
    assert "1x3x16x16" in refused[0]


def test_variations_keep_indices_valid() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens)  # type: ignore[no-any-return]

    found, _ = variations(Embeds(), as_call(torch.tensor([[1, 9, 3]])))
    assert [c.args[0].dtype for c in found] == [torch.int64]
