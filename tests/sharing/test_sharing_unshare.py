"""unshare: each call has its own norm, and nothing else is another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import InAutocast, NormOnTwoConvs, bits, lived_in, same_bits
from shared_nets import (
    IMAGE,
    IMAGES,
    Encoder,
    Frozen,
    Functional,
    NameAndList,
    OwnNorm,
    PyramidHead,
    TiedBuffers,
    Triplet,
    Twice,
    TwoNames,
    WithPReLU,
    tensors,
    triplet,
)
from torch import Tensor, nn

import bnfix
from bnfix.graph import NormPerCall, norm_states

MODELS: dict[str, Any] = {
    "siamese": (Triplet, IMAGES, 6),
    "pyramid": (PyramidHead, IMAGE, 4),
    "two names": (TwoNames, IMAGE, 2),
    "name and list": (NameAndList, IMAGE, 2),
    "tied buffers": (TiedBuffers, IMAGE, 2),
    "function": (Functional, IMAGE, 2),
    "native function": (lambda: Functional(3, native=True), IMAGE, 3),
    "own norm": (lambda: Twice(OwnNorm()), IMAGE, 2),
    "frozen": (lambda: Twice(Frozen()), IMAGE, 2),
    "with activation": (lambda: Twice(WithPReLU(3)), IMAGE, 2),
    "instance norm": (lambda: Twice(nn.InstanceNorm2d(3, track_running_stats=True)), IMAGE, 2),
    "sequential": (lambda: nn.Sequential(*[nn.BatchNorm2d(3), nn.ReLU()] * 2), IMAGE, 2),
    "momentum none": (lambda: Twice(nn.BatchNorm2d(3, momentum=None)), IMAGE, 2),
    "not affine": (lambda: Twice(nn.BatchNorm2d(3, affine=False)), IMAGE, 2),
    "double": (lambda: Twice(nn.BatchNorm2d(3)).double(), IMAGE.double(), 2),
}


def statistics(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Norms with running statistics, each buffer once."""
    found = {id(m.running_mean): (m, m.running_mean) for m in model.modules()
             if isinstance(getattr(m, "running_mean", None), Tensor)}  # fmt: skip
    return list(found.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share_affine", [False, True])
def test_same_outputs_to_the_bit_and_a_norm_for_each_call(name: str, share_affine: bool) -> None:
    build, example, norms = MODELS[name]
    model = lived_in(build())
    before = bits(model)
    result = bnfix.unshare(model, example, share_affine=share_affine)
    assert same_bits(model, before)
    assert result.verb == "unshare"
    assert not result.refusals
    assert len(statistics(result.model)) == norms
    call = example if isinstance(example, tuple) else (example,)
    for x in (call, tuple(t * 0.5 - 1 for t in call)):
        found, expected = tensors(result.model(*x)), tensors(model(*x))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    shared = dict(model.named_parameters())
    affine = [n for n, p in result.model.named_parameters() if not any(torch.equal(p, s) for s in shared.values())]
    assert not affine  # every number is one that was there
    if share_affine:
        assert len(list(result.model.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("frozen", "instance norm", "momentum none")])
def test_in_training_mode_each_call_moves_its_own_statistics(name: str) -> None:
    """What a norm that is called once on that input would come to, in place of an average over all calls."""
    build, example, norms = MODELS[name]
    model = lived_in(build())
    call = example if isinstance(example, tuple) else (example,)
    apart = bnfix.unshare(model, example).model.train()
    together = copy.deepcopy(model).train()
    found, expected = tensors(apart(*call)), tensors(together(*call))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    moved = {tuple(mean.tolist()) for _, mean in statistics(apart)}
    assert len(moved) == norms
    start = {tuple(mean.tolist()) for _, mean in statistics(model)}
    assert not moved & start
    for norm, _ in statistics(apart):
        if isinstance(getattr(norm, "num_batches_tracked", None), Tensor):
            assert int(norm.num_batches_tracked) == 1


def test_gradients_of_the_shared_weight_are_the_sum_of_those_of_the_copies() -> None:
    model = triplet().train()
    apart = bnfix.unshare(model, IMAGES).model
    for one in (model, apart):
        sum((o * (i + 1)).square().sum() for i, o in enumerate(one(*IMAGES))).backward()
    copies = apart.net.bn
    total = sum(n.weight.grad for n in copies)
    # three float32 sums in another order
    torch.testing.assert_close(total, model.net.bn.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(apart.net.conv.weight.grad, model.net.conv.weight.grad, rtol=1e-5, atol=1e-5)


def test_only_norms_are_taken_apart() -> None:
    model = triplet()
    result = bnfix.unshare(model, IMAGES)
    assert {n for n, _ in result.model.named_parameters() if "bn" not in n} == {
        n for n, _ in model.named_parameters() if "bn" not in n
    }
    assert [e.site for e in result.edits] == ["net.bn", "net.bn2"]
    assert all(type(m) is type(result.model.get_submodule(n)) for n, m in model.named_modules() if "bn" not in n)


def test_edits_name_calls_and_the_entries_that_come_and_go() -> None:
    model = triplet()
    result = bnfix.unshare(model, IMAGES, sites="net.bn2")
    (edit,) = result.edits
    assert edit.site == "net.bn2"
    assert edit.calls == ("net.bn2", "net.bn2@1", "net.bn2@2")
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert edit.gains == tuple(f"net.bn2.{i}.{n}" for i in range(3) for n in names)
    assert edit.loses == tuple(f"net.bn2.{n}" for n in names)
    before, after = set(model.state_dict()), set(result.model.state_dict())
    assert (after - before, before - after) == (set(edit.gains), set(edit.loses))
    assert "3 norms, one for each call: net.bn2.0 … net.bn2.2" in str(result)


def test_several_names_change_no_entry_of_the_state_dict() -> None:
    model = lived_in(TwoNames())
    result = bnfix.unshare(model, IMAGE)
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert result.edits[0].gains == result.edits[0].loses == ()
    assert result.model.bn1 is not result.model.bn2
    assert result.model.load_state_dict(model.state_dict())


def test_sites_are_norms_or_modules_around_them() -> None:
    model = triplet()
    assert [e.site for e in bnfix.unshare(model, IMAGES, ["net.bn"]).edits] == ["net.bn"]
    assert [e.site for e in bnfix.unshare(model, IMAGES, "net").edits] == ["net.bn", "net.bn2"]
    assert [e.site for e in bnfix.unshare(model, IMAGES, ["net.bn@2"]).edits] == ["net.bn"]
    with pytest.raises(ValueError, match=r"there is no norm at 'net.b' to un-share; there is net.bn, net.bn2"):
        bnfix.unshare(model, IMAGES, "net.b")
    alone = bnfix.unshare(lived_in(Encoder()), IMAGE, "bn")
    assert not alone.edits
    assert alone.refusals[0].reason == "it is called once in a forward, not shared"


def test_one_name_of_two_is_enough() -> None:
    for site in ("bn1", "bn2", ["bn1", "bn2"]):
        assert len(bnfix.unshare(lived_in(TwoNames()), IMAGE, site).edits) == 1


class Registry(nn.Module):
    """Keeps its norms in a list besides, which nobody calls."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(3)
        self.norms = nn.ModuleList([norm])
        self.heads = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), norm) for _ in range(heads)])

    def forward(self, x: Tensor) -> Tensor:
        for head in self.heads:
            x = head(x)
        return x


def test_a_name_that_nobody_calls_stays_with_the_first_call() -> None:
    """Else the weights that an optimizer knows would be those of a norm that is never called."""
    model = lived_in(Registry(3))
    weight = model.heads[0][1].weight
    expected = model(IMAGE)
    result = bnfix.unshare(model, IMAGE, inplace=True)
    (edit,) = result.edits
    assert edit.calls == ("heads.0.1", "heads.1.1", "heads.2.1")
    assert model.norms[0] is model.heads[0][1]
    assert model.heads[0][1].weight is weight
    assert torch.equal(model(IMAGE), expected)
    alone = lived_in(Registry(1))
    assert not bnfix.unshare(alone, IMAGE).edits
    said = bnfix.unshare(alone, IMAGE, "norms.0").refusals[0].reason
    assert said == "it is called once in a forward: its other names only refer to it"


def test_a_name_called_several_times_beside_another() -> None:
    class Both(TwoNames):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn1(super().forward(x))

    model = lived_in(Both())
    result = bnfix.unshare(model, IMAGE)
    assert len(statistics(result.model)) == 3
    assert isinstance(result.model.bn1, NormPerCall)
    assert isinstance(result.model.bn2, nn.BatchNorm2d)
    assert [e.site for e in result.edits] == ["bn1", "bn1"]


def test_the_activation_of_a_norm_stays_one() -> None:
    result = bnfix.unshare(lived_in(Twice(WithPReLU(3))), IMAGE)
    first, second = result.model.norm
    assert first.act is second.act
    assert first.weight is not second.weight


def test_hooks_modes_and_frozen_weights_are_those_of_the_norm() -> None:
    model = lived_in(Twice(nn.BatchNorm2d(3))).train()
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    seen: list[Any] = []
    model.norm.register_forward_hook(lambda m, _i, _o: seen.append(m))
    apart = bnfix.unshare(model, IMAGE).model
    assert not seen or seen.clear() is None
    apart(IMAGE)
    assert seen == list(apart.norm)
    assert [m.training for m in apart.norm] == [False, False]
    assert not apart.norm.training
    assert [m.weight.requires_grad for m in apart.norm] == [False, False]
    assert [m.bias.requires_grad for m in apart.norm] == [True, True]
    assert apart.training
    assert apart.norm.num_features == 3


# --------------------------------------------------------------------------------------------- the model is sacred


def test_the_model_stays_as_it_was() -> None:
    model = triplet().train()
    model.net.bn.eval()
    model.note = ["kept"]
    before, modes, state = bits(model), [m.training for m in model.modules()], torch.get_rng_state()
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for options in ({}, {"dry_run": True}):
        result = bnfix.unshare(model, IMAGES, **options)
        assert (result.model is None) == bool(options)
        assert len(result.edits) == 2
        assert same_bits(model, before)
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_in_place_the_first_call_keeps_the_norm_itself() -> None:
    model = triplet()
    expected = model(*IMAGES)
    norm, weight = model.net.bn, model.net.bn.weight
    result = bnfix.unshare(model, IMAGES, inplace=True)
    assert result.model is model
    assert model.net.bn[0] is norm
    assert model.net.bn[0].weight is weight
    assert all(torch.equal(a, b) for a, b in zip(model(*IMAGES), expected, strict=True))
    assert any("optimizer" in n for n in result.notes)


@pytest.mark.parametrize("how", [{"how": "calls", "site": "nowhere", "calls": 2}, {"how": "calls", "site": "net.bn2",
                                 "calls": 1}, {"how": "names", "sites": ["net.bn2", "x"]}, {"how": "magic"},
                                 {"how": "calls", "site": "net.bn", "calls": 2},
                                 {"how": "function", "site": "net", "mean": "m", "var": "v", "weight": None,
                                  "bias": None, "calls": 2}])  # fmt: skip
def test_steps_are_all_or_nothing(how: dict[str, Any]) -> None:
    from bnfix.graph import take_apart

    model = triplet()
    before, names = bits(model), [n for n, _ in model.named_modules()]
    with pytest.raises((KeyError, ValueError)):
        take_apart(model, [{"how": "calls", "site": "net.bn", "calls": 3}, how])
    assert same_bits(model, before)
    assert [n for n, _ in model.named_modules()] == names
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_norm_inside_autocast_and_no_grad_is_counted() -> None:
    class Two(InAutocast):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x * 2)

    assert len(bnfix.unshare(lived_in(Two()), IMAGE).model.bn) == 2


def test_wrappers_are_looked_through() -> None:
    model = triplet()
    result = bnfix.unshare(nn.DataParallel(model), IMAGES)
    assert isinstance(result.model, Triplet)
    assert "unwrapped DataParallel" in result.notes[0]


@pytest.mark.parametrize("name", MODELS)
def test_each_norm_has_one_name_afterwards(name: str) -> None:
    """So that a check finds nothing shared any more."""
    build, example, norms = MODELS[name]
    apart = bnfix.unshare(lived_in(build()), example).model
    own = {"name and list": 2, "with activation": 1}  # the list is a second name of all, by right
    assert all(len(s.paths) <= own.get(name, 1) for s in norm_states(apart))
    assert len(norm_states(apart)) == norms


def test_norms_taken_apart_fold_where_shared_ones_did_not() -> None:
    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.a(x)) * self.bn(F.relu(self.b(x)))  # one of them behind an activation

    model = lived_in(TwoLayers())
    assert not bnfix.fold(model, IMAGE).edits
    apart = bnfix.unshare(model, IMAGE).model
    folded = bnfix.fold(apart, IMAGE)
    assert [e.site for e in folded.edits] == ["bn.0"]
    # one rounding of each weight of one convolution
    torch.testing.assert_close(folded.model(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)
    both = bnfix.fold(bnfix.unshare(lived_in(NormOnTwoConvs()), IMAGE).model, IMAGE)
    assert [e.site for e in both.edits] == ["bn.0", "bn.1"]
