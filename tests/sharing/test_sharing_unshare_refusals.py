"""unshare: what stays shared says why, and the model says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import bits, lived_in, same_bits
from shared_nets import IMAGE, IMAGES, Encoder, Twice, triplet
from torch import Tensor, nn

import bnfix


class Changing(nn.Module):
    """Calls its norm as often as its input or its mode says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.bn = how, nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        times = {"size": x.shape[-1], "mode": 3 if self.training else 2, "aux": 2 if self.training else 0}[self.how]
        for _ in range(times):
            x = self.bn(x)
        return x


class Reads(Twice):
    """Its forward uses the norm's own weight besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.norm.weight.sum()


class Mixed(Twice):
    """The norm is called, and its statistics are handed to F.batch_norm too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.batch_norm(x, self.norm.running_mean, self.norm.running_var)


class Impure(nn.Module):
    """A module that is a norm and a convolution, called twice; it writes its normalisation out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) - self.running_mean[:, None, None]) / self.running_var[:, None, None].sqrt()


def refusal(model: nn.Module, example: Any, **options: Any) -> str:
    before = bits(model)
    result = bnfix.unshare(model, example, **options)
    assert same_bits(model, before)
    assert not result.edits
    assert result.recipe == {}
    return " | ".join(r.reason for r in result.refusals)


def test_a_number_of_calls_that_changes_is_refused() -> None:
    small, large = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 3, 3)
    said = refusal(lived_in(Changing("size")), [small, large])
    assert "2 on 2x3x2x2, 3 on 2x3x3x3" in said
    assert "2 on 2x3x2x2, 3 on 2x3x2x2 in training mode" in refusal(lived_in(Changing("mode")), small)


def test_a_norm_that_only_training_calls_is_taken_apart() -> None:
    """The head of an auxiliary loss: no calls in evaluation mode are no reuse."""
    model = lived_in(Changing("aux"))
    apart = bnfix.unshare(model, IMAGE).model
    assert len(apart.bn) == 2
    apart(IMAGE)
    apart.train()(IMAGE)
    assert [int(n.num_batches_tracked) for n in apart.bn] == [1, 1]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Reads(nn.BatchNorm2d(3)), "the model needs it as it is: the forward fails"),
        (lambda: Mixed(nn.BatchNorm2d(3)), "handed to F.batch_norm elsewhere as well"),
        (lambda: Twice(nn.BatchNorm2d(3, track_running_stats=False)), "keeps no running statistics"),
        (lambda: Twice(_parametrized()), "parametrization"),
        (lambda: Twice(Impure()), "more than a norm: it holds conv"),
    ],
)  # fmt: skip
def test_what_can_not_be_taken_apart_says_why(build: Any, said: str) -> None:
    assert said in refusal(lived_in(build()), IMAGE)


def _parametrized() -> nn.Module:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    norm = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(norm, "weight", Double())
    return norm


def test_a_refusal_of_one_keeps_no_other() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = Twice(nn.BatchNorm2d(3)), Reads(nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.bad(self.good(x))

    model = lived_in(Some())
    result = bnfix.unshare(model, IMAGE)
    assert [e.site for e in result.edits] == ["good.norm"]
    assert [r.site for r in result.refusals] == ["bad.norm"]
    assert torch.equal(result.model(IMAGE), model(IMAGE))


def test_calls_outside_of_the_model_are_refused_with_what_to_do() -> None:
    """Siamese training code calls the network three times: it is no model whose forward could count."""
    net = lived_in(Encoder())
    said = refusal(net, IMAGES, forward=lambda m, b: [m(x) for x in b])
    assert "what is called several times is the model itself" in said
    assert "def forward(self, a, p, n): return self.net(a), self.net(p), self.net(n)" in said
    parts = refusal(net, IMAGES, forward=lambda m, b: [m.bn(m.conv(x)) for x in b])
    assert "Put these calls into the forward" in parts
    alone = bnfix.unshare(net, IMAGE)
    assert not alone.edits
    assert "put these calls into the forward of one module" in alone.notes[-1]


def test_forward_may_call_the_model_once() -> None:
    model = triplet()
    result = bnfix.unshare(model, IMAGES, forward=lambda m, b: m(*b)[1])
    assert len(result.edits) == 2
    assert torch.equal(result.model(*IMAGES)[2], model(*IMAGES)[2])


def test_a_model_that_does_not_do_the_same_twice() -> None:
    class Noisy(Twice):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            Noisy.count += 1
            return super().forward(x) + Noisy.count

    with pytest.raises(bnfix.errors.TraceError, match="same twice"):
        bnfix.unshare(lived_in(Noisy(nn.BatchNorm2d(3))), IMAGE)


def test_a_forward_that_fails() -> None:
    model = triplet()
    before = bits(model)
    with pytest.raises(bnfix.errors.PassError, match="forward failed on 4x5x9x9"):
        bnfix.unshare(model, torch.randn(4, 5, 9, 9))
    assert same_bits(model, before)
    with pytest.raises(TypeError, match=r"nn.Module"):
        bnfix.unshare("model.pt", IMAGE)  # type: ignore[arg-type]
