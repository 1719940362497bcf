"""Copies share nothing, surgery can be taken back, a recipe rebuilds what it describes."""

from __future__ import annotations

import nets
import pytest
import torch
from nets import bits, lived_in, same_bits
from torch import nn

import bnfix
from bnfix.errors import TraceError
from bnfix.graph import Surgeon, all_or_nothing, copy_model, gather, placeholder, replay
from bnfix.graph.owners import Slot, find_owners
from bnfix.running import as_call


def test_copy_shares_no_storage() -> None:
    model = lived_in(nets.CalledTwice())
    copy, memo = copy_model(model)
    mine = {t.untyped_storage().data_ptr() for t in bits(copy).values() if t.numel()}
    theirs = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not mine & theirs
    assert memo[id(model.conv.weight)] is copy.conv.weight


def test_copy_that_would_share_is_refused() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def __deepcopy__(self, memo: object) -> nn.Module:
            return self

    with pytest.raises(TraceError, match=r"still shares 0\.weight"):
        copy_model(nn.Sequential(Shares()))


def test_global_that_leads_into_the_model_is_found() -> None:
    global _leak
    _leak = lived_in(nets.conv_bn())
    model = nn.Sequential(_leak, nn.ReLU())
    model[1].register_forward_hook(_uses_leak)
    with pytest.raises(TraceError, match="_leak"):
        copy_model(model)


_leak: nn.Module = nn.Identity()


def _uses_leak(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
    return _leak(out)  # type: ignore[no-any-return]


def test_bound_method_as_hook_is_the_copys_own() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.inner = 0, nn.ReLU()
            self.inner.register_forward_hook(self.count)

        def count(self, *_: object) -> None:
            self.calls += 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model = Counts()
    copy, _ = copy_model(model)
    copy(torch.ones(1))
    assert (model.calls, copy.calls) == (0, 1)


def test_surgery_is_taken_back_on_any_way_out() -> None:
    model = lived_in(nets.conv_bn())
    before, children = bits(model), list(model)
    owners = find_owners(model)
    with pytest.raises(KeyboardInterrupt), all_or_nothing(Surgeon()) as surgeon:  # noqa: PT012
        surgeon.put(owners.module_slots[id(model[1])][0], nn.Identity())
        surgeon.register(Slot(model[0], "extra", "0.extra"), nn.Parameter(torch.ones(1)))
        surgeon.put(Slot(model[0], "weight", "0.weight"), nn.Parameter(torch.zeros(1)))
        raise KeyboardInterrupt
    assert list(model) == children
    assert same_bits(model, before)


def test_element_of_a_tuple_is_refused() -> None:
    model = nn.Module()
    model.pair = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    (slot,) = find_owners(model).module_slots[id(model.pair[1])]
    with pytest.raises(TraceError, match="can't be changed"):
        Surgeon().put(slot, nn.Identity())


def test_placeholder_needs_no_bnfix_to_be_loaded() -> None:
    stand_in = placeholder(nn.BatchNorm2d(7, eps=0.5), ())
    assert type(stand_in) is nn.Identity
    assert (stand_in.num_features, stand_in.eps) == (7, 0.5)
    assert not list(stand_in.parameters())


@pytest.mark.parametrize(
    ("build", "shape"),
    [(nets.conv_bn, (2, 3, 8, 8)), (nets.NormOnTwoConvs, (2, 3, 8, 8)), (nets.CalledTwice, (2, 4, 8, 8)),
     (nets.RegisteredBackwards, (2, 3, 8, 8)), (lambda: nets.conv_bn(bias=False), (2, 3, 8, 8))],
)  # fmt: skip
def test_recipe_rebuilds_the_folded_model(build: object, shape: tuple[int, ...]) -> None:
    model = lived_in(build())  # type: ignore[operator]
    x = torch.randn(shape)
    result = bnfix.fold(model, x)
    fresh = build().eval()  # type: ignore[operator]
    replay(fresh, result.recipe)
    assert result.model is not None
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh(x), result.model(x))


def test_recipe_for_another_architecture_changes_nothing() -> None:
    recipe = bnfix.fold(lived_in(nets.conv_bn()), torch.randn(2, 3, 8, 8)).recipe
    other = nets.RegisteredBackwards()
    names = [n for n, _ in other.named_modules()]
    with pytest.raises(KeyError):
        replay(other, recipe)
    assert [n for n, _ in other.named_modules()] == names


def test_facts_keys_lead_back_to_the_originals_tensors() -> None:
    model = lived_in(nets.conv_bn())
    facts = gather(model, [as_call(torch.randn(2, 3, 8, 8))])
    for key, fact in facts.tensors.items():
        assert (
            facts.binding.tensors[key]
            is {**dict(model.named_parameters()), **dict(model.named_buffers())}[fact.owners[0]]
        )
