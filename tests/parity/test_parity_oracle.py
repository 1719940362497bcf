"""The oracle: what it computes, what it keeps, and what it says where it is not pure."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from parity_models import Named, folded, small
from torch import nn

from bnfix.errors import PassError
from bnfix.parity import compare, compare_sites, record, references
from bnfix.parity.oracle import SITE_SAMPLE, double_copy, subsample
from bnfix.parity.outputs import named_tensors, nesting
from bnfix.running import Call


def call(*shape: int, seed: int = 0) -> Call:
    return Call((torch.randn(*shape, generator=torch.Generator().manual_seed(seed)),))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_outputs_keep_their_names():
    point = namedtuple("point", "x y")

    @dataclass
    class Holder:
        score: torch.Tensor
        nothing: None

    one, two = torch.ones(1), torch.zeros(2)
    assert list(named_tensors(one)) == ["out"]
    assert list(named_tensors((one, [two, None]))) == ["out[0]", "out[1][0]"]
    assert list(named_tensors(OrderedDict(b=one, a=(two,)))) == ["out['b']", "out['a'][0]"]
    assert list(named_tensors(point(one, two))) == ["out.x", "out.y"]
    assert list(named_tensors(Holder(one, None))) == ["out.score"]
    assert nesting({"logits": one, "aux": (two, [one])}) == "{'logits': tensor, 'aux': (tensor, [tensor])}"


def test_the_oracle_is_the_model_in_float64_and_the_model_is_as_it_was():
    model, example = small(), call(2, 3, 12, 12)
    before, rng = state(model), torch.get_rng_state()
    (found,) = references(model, [example])
    assert found.exact
    assert found.notes == ()
    assert found.dtype == torch.float32
    by_hand = small().double()(example.args[0].double())
    assert torch.equal(found.oracle.outputs["out"], by_hand)
    assert torch.equal(found.draws[0].outputs["out"], model(example.args[0]))
    assert len(found.draws) >= 3  # plain, several with moved inputs as the output is small, other kernels
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert model[0].weight.dtype == torch.float32
    assert not model[0]._forward_hooks


def test_the_noise_is_that_of_float32():
    model = small(32, 100)
    parity = compare(refs := references(model, [call(8, 3, 12, 12)]), [record(model, refs[0].call)])
    # one rounding is 6e-8 relative; ten layers of sums of at most 288 products stay within 100 of them
    assert 1e-8 < parity.outputs[0].noise < 6e-6
    assert parity.outputs[0].noise_ratio <= 1.0  # the model itself is one of the draws


def test_backends_are_as_before():
    enabled = torch.backends.mkldnn.enabled
    references(small(), [call(1, 3, 12, 12)])
    assert torch.backends.mkldnn.enabled == enabled


def test_the_oracle_keeps_each_modules_mode():
    model = small()
    model[2].train()
    references(model, [call(2, 3, 12, 12)])
    assert [m.training for m in model] == [False, False, True] + [False] * 6


def test_contamination_of_the_oracle_is_named():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), Cast())

        def forward(self, x):
            return self.inner(x)

    class Cast(nn.Module):
        def forward(self, x):
            return x.float().softmax(-1).to(x.dtype)

    (found,) = references(Casts().eval(), [call(2, 4)])
    assert found.exact
    assert len(found.notes) == 1
    assert found.notes[0].startswith("oracle contaminated at inner.1 (")
    assert "float32" in found.notes[0]


def test_exact_constants_are_no_contamination():
    class Adds(nn.Module):
        def forward(self, x):
            return x + torch.zeros(4) + torch.arange(4)

    assert references(Adds().eval(), [call(2, 4)])[0].notes == ()


def test_tensors_kept_as_plain_attributes_go_to_float64_too():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrices = [torch.randn(4, 4)]

        def forward(self, x):
            return x @ self.matrices[0]

    model = Plain().eval()
    (found,) = references(model, [call(2, 4)])
    assert found.exact
    assert found.oracle.outputs["out"].dtype == torch.float64
    assert model.matrices[0].dtype == torch.float32


def test_a_model_that_has_no_float64_run_is_refuted_but_never_proven():
    class Only32(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(40, 40)

        def forward(self, x):
            return nn.functional.linear(x.float(), self.l.weight, self.l.bias)

    model = Only32().eval()
    refs = references(model, [call(8, 40), call(8, 40, seed=1)])
    assert not refs[0].exact
    assert "doesn't run in float64" in refs[0].notes[0]
    same = compare(refs, [record(model, r.call) for r in refs])
    assert same.verdict == "inconclusive"
    other = Only32().eval()
    assert compare(refs, [record(other, r.call) for r in refs]).verdict == "failed"


def test_a_float64_model_is_judged_by_moved_inputs():
    model = small().double()
    calls = [Call((torch.randn(2, 3, 12, 12, dtype=torch.float64),)) for _ in range(2)]
    fold = nn.Sequential(folded(model[0], model[1]), nn.Identity(), *model[2:]).eval()
    refs = references(model, calls)
    assert "no more exact" in refs[0].notes[0]
    assert compare(refs, [record(fold, c) for c in calls]).passed
    fold[0].bias.data[0] *= 1 + 1e-11
    assert compare(refs, [record(fold, c) for c in calls]).verdict == "failed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_its_own_noise(dtype):
    model = small(16, 64).to(dtype)
    calls = [Call((torch.randn(4, 3, 12, 12).to(dtype),))]
    refs = references(model, calls)
    assert refs[0].dtype == dtype
    fold = nn.Sequential(folded(model[0], model[1]), nn.Identity(), *model[2:]).eval()
    assert compare(refs, [record(fold, c) for c in calls]).passed
    fold[0].weight.data *= -1  # bfloat16 is so coarse that a factor of 1.5 would only warn
    assert compare(refs, [record(fold, c) for c in calls]).verdict == "failed"


def test_floats_that_are_indices_are_not_moved():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(50, 30))

        def forward(self, x, index):
            return x * self.table[index.long()]

    model = Picks().eval()
    calls = [Call((torch.randn(20, 30), torch.arange(20).float()))]
    parity = compare(refs := references(model, calls), [record(model, c) for c in calls])
    # moved by 1 ulp, index 3 would become 2.9999998 and pick another row: a noise of 1, not of 1e-7
    assert parity.outputs[0].noise < 1e-6
    assert len(refs[0].draws) >= 2


def test_a_threshold_crossed_by_moved_inputs_does_not_raise_the_noise_without_end():
    class Steps(nn.Module):
        def forward(self, x):
            return x + 1e-3 * (x >= 0.5).to(x.dtype)

    x = torch.full((32, 32), 0.5) + torch.eye(32)
    refs = references(Steps().eval(), [Call((x,))])
    wrong = {"out": refs[0].draws[0].outputs["out"] * (1 + 1e-4)}
    assert compare(refs, [wrong]).verdict == "failed"


# --------------------------------------------------------------------------------------- sites


def test_sites_are_cloned_before_an_inplace_activation_changes_them():
    model, example = small(), call(2, 3, 12, 12)
    found = record(model, example, ["1"])
    assert torch.equal(found.sites["1"][0], model[1](model[0](example.args[0])).flatten())


def test_sites_are_subsampled_without_passing_over_a_channel():
    values = torch.arange(1000).repeat(70 * 4, 1)  # (N, C): a stride of 1000 would see one channel only
    kept = subsample(values)
    assert kept.numel() <= SITE_SAMPLE
    assert len(kept.unique()) == 1000
    assert torch.equal(kept, subsample(values))


def test_each_call_of_a_site_is_kept_and_sites_come_in_the_order_of_their_calls():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(OrderedDict(late=nn.Linear(6, 6), early=shared, again=shared)).eval()

    class Reordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner.late(self.inner.early(self.inner.early(x)))

    found = record(Reordered().eval(), call(2, 6), ["inner.late", "inner.early"])
    assert found.order == ("inner.early", "inner.early@1", "inner.late")
    assert {site: len(v) for site, v in found.sites.items()} == {"inner.early": 2, "inner.late": 1}


def test_an_error_is_found_at_its_site_where_the_output_hides_it():
    model, calls = small(16), [call(2, 3, 14, 14)]
    wrong = small(16)
    wrong[1].running_var[5] *= 1.0005
    with torch.no_grad():  # a later layer that looks elsewhere: the error never reaches the output
        for m in (model, wrong):
            m[3].weight[:, 5] = 0
    refs = references(model, calls, sites=["1", "4"])
    runs = [record(wrong, c, ["1", "4"]) for c in calls]
    assert compare(refs, runs).passed
    sites = {o.name: o.verdict for o in compare_sites(refs, runs)}
    assert sites == {"1": "failed", "4": "passed"}


def test_sites_can_have_another_name_in_the_candidate():
    model, calls = small(), [call(2, 3, 12, 12)]
    fold = nn.Sequential(folded(model[0], model[1]), nn.Identity(), *model[2:]).eval()
    refs = references(model, calls, sites=["1", "4"])
    (found,) = compare_sites(refs, [record(fold, c, ["0"]) for c in calls], {"1": "0"})
    assert (found.name, found.verdict) == ("1", "passed")


def test_an_unknown_site_is_an_error_and_a_failing_forward_a_clear_one():
    with pytest.raises(ValueError, match="nowhere"):
        record(small(), call(1, 3, 12, 12), ["nowhere"])
    model = small()
    with pytest.raises(PassError, match="the forward failed on 1x4x12x12"):
        record(model, call(1, 4, 12, 12), ["1"])
    assert not model[1]._forward_hooks


def test_several_inputs_and_nested_outputs():
    model = Named()
    x, mask = torch.randn(4, 3, 8, 8), torch.randn(4, 8)
    refs = references(model, [Call((x,), {"mask": mask})])
    parity = compare(refs, [record(model, r.call) for r in refs])
    assert [o.name for o in parity.outputs] == ["out['logits']", "out['feat'][0]", "out['top']"]
    assert parity.passed


def test_double_copy_leaves_integers_alone():
    wide = double_copy(small())
    assert wide[1].num_batches_tracked.dtype == torch.int64
    assert wide[1].running_var.dtype == torch.float64
