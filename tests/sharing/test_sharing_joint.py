"""joint: one forward for several inputs, and never a split by a guess."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import bits, lived_in, relative_error, same_bits
from torch import Tensor, nn

import bnfix
from bnfix.sharing.concatenating import as_calls, concatenated, parted

MATMUL = 2e-6  # products are summed in another order for another batch: a few units of 2⁻²⁴, not more in so small nets


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Out:
    z: Tensor
    extra: Any = None


class Masked(nn.Module):
    """Two inputs, one of them by name, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.bn(x)
        return y if mask is None else y * mask


class Gives(nn.Module):
    """Returns what ``make`` makes of its input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.bn = make, nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        return self.make(self.bn(x))


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2))


def test_eval_is_separate_forwards_to_the_bit_where_kernels_work_sample_by_sample() -> None:
    net = lived_in(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.Sigmoid()))
    xs = [torch.randn(n, 3, 9, 9) for n in (2, 1, 4)]
    for joint, x in zip(bnfix.joint(net)(*xs), xs, strict=True):
        assert torch.equal(joint, net(x))


def test_eval_is_separate_forwards_up_to_the_rounding_of_products() -> None:
    net = lived_in(nn.Sequential(nn.Linear(4, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 7)))
    xs = [torch.randn(n, 4) for n in (5, 1, 17)]
    images = [torch.randn(n, 3, 9, 9) for n in (2, 1, 4)]
    for model, inputs in ((net, xs), (lived_in(conv_net()), images)):
        for joint, x in zip(bnfix.joint(model)(*inputs), inputs, strict=True):
            assert relative_error(joint, model(x)) < MATMUL


def test_train_has_the_statistics_and_gradients_of_one_forward_over_all() -> None:
    net = lived_in(conv_net()).train()
    other = copy.deepcopy(net)
    xs = [torch.randn(n, 3, 9, 9) * (i + 1) for i, n in enumerate((2, 3, 4))]
    tracked = int(net[1].num_batches_tracked)
    out = bnfix.joint(net)(*xs)
    expected = other(torch.cat(xs))
    assert torch.equal(torch.cat(out), expected)
    sum(((i + 1) * o.square()).sum() for i, o in enumerate(out)).backward()
    sum(((i + 1) * o.square()).sum() for i, o in enumerate(expected.split([2, 3, 4]))).backward()
    assert int(net[1].num_batches_tracked) == tracked + 1
    for (name, mine), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
    assert same_bits(net, bits(other))


def test_the_network_runs_once_and_gains_nothing() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()
            self.together = bnfix.joint(self.net)

        def forward(self, a: Tensor, b: Tensor) -> Any:
            return self.together(a, b)

    plain, owner = nn.Module(), Owner()
    plain.net = conv_net()
    assert list(owner.state_dict()) == list(plain.state_dict())
    assert len(list(owner.parameters())) == len(list(plain.parameters()))
    assert [n for n, _ in owner.named_modules()] == [n for n, _ in plain.named_modules()]
    runs: list[int] = []
    owner.net.register_forward_hook(lambda _m, i, _o: runs.append(len(i[0])))
    owner(torch.randn(2, 3, 9, 9), torch.randn(4, 3, 9, 9))
    assert runs == [6]
    twin = copy.deepcopy(owner)
    assert twin.together.net is twin.net is not owner.net


def test_inputs_by_name_by_position_and_as_a_call() -> None:
    net = lived_in(Masked())
    (x1, m1), (x2, m2) = [(torch.randn(n, 4), torch.rand(n, 4)) for n in (2, 3)]
    expected = [net(x1, m1), net(x2, m2)]
    for calls in (
        ((x1, m1), (x2, m2)),
        ({"x": x1, "mask": m1}, {"mask": m2, "x": x2}),
        (bnfix.Call((x1,), {"mask": m1}), bnfix.Call((x2,), {"mask": m2})),
    ):
        assert all(torch.equal(a, b) for a, b in zip(bnfix.joint(net)(*calls), expected, strict=True))


def test_a_method_of_a_module_can_be_joined() -> None:
    net = lived_in(conv_net())
    a, b = torch.randn(2, 3, 9, 9), torch.randn(3, 3, 9, 9)
    assert relative_error(bnfix.joint(net.forward)(a, b)[1], net(b)) < MATMUL


@pytest.mark.parametrize(
    ("make", "look"),
    [
        (lambda y: (y, y * 2), lambda o: o[1]),
        (lambda y: [y, [y * 2]], lambda o: o[1][0]),
        (lambda y: {"z": y, "more": {"w": y * 2}}, lambda o: o["more"]["w"]),
        (lambda y: Pair(y, y * 2), lambda o: o.second),
        (lambda y: Out(y, (y * 2, "name", None, True)), lambda o: o.extra[0]),
        (lambda y: OrderedDict(z=y * 2), lambda o: o["z"]),
        (lambda y: torch.max(y * 2, 1), lambda o: o.values),
    ],
)
def test_nested_outputs_keep_their_types(make: Any, look: Any) -> None:
    net = lived_in(Gives(make))
    a, b = torch.randn(2, 4), torch.randn(3, 4)
    one, two = bnfix.joint(net)(a, b)
    assert type(one) is type(net(a))
    assert torch.equal(look(one), look(net(a)))
    assert torch.equal(look(two), look(net(b)))


def test_outputs_of_a_mapping_that_is_a_dataclass_too() -> None:
    """ModelOutput of the transformers library: items and attributes are the same values."""

    @dataclass
    class ModelOutput(OrderedDict):  # type: ignore[type-arg]
        logits: Tensor | None = None
        hidden: Tensor | None = None

        def __post_init__(self) -> None:
            for name in ("logits", "hidden"):
                if getattr(self, name) is not None:
                    super().__setitem__(name, getattr(self, name))

        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value)
            super().__setattr__(key, value)

        def __reduce__(self) -> Any:
            return type(self), (self.logits, self.hidden)

    net = lived_in(Gives(lambda y: ModelOutput(logits=y)))
    a, b = torch.randn(2, 4), torch.randn(3, 4)
    one, two = bnfix.joint(net)(a, b)
    assert one.logits is one["logits"]
    assert one.hidden is None
    assert torch.equal(two.logits, net(b).logits)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ((torch.randn(2, 4), torch.randn(2, 5)), r"shape behind the batch \(4,\) in call 0 and \(5,\) in call 1"),
        ((torch.randn(2, 4), torch.randn(2, 4).double()), r"dtype torch.float32 in call 0 and torch.float64 in call 1"),
        ((torch.randn(2, 4), torch.randn(2, 4, device="meta")), "device cpu in call 0 and meta in call 1"),
        (((torch.randn(2, 4), torch.randn(2, 4)), torch.randn(2, 4)), "different arguments"),
        (((torch.randn(2, 4), torch.randn(3, 4)), (torch.randn(2, 4), torch.randn(2, 4))), "along which axis"),
        (((torch.randn(2, 4), torch.tensor(1.0)), (torch.randn(2, 4), torch.tensor(1.0))), "one and the same object"),
        (({"x": torch.randn(2, 4), "mask": None}, {"x": torch.randn(2, 4), "mask": 3}), "argument mask"),
        (((torch.randn(2, 4), 2.0), (torch.randn(2, 4), 3.0)), r"call 0 \(2.0\) and call 1 \(3.0\)"),
        (((torch.randn(2, 4), "a"),), None),
        ((), "at least one"),
    ],
)
def test_inputs_that_do_not_go_together(calls: Any, said: str | None) -> None:
    net = lived_in(Gives(lambda y: y))
    before = bits(net)
    if said is None:
        with pytest.raises(TypeError):  # the network's own word: it takes one input
            bnfix.joint(net)(*calls)
        return
    with pytest.raises(ValueError, match=said):
        bnfix.joint(net)(*calls)
    assert same_bits(net, before)


def test_inputs_of_other_grad_modes() -> None:
    with torch.inference_mode():
        b = torch.randn(2, 4)
    with pytest.raises(ValueError, match="inference_mode in call 1"):
        bnfix.joint(lived_in(Masked()))(torch.randn(2, 4), b)


def test_what_is_no_call_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="an example is a tensor"):
        bnfix.joint(lived_in(Masked()))([torch.randn(4), torch.randn(4)])
    with pytest.raises(TypeError, match="module or another callable"):
        bnfix.joint("net")  # type: ignore[arg-type]


def test_one_tensor_for_all_calls_goes_along_as_it_is() -> None:
    net = lived_in(Masked())
    scale = torch.randn(4)  # no batch: four channels
    a, b = torch.randn(2, 4), torch.randn(3, 4)
    assert torch.equal(bnfix.joint(net)((a, scale), (b, scale))[1], net(b, scale))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda y: y.mean(), "scalar, such as a loss"),
        (lambda y: (y, y.square().sum()), r"the output\[1\] is a scalar"),
        (lambda y: (y, float(y.detach().sum())), r"the output\[1\] is -?[\d.]+: nobody can tell"),
        (lambda y: y.T, "its first axis is not the batch"),
        (lambda y: y @ y.T, "pairs of samples"),
        (lambda y: y.to_sparse(), "sparse"),
        (lambda y: {"z": object()}, "an? object: nobody can tell"),
        (lambda y: nn.utils.rnn.pack_padded_sequence(y[..., None], [4] * len(y), batch_first=True), "PackedSequence"),
    ],
)
def test_outputs_that_belong_to_no_call(make: Any, said: str) -> None:
    net = lived_in(Gives(make))
    with pytest.raises(ValueError, match=said):
        bnfix.joint(net)(torch.randn(2, 4), torch.randn(3, 4))


def test_a_weight_among_the_outputs_is_not_split() -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prototypes = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Any:
            return x @ self.prototypes.T, self.prototypes

    with pytest.raises(ValueError, match="not one value for each sample"):
        bnfix.joint(Prototypes())(torch.randn(2, 4), torch.randn(3, 4))  # five of each


def test_what_does_not_grow_with_the_batch_is_not_split_although_it_is_as_long() -> None:
    """A table of 5 × 5 of the weights beside 5 samples: a run on one sample more tells."""
    net = lived_in(Gives(lambda y: (y, torch.ones(5, 5) * y.detach().mean())))
    with pytest.raises(ValueError, match=r"output\[1\].*not one value for each sample"):
        bnfix.joint(net)(torch.randn(2, 4), torch.randn(3, 4))


def test_as_many_values_as_samples_is_no_doubt_after_a_look() -> None:
    net = lived_in(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))).train()
    runs: list[int] = []
    net.register_forward_hook(lambda _m, i, _o: runs.append(len(i[0])))
    together = bnfix.joint(net)
    other = copy.deepcopy(net)
    a, b = torch.randn(2, 4), torch.randn(3, 4)
    state = torch.get_rng_state()
    one, _ = together(a, b)  # five samples of five features each
    assert torch.equal(one, other(torch.cat([a, b]))[:2])
    assert same_bits(net, bits(other))
    assert torch.equal(torch.get_rng_state(), state)
    together(a, b)
    assert runs == [5, 6, 5, 5]  # its own, the look, the other's, and no second look


def test_two_batches_of_other_sizes_are_proof_enough() -> None:
    net = lived_in(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    runs: list[int] = []
    net.register_forward_hook(lambda _m, i, _o: runs.append(len(i[0])))
    together = bnfix.joint(net)
    together(torch.randn(2, 4), torch.randn(2, 4))
    together(torch.randn(2, 4), torch.randn(3, 4))
    assert runs == [4, 5]


def test_split_says_how_an_output_is_divided() -> None:
    net = lived_in(Gives(lambda y: y.T))
    a, b = torch.randn(2, 4), torch.randn(3, 4)
    together = bnfix.joint(net, split=lambda out, sizes: out.split(list(sizes), 1))
    assert torch.equal(together(a, b)[1], net(b))
    with pytest.raises(ValueError, match="gave 1 outputs for 2 calls"):
        bnfix.joint(net, split=lambda out, sizes: [out])(a, b)


def test_a_model_with_a_joint_call_can_be_exported() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()
            self.together = bnfix.joint(self.net)

        def forward(self, a: Tensor, b: Tensor) -> Any:
            return self.together(a, b)

    owner = lived_in(Owner())
    xs = torch.randn(2, 3, 9, 9), torch.randn(3, 3, 9, 9)
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(owner, xs, dynamic_shapes=(batch, batch), strict=False)
    calls = [n for n in program.graph.nodes if "batch_norm" in str(n.target)]
    assert len(calls) == 1
    more = torch.randn(4, 3, 9, 9), torch.randn(1, 3, 9, 9)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(*more), owner(*more), strict=True))


# --------------------------------------------------------------------------------------------- laws

sizes = st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(lambda s: sum(s) > 0)


@given(sizes=sizes, width=st.integers(1, 3), nested=st.booleans())
@settings(max_examples=50)
def test_law_split_undoes_concatenation(sizes: list[int], width: int, nested: bool) -> None:
    inputs = [torch.randn(n, width) for n in sizes]
    given_calls = [({"x": [x, (x * 2,)]},) if nested else (x,) for x in inputs]
    whole, counted = concatenated(as_calls(given_calls))
    assert counted == tuple(sizes)
    parts = parted(whole.args[0], counted, lambda _where, _tensor: None)
    for part, (call,) in zip(parts, given_calls, strict=True):
        for mine, theirs in zip(_flat(part), _flat(call), strict=True):
            assert torch.equal(mine, theirs)


@given(sizes=sizes, seed=st.integers(0, 5))
@settings(max_examples=25)
def test_law_joint_is_separate_forwards_in_eval(sizes: list[int], seed: int) -> None:
    net = lived_in(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)), seed)
    inputs = [torch.randn(n, 4) for n in sizes]
    for joint, x in zip(bnfix.joint(net)(*inputs), inputs, strict=True):
        assert torch.equal(joint, net(x))


@given(sizes=sizes.filter(lambda s: sum(s) > 1))
@settings(max_examples=25)
def test_law_how_the_samples_are_divided_does_not_matter_in_train(sizes: list[int]) -> None:
    one = lived_in(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))).train()
    other = copy.deepcopy(one)
    x = torch.randn(sum(sizes), 4)
    joint = torch.cat(bnfix.joint(one)(*x.split(sizes)))
    assert torch.equal(joint, other(x))
    assert same_bits(one, bits(other))


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in (value.values() if isinstance(value, dict) else value)
                                                      for t in _flat(v)]  # fmt: skip
