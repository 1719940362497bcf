"""Rules about a module tree and its stored values: what is a fault there, and what only looks like one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import conv_bn, lived_in
from rules_nets import IMAGES, Generator, Projector, Residual, check, codes, only, small
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import bnfix
from bnfix.graph import mend
from bnfix.types import Fix

FEW = settings(max_examples=40)


def bn(model: nn.Module, index: int = 1) -> nn.BatchNorm2d:
    norm = model[index]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


# ------------------------------------------------------------------------------------- clean ones


@pytest.mark.parametrize("make", [small, lambda: small(momentum=0.0003), lambda: small(eps=0.1)])
def test_a_lived_in_model_has_no_finding_at_all(make: object) -> None:
    said = check(make())  # type: ignore[operator]
    assert said.findings == ()
    assert {"BN101", "BN104", "BN105", "BN106", "BN107", "BN201", "BN202", "BN203", "BN206"} <= set(said.checked)


@pytest.mark.parametrize(
    "make", [lambda: conv_bn(), Projector, Residual, Generator], ids=["conv", "BYOL", "zero", "GAN"]
)
def test_a_fresh_model_is_at_most_information(make: object) -> None:
    model = make()  # type: ignore[operator]
    said = check(model)
    assert codes(said) == {"BN202"}
    assert said.clean
    assert "a new model" in said.findings[0].message


def test_a_dry_run_of_a_fresh_model_is_no_fault() -> None:
    model = conv_bn()
    model(IMAGES)
    assert check(model).findings == ()


def test_fastai_begins_with_a_small_shift() -> None:
    model = conv_bn()
    bn(model).bias.data.fill_(1e-3)
    assert codes(check(model), "error", "warning") == set()


@FEW
@given(channels=st.integers(2, 256), seed=st.integers(0, 10_000), gan=st.booleans())
def test_weights_that_are_drawn_at_first_are_no_sign_of_training(channels: int, seed: int, gan: bool) -> None:
    """DCGAN's N(1, .02) beside 0, RepVGG's N(.1, .1) beside N(0, .1); once batches were counted they are no excuse."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(channels)
    nn.init.normal_(norm.weight, *((1.0, 0.02) if gan else (0.1, 0.1)))
    if not gan:
        nn.init.normal_(norm.bias, 0.0, 0.1)
    assert only(check(nn.Sequential(norm)), "BN202").severity == "info"
    norm.num_batches_tracked.fill_(9)  # type: ignore[union-attr]
    assert only(check(nn.Sequential(norm)), "BN202").severity == "error"


def test_a_new_head_on_a_trained_backbone_is_information() -> None:
    model = nn.Sequential(small().train(), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1))
    finding = only(check(model), "BN202")
    assert (finding.severity, finding.sites) == ("info", ("1",))
    assert "new layers" in finding.message


def test_a_checkpoint_with_counter_zero_and_good_statistics_is_clean() -> None:
    model = small()
    assert {int(m.num_batches_tracked) for m in model if isinstance(m, nn.BatchNorm2d)} == {0}
    assert check(model).findings == ()


def test_frozen_norms_hold_a_folded_form_on_purpose() -> None:
    """detectron2's: weight and bias carry everything, mean 0, variance 1 - eps or 1."""
    norm = FrozenBatchNorm2d(4)
    norm.weight.normal_()
    norm.bias.normal_()
    assert check(nn.Sequential(nn.Conv2d(3, 4, 1), norm).half()).findings == ()


def test_dead_channels_and_large_means_are_numbers() -> None:
    model = small()
    bn(model).running_var[:2] = 0.0  # type: ignore[index]
    bn(model).running_mean[3] = -1e8  # type: ignore[index]
    assert check(model).findings == ()


def test_norms_frozen_on_purpose_are_clean() -> None:
    model = small().train()
    for norm in (bn(model), bn(model, 4)):
        norm.eval().requires_grad_(False)
        norm.momentum = 0.0
    assert check(model).findings == ()


def test_lazy_norms_and_those_on_meta_are_skipped_with_a_reason() -> None:
    for norm in (nn.LazyBatchNorm2d(), nn.BatchNorm2d(4, device="meta")):
        said = check(nn.Sequential(norm))
        assert said.findings == ()
        skipped = {s.code: s for s in said.skipped if s.sites}
        assert {"BN201", "BN202", "BN203"} <= skipped.keys()
        assert "no values" in skipped["BN201"].reason


def test_names_in_lists_and_objects_are_no_places() -> None:
    model = small()
    model.stages = [model[1]]  # type: ignore[assignment]
    model.by_name = {"first": model[1]}  # type: ignore[assignment]
    assert check(model).by_code("BN101") == ()


# ---------------------------------------------------------------------------------------- BN101


def test_a_shared_block_is_one_finding() -> None:
    block = small()
    model = nn.ModuleDict({"online": block, "features": block})
    finding = only(check(model), "BN101")
    assert set(finding.sites) == {"online.1", "features.1", "online.4", "features.4"}
    assert "online, features are one block: its 2 norms" in finding.message


def test_two_norms_under_two_names_each_are_two_findings() -> None:
    a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    lived_in(nn.ModuleList([a, b]))
    said = check(nn.Sequential(a, b, a, nn.ReLU(), b))
    assert [f.sites for f in said.by_code("BN101")] == [("0", "2"), ("1", "4")]


# ---------------------------------------------------------------------------------- BN104, BN105


def test_tracking_switched_off_warns_and_is_repaired_with_data() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    finding = only(check(model), "BN104")
    assert (finding.severity, finding.sites) == ("warning", ("1",))
    assert finding.fix is not None
    mend(model, finding.fix)
    bnfix.recalibrate(model, [IMAGES])
    assert check(model).by_code("BN104") == ()
    conv = model[0](IMAGES).detach().double()
    # Mean and variance over batch and positions, by hand: 1e-6 is some ten roundings of float32.
    torch.testing.assert_close(bn(model).running_mean.double(), conv.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]
    torch.testing.assert_close(bn(model).running_var.double(), conv.var((0, 2, 3)), rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_instance_norms_need_no_statistics() -> None:
    assert check(nn.Sequential(nn.InstanceNorm2d(3), nn.InstanceNorm1d(4, affine=True))).findings == ()


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("tracking", [True, False])
def test_a_flipped_flag_is_an_error_in_both_directions(cls: type[nn.Module], tracking: bool) -> None:
    norm = cls(4, track_running_stats=tracking)
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 1), norm))
    norm.track_running_stats = not tracking  # type: ignore[assignment]
    said = check(model)
    finding = only(said, "BN105")
    assert finding.severity == "error"
    assert finding.fix is not None
    assert finding.fix.verb == ("set" if tracking else "reset")
    assert said.by_code("BN104") == ()
    mend(model, finding.fix)
    assert check(model).by_code("BN105") == ()


def test_a_lazy_norm_without_values_is_no_mismatch() -> None:
    assert check(nn.Sequential(nn.LazyBatchNorm2d())).by_code("BN105") == ()


# ---------------------------------------------------------------------------------- BN106, BN107


@pytest.mark.parametrize(
    ("momentum", "severity", "to"),
    [(0.99, "warning", 0.01), (0.9, "warning", 0.1), (0.997, "warning", 0.003), (1.0, "warning", 0.1),
     (1.1, "warning", 0.1), (None, "info", 0.1), (0.89, None, None), (0.5, None, None), (0.0003, None, None)],
)  # fmt: skip
def test_momentum(momentum: float | None, severity: str | None, to: float | None) -> None:
    model = small(momentum=momentum)
    found = check(model).by_code("BN106")
    assert [f.severity for f in found] == ([severity] if severity else [])
    if found:
        assert found[0].fix is not None
        assert found[0].fix.options == {"momentum": to}
        assert found[0].sites == ("1", "4")


def test_momentum_zero_counts_in_training_mode_alone() -> None:
    model = small(momentum=0.0)
    assert check(model).by_code("BN106") == ()
    assert only(check(model.train()), "BN106").severity == "warning"
    bn(model).eval()
    assert only(check(model), "BN106").sites == ("4",)


def test_momentum_without_statistics_means_nothing() -> None:
    assert check(nn.Sequential(nn.InstanceNorm2d(3, momentum=0.99))).findings == ()


@pytest.mark.parametrize(("dtype", "lost"), [(torch.float16, 2**-10 / 0.2), (torch.bfloat16, 2**-7 / 0.2)])
def test_what_sixteen_bits_lose_is_what_the_message_says(dtype: torch.dtype, lost: float) -> None:
    model = small().to(dtype)
    finding = only(check(model), "BN107")
    assert finding.measured["lost"] == pytest.approx(lost)
    norm = nn.BatchNorm1d(1).to(dtype)
    for factor, moves in ((0.98, False), (1.5, True)):  # at 1, above which a unit in the last place is ulp(1)
        norm.running_mean.fill_(1.0)  # type: ignore[union-attr]
        x = torch.full((8, 1), 1.0 + lost * factor, dtype=torch.float64)
        step = norm.running_mean + (0.1 * (x.mean(0) - 1.0)).to(dtype)  # type: ignore[operator]
        assert bool(step != 1.0) is moves


@pytest.mark.parametrize(("training", "severity"), [(True, "warning"), (False, "info")])
def test_sixteen_bits_are_a_fault_where_they_learn(training: bool, severity: str) -> None:
    """``model.half().eval()`` is how many models are deployed."""
    model = small().half().train(training)
    assert only(check(model), "BN107").severity == severity
    model[1].train(not training)
    both = check(model).by_code("BN107")
    assert [(f.severity, f.sites) for f in both] == [("warning", ("14"[training],)), ("info", ("41"[training],))]


def test_a_norm_in_float32_between_half_layers_is_clean() -> None:
    model = small().half()
    mend(model, Fix("float", "", ("1", "4")))
    assert check(model).findings == ()
    assert model(IMAGES.half()).dtype == torch.float16


# ------------------------------------------------------------------------- BN201, BN202 and BN203


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_non_finite_statistics(name: str, value: float) -> None:
    model = small()
    model[4].get_buffer(name)[5] = value
    finding = only(check(model), "BN201")
    assert (finding.severity, finding.sites) == ("error", ("4",))
    assert "1 of 6 not finite" in finding.message


def test_a_negative_variance_is_found_and_the_worst_layer_comes_first() -> None:
    model = small()
    bn(model).running_var[0] = -1e-6  # type: ignore[index]
    bn(model, 4).running_mean.fill_(math.nan)  # type: ignore[union-attr]
    finding = only(check(model), "BN201")
    assert finding.sites == ("4", "1")
    assert finding.measured["channels"] == 7
    assert "1 negative in 1" in finding.message


def test_one_nan_survives_a_thousand_good_batches() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.tensor([[math.nan, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    for _ in range(1000):
        norm(torch.randn(4, 3))
    finding = only(check(nn.Sequential(norm)), "BN201")
    assert "1 of 3 not finite" in finding.message


@pytest.mark.parametrize("change", ["weight", "bias", "counter"])
def test_initial_statistics_in_a_trained_layer_are_an_error(change: str) -> None:
    model = small()
    norm = bn(model)
    norm.reset_running_stats()
    norm.reset_parameters()
    if change == "weight":
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    elif change == "bias":
        nn.init.normal_(norm.bias, 0.0, 0.05)
    else:
        norm.num_batches_tracked.fill_(30)  # type: ignore[union-attr]
    finding = only(check(model), "BN202")
    assert (finding.severity, finding.sites) == ("error", ("1",))
    assert ("30 batches" in finding.message) is (change == "counter")


def test_statistics_reset_everywhere_after_training() -> None:
    model = small()
    for norm in (bn(model), bn(model, 4)):
        norm.reset_running_stats()
    finding = only(check(model), "BN202")
    assert (finding.severity, finding.sites) == ("error", ("1", "4"))


def train(steps: int, momentum: float, classes: int = 4) -> nn.Sequential:
    """A small net, and so many steps of it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, classes, 3), nn.BatchNorm2d(classes, momentum=momentum), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 6, 6) * 2).square().mean().backward()
        optimizer.step()
    return model


@FEW
@given(steps=st.integers(1, 60), momentum=st.sampled_from([0.001, 0.01, 0.03, 0.1, 0.3]))
def test_the_share_of_initial_values_is_what_the_formula_says(steps: int, momentum: float) -> None:
    model = train(steps, momentum)
    share = (1 - momentum) ** steps
    found = check(model).by_code("BN203")
    assert [f.severity for f in found] == (["error"] if share > 0.3 else ["warning"] if share > 0.05 else [])
    assert bn(model).running_var.min() >= share * (1 - 1e-5)  # type: ignore[union-attr]
    if found:
        assert found[0].measured["share"] == pytest.approx(share)


def test_statistics_that_came_from_elsewhere_are_not_judged_by_their_counter() -> None:
    """A pretrained model, counter 0, fine-tuned for ten steps: a variance lies below the share that would be left."""
    model = train(300, 0.1)
    bn(model).num_batches_tracked.fill_(10)  # type: ignore[union-attr]
    bn(model).running_var.clamp_(min=0.4)  # type: ignore[union-attr]
    assert only(check(model), "BN203").measured["share"] == pytest.approx(0.9**10)
    bn(model).running_var[0] = 0.2  # type: ignore[index]
    assert check(model).by_code("BN203") == ()


def test_update_bn_over_a_short_loader_is_clean() -> None:
    model = train(100, 0.1)
    batches = [torch.randn(32, 3, 6, 6) * 0.2 for _ in range(14)]
    torch.optim.swa_utils.update_bn(batches, model)
    assert int(bn(model).num_batches_tracked) == 14  # type: ignore[arg-type]
    assert check(model).findings == ()


def test_recalibration_heals_it_also_for_who_has_no_data_at_hand() -> None:
    model = train(5, 0.01)
    assert only(check(model), "BN203").severity == "error"
    bnfix.recalibrate(model, [torch.randn(64, 3, 6, 6) * 2])
    assert check(model).findings == ()


def test_a_cumulative_average_keeps_no_initial_values() -> None:
    model = train(3, 0.1)
    bn(model).momentum = None
    assert codes(check(model)) == {"BN106"}


# ---------------------------------------------------------------------------------- BN206, looking


def test_zero_gamma_without_a_graph_needs_a_learned_shift() -> None:
    block = Residual().train()
    block(torch.randn(4, 3, 6, 6))
    assert check(block).by_code("BN206") == ()  # zero-init after one batch: fine
    nn.init.normal_(block.bn1.bias)
    nn.init.zeros_(block.bn1.weight)
    assert only(check(block), "BN206").sites == ("bn1",)


def test_inline_ignore_takes_a_layer_out() -> None:
    model = small(momentum=0.99)
    bn(model).bnfix_ignore = {"BN106"}  # type: ignore[assignment]
    bn(model, 4).bnfix_ignore = "BN1"  # type: ignore[assignment]
    said = check(model)
    assert said.findings == ()
    assert [f.code for f in said.ignored] == ["BN106"]


def test_a_norm_that_is_the_model_has_a_name() -> None:
    norm = nn.BatchNorm1d(3, momentum=0.99)
    norm.running_mean.fill_(0.5)  # type: ignore[union-attr]
    finding = only(check(norm), "BN106")
    assert finding.sites == ("(root)",)
    assert finding.fix is not None
    mend(norm, finding.fix)
    assert norm.momentum == 0.01
    norm.momentum, norm.bnfix_ignore = 0.99, {"BN106"}  # type: ignore[assignment]
    assert check(norm).findings == ()


def test_checking_leaves_everything_as_it_was() -> None:
    model = small(momentum=None).train()
    bn(model).running_mean[0] = math.nan  # type: ignore[index]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = {p: dict(vars(m)) for p, m in model.named_modules()}
    check(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(-1).nan_to_num(5.0), before[name].view(-1).nan_to_num(5.0))
    assert {p: dict(vars(m)) for p, m in model.named_modules()} == attributes
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in model.parameters())
    assert isinstance(IMAGES, Tensor)
