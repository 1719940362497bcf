"""merge_calls: every condition has a refusal of its own, and no refusal keeps another network from being merged."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from merging_nets import XS, Made, Siamese, X, block, close, merged, refused
from nets import bits, lived_in, same_bits
from shared_nets import IMAGE, IMAGES, Encoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnfix


def no_grad_call(m: Any, a: Tensor, b: Tensor) -> Any:
    with torch.no_grad():
        target = m.net(b)
    return m.net(a), target


def no_grad_elsewhere(m: Any, a: Tensor, b: Tensor) -> Any:
    za, zb = m.net(a), m.net(b)
    with torch.no_grad():
        weight = za.square().mean() * 5
    return za * weight, zb


def autocast_call(m: Any, a: Tensor, b: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        za = m.net(a)
    return za.float(), m.net(b)


def writes(m: Any, a: Tensor, b: Tensor) -> Any:
    m.last = m.net(a)
    return m.last, m.net(b)


def in_place(m: Any, a: Tensor, b: Tensor) -> Any:
    h = a * 1
    za = m.net(h)
    h.add_(1)
    return za, m.net(b + h)


def in_place_module(m: Any, a: Tensor, b: Tensor) -> Any:
    h = a * 1
    za = m.net(h)
    m.relu(h)
    return za, m.net(b + h)


def dice(m: Any, a: Tensor, b: Tensor) -> Any:
    return m.net(a) * random.random(), m.net(b)


class Stateful(nn.Module):
    """Keeps a hidden state from call to call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.bn, self.hidden = how, nn.BatchNorm1d(4), 0
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "attribute":
            self.hidden += 1
        elif self.how == "buffer" and self.training:
            self.queue.add_(1)
        return self.bn(x)


class Mixing(nn.Module):
    """Looks at other samples than its own."""

    def __init__(self, training_only: bool) -> None:
        super().__init__()
        self.bn, self.training_only = nn.BatchNorm1d(4), training_only

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(x)
        return y if self.training_only and not self.training else y - y.mean(0)


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.bn, self.make = nn.BatchNorm1d(4), (make,)

    def forward(self, x: Tensor) -> Any:
        return self.make[0](self.bn(x))


def hooked() -> nn.Module:
    net = block()
    net[1].register_forward_hook(lambda _m, _i, _o: None)
    return net


PAIR = (X, X + 1)


def both(m: Any, a: Tensor, b: Tensor) -> Any:
    return m.net(a), m.net(b)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Made(lambda m, a, b: (m.net(m.net(a)), b)), "call 1 needs the output of call 0"),
        (lambda: Made(lambda m, a, b: m.net(b + m.net(a).detach().mean())), "call 1 needs the output of call 0"),
        (lambda: Made(no_grad_call), "call 0 is made under no_grad"),
        (lambda: Made(no_grad_elsewhere), "works under no_grad in places"),
        (lambda: Made(autocast_call), "call 0 is made under autocast"),
        (lambda: Made(lambda m, a, b: (checkpoint(m.net, a, use_reentrant=False), m.net(b))),
         "call 0 is made under checkpointing" if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
         else "works under no_grad in places"),  # torch 2.7 does not tell the hooks
        (lambda: Made(both, Returns(lambda y: y.mean())), "scalar, such as a loss"),
        (lambda: Made(both, Returns(lambda y: y.T)), "its first axis is not the batch"),
        (lambda: Made(both, Returns(lambda y: (y, 3))), "nobody can tell which of it belongs"),
        (lambda: Made(both, Mixing(False)), "mixes samples"),
        (lambda: Made(both, Mixing(True)), "mixes samples"),
        (lambda: Made(both, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False),
                                          nn.BatchNorm1d(4))), "net.1 keeps no running statistics"),
        (lambda: Made(both, Stateful("attribute")), "keeps something from call to call: net writes hidden"),
        (lambda: Made(both, Stateful("buffer")), "keeps something from call to call: net writes queue"),
        (lambda: Made(both, hooked()), "net.1 has a hook"),
        (lambda: Made(both, nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(4))), "changes its input in place"),
        (lambda: Made(writes), "the forward of the model writes last"),
        (lambda: Made(in_place), "changes a tensor in place (add_)"),
        (lambda: Made(in_place_module, relu=nn.ReLU(inplace=True)), "relu changes its input in place"),
        (lambda: Made(dice), "Python's or NumPy's random numbers"),
        (lambda: Made(lambda m, a, b: (m.net(a + torch.ones(4)), m.net(b))), "makes a tensor that does not depend"),
        (lambda: Made(lambda m, a, b: (m.net(a) if a.sum() > -1e9 else a, m.net(b))), "can't be traced by torch.fx"),
        (lambda: Made(lambda m, a, b: (m.net(a), m.net(b), *([m.net(a + b)] if m.training else []))),
         "how often it is called changes: 3 times, and 2 on"),
        (lambda: Made(lambda m, a, b: (m.net(a), m.net(b), m.net[1](torch.zeros(5, 6)))),
         "net.1 in it is called elsewhere"),
        (lambda: Made(lambda m, a, b: (m.net(a), m.net(b), m.other(a)), other=None), "called by different modules"),
        (lambda: Made(lambda m, a, b: (m.nets[0](a), m.nets[0](b)), net=nn.Identity(), nets=[block()]),
         "no registered name leads to it"),
    ],
)  # fmt: skip
def test_every_condition_has_its_reason(build: Any, said: str) -> None:
    model = build()
    if getattr(model, "other", 0) is None:
        model.other = Made(lambda m, a: m.net(a), model.net)
    assert said in refused(model, PAIR)


def test_trailing_shapes_and_dtypes_have_to_be_the_same() -> None:
    pyramid = Made(lambda m, x: (m.net(x), m.net(x[..., ::2])), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert "shape behind the batch (3, 9, 9) in call 0 and (3, 9, 5) in call 1" in refused(pyramid, IMAGE)
    cast = nn.Sequential(nn.Identity(), nn.BatchNorm1d(4))
    double = Made(lambda m, a, b: (m.net(a), m.net(b.bfloat16())), cast)
    assert "dtype" in refused(double, PAIR)


def test_generated_code_is_not_traced_again() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = block()

        def forward(self, a: Tensor, b: Tensor) -> Any:
            return self.net(a), self.net(b)

    said = refused(torch.fx.symbolic_trace(lived_in(Pair())), PAIR)
    assert "its code was generated by torch.fx" in said


def test_two_merges_must_not_close_a_cycle() -> None:
    """A's calls do not need one another, nor do B's; but once A's are one, B's second needs its first."""

    def crossed(m: Any, x: Tensor, y: Tensor) -> Any:
        first = m.net(x)
        second = m.other(y)
        return m.other(first), m.net(second)

    model = Made(crossed, other=block())
    result = merged(model, PAIR)
    assert [e.site for e in result.edits] == ["net"]
    assert [(r.site, r.reason) for r in result.refusals] == [("other", "call 1 needs the output of call 0")]
    assert close(result.model(*PAIR), model(*PAIR))
    alone = merged(Made(crossed, other=block()), PAIR, sites="other")
    assert [e.site for e in alone.edits] == ["other"]


def test_one_refusal_keeps_no_other() -> None:
    model = Made(lambda m, a, b: (m.bad(m.net(a)), m.bad(m.net(b))), bad=Mixing(False))
    result = merged(model, PAIR)
    assert [e.site for e in result.edits] == ["net"]
    assert [r.site for r in result.refusals] == ["bad"]
    assert close(result.model(*PAIR), model(*PAIR))


def test_examples_that_take_other_ways() -> None:
    result = merged(Siamese(), [XS, XS[:2]])
    assert not result.edits
    assert "how often it is called changes: 3 times, and 2" in result.refusals[0].reason


def test_a_network_of_norms_for_each_call_is_not_merged() -> None:
    model = bnfix.unshare(lived_in(Siamese(Encoder(4))), IMAGES).model
    result = bnfix.merge_calls(model, IMAGES)
    assert not result.edits
    assert "it was un-shared" in result.refusals[0].reason


def test_the_model_is_left_alone() -> None:
    model = lived_in(Siamese()).train()
    before, state = bits(model), torch.get_rng_state()
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    bnfix.merge_calls(model, XS)
    assert same_bits(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert {n: vars(m).keys() for n, m in model.named_modules()} == {n: v.keys() for n, v in attributes.items()}
    with pytest.raises(bnfix.errors.PassError):
        bnfix.merge_calls(model, torch.randn(2, 9))
    assert same_bits(model, before)
