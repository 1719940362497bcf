"""Rules about the graph: who is called how often, what stands in front of a norm, what a program has in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import bits, lived_in, same_bits
from rules_nets import (
    IMAGES,
    Auxiliary,
    Conditional,
    FunctionalNorm,
    Projector,
    Residual,
    Siamese,
    StandardisedConv,
    check,
    codes,
    only,
    small,
)
from torch import Tensor, nn

import bnfix
from bnfix.errors import PassError
from bnfix.graph import gather, training_facts
from bnfix.running import as_call
from bnfix.types import Evidence

GRAPH = {"BN102", "BN103", "BN109"}
OFF = ("BN108", "BN110", "BN111")


def parts(*layers: nn.Module) -> nn.Module:
    return lived_in(nn.Sequential(*layers))


# --------------------------------------------------------------------------------------- clean


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (small, IMAGES),
        (lambda: lived_in(Auxiliary()), IMAGES),
        (lambda: lived_in(Projector()), torch.randn(6, 12)),
        (lambda: lived_in(Conditional()), (IMAGES, torch.tensor([0, 1, 2, 3]))),
        (lambda: nn.Sequential(StandardisedConv(3, 4, 3), nn.ReLU()), IMAGES),
        (FunctionalNorm, IMAGES),
        (lambda: parts(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4), nn.ReLU()), IMAGES),
        (lambda: parts(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.ReLU()), IMAGES),
        (lambda: parts(nn.Flatten(), nn.BatchNorm1d(432), nn.Linear(432, 2)), IMAGES[:1]),
    ],
    ids=["plain", "auxiliary", "projector", "conditional", "StdConv", "functional", "instance", "sync", "batch of 1"],
)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_legitimate_structures_are_clean(make: Callable[[], nn.Module], example: object, mode: bool) -> None:
    said = check(make().train(mode), example)
    assert said.findings == ()
    assert set(said.checked) >= GRAPH
    assert not [s for s in said.skipped if s.code in GRAPH]


def test_without_an_example_the_graph_is_not_checked_and_that_is_said() -> None:
    said = check(small())
    assert not GRAPH & set(said.checked)
    assert {s.code: s.needs for s in said.skipped}["BN102"] == "example= (on the command line: --input)"


def test_an_example_that_fails_is_an_error_not_a_clean_model() -> None:
    model = small()
    before = bits(model)
    with pytest.raises(PassError, match="forward failed on 1x5x9x9") as failed:
        check(model, torch.randn(1, 5, 9, 9))
    assert "its forward takes" in str(failed.value.hint)
    assert same_bits(model, before)


# -------------------------------------------------------------------------------- BN102 and BN103


def test_a_siamese_encoder_is_information_with_its_number_of_calls() -> None:
    model = lived_in(Siamese())
    said = check(model, (IMAGES, IMAGES))
    finding = only(said, "BN102")
    assert (finding.severity, finding.sites, finding.measured["calls"]) == ("info", ("encoder.1",), 2)
    assert said.clean


def test_calls_that_training_alone_makes_count() -> None:
    class Contrastive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y - self.body(x.flip(-1)) if self.training else y

    finding = only(check(Contrastive(), IMAGES), "BN102")
    assert finding.sites == ("body.1", "body.4")


def test_one_branch_of_a_cond_is_one_call() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.cond(x.sum() > 0, lambda t: self.norm(t) * 2, lambda t: self.norm(t) - 1, (x,))
            return out

    said = check(lived_in(Branching()), IMAGES)
    assert said.by_code("BN102") == ()
    assert not [s for s in said.skipped if s.code in GRAPH]


def test_never_called_is_told_from_called_in_training_alone() -> None:
    model = lived_in(Auxiliary())
    model.spare = nn.BatchNorm2d(4)
    lived_in(model)
    finding = only(check(model, IMAGES), "BN103")
    assert (finding.severity, finding.sites) == ("info", ("spare",))


def test_where_training_mode_can_not_be_run_that_is_said_by_site() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux = small(), nn.BatchNorm2d(6)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            assert targets is not None or not self.training, "targets should not be none when in training mode"
            y: Tensor = self.drop(self.body(x))
            return self.aux(y) if self.training else y  # type: ignore[no-any-return]

    said = check(lived_in(Detector()), IMAGES)
    assert said.findings == ()
    skipped = {s.code: s for s in said.skipped}
    assert skipped["BN103"].sites == ("aux",)
    assert "targets should not be none" in skipped["BN103"].reason
    assert "not F.dropout" in skipped["BN109"].reason
    assert set(said.checked) >= GRAPH


def test_tensors_of_a_norm_that_are_read_elsewhere_count_as_use() -> None:
    class Fused(nn.Module):
        """A convolution that folds its norm as it runs, as quantization-aware training does."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()  # type: ignore[operator]
            return F.conv2d(
                x, self.conv.weight * scale[:, None, None, None], self.bn.bias - self.bn.running_mean * scale
            )  # type: ignore[operator]

    assert check(lived_in(Fused()), IMAGES).by_code("BN103") == ()


# --------------------------------------------------------------------------------- BN104 in the graph


def test_a_training_mode_that_is_written_into_the_code() -> None:
    said = check(FunctionalNorm(training=True).eval(), IMAGES)
    assert (only(said, "BN104").severity, only(said, "BN104").sites) == ("warning", ("(root)",))
    assert codes(said, "error") == set()  # meant, in MAML
    assert check(FunctionalNorm(training=False), IMAGES).findings == ()


def test_a_norm_without_statistics_is_told_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    assert only(check(model, IMAGES), "BN104").fix is not None
    model[1].track_running_stats = True  # type: ignore[assignment]
    said = check(model, IMAGES)
    assert {f.code for f in said.findings} == {"BN105"}


# ---------------------------------------------------------------------------------------- BN109


@pytest.mark.parametrize(
    "between",
    [(), (nn.ReLU(),), (nn.SiLU(), nn.AvgPool2d(2)), (nn.MaxPool2d(2), nn.Flatten(2), nn.Unflatten(2, (3, 3)))],
    ids=["none", "relu", "pool", "shapes"],
)
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_before_a_norm(between: tuple[nn.Module, ...], kind: type[nn.Module]) -> None:
    model = parts(nn.Conv2d(3, 4, 7), kind(0.2), *between, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    finding = only(check(model, IMAGES), "BN109")
    assert (finding.severity, finding.measured["p"]) == ("warning", 0.2)
    assert finding.sites == (str(2 + len(between)),)


class Functional(nn.Module):
    """F.dropout, which no module tree shows, and a swish written out."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.conv, self.norm, self.last, self.p = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), p

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.conv(x), self.p, self.training)
        out: Tensor = self.last(self.norm(y * torch.sigmoid(y)))
        return out


def test_functional_dropout_is_seen_whatever_mode_the_model_is_in() -> None:
    for mode in (True, False):
        assert only(check(lived_in(Functional()).train(mode), IMAGES), "BN109").sites == ("norm",)
    assert check(lived_in(Functional(0.0)), IMAGES).findings == ()


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Dropout(0.5), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
        (nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 4, 1)),
        (nn.AlphaDropout(0.5), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
        (nn.Dropout(0.0), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
        (nn.Dropout(0.5), nn.LayerNorm(12), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
    ],
    ids=["layer between", "behind", "alpha", "p = 0", "another norm"],
)
def test_dropout_that_does_no_harm(layers: tuple[nn.Module, ...]) -> None:
    assert check(parts(*layers), IMAGES).findings == ()


def test_dropout_on_a_residual_branch_is_diluted_and_not_reported() -> None:
    class PostNorm(nn.Module):
        """A transformer layer with a batch norm behind each residual, as in PatchTST."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.head = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.norm(x + F.dropout(self.linear(x), 0.2, self.training)))
            return out

    class Skipping(PostNorm):
        """Dropout in front of the whole residual."""

        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(x, 0.2, self.training)
            out: Tensor = self.head(self.norm(y + self.linear(y)))
            return out

    for model in (PostNorm(), Skipping()):
        assert check(lived_in(model), torch.randn(8, 12)).findings == ()


@settings(max_examples=20)
@given(p=st.floats(0.05, 0.8))
def test_the_growth_of_the_variance_is_what_the_message_says(p: float) -> None:
    """Behind a ReLU of normal values; 400,000 draws know a variance to some 1 %."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, generator=generator).relu().double()
    kept = (torch.rand(len(x), generator=generator) >= p).double()
    grown = ((x * kept / (1 - p)).var() / x.var()).item()
    model = parts(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout(p), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    assert only(check(model, IMAGES, select=("BN109",)), "BN109").measured["growth"] == pytest.approx(grown, rel=0.03)


# ---------------------------------------------------------------------------------- off by default


def test_what_is_a_choice_is_off_by_default_and_found_on_demand() -> None:
    model = parts(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert check(model, IMAGES).findings == ()
    said = check(model, IMAGES, select=OFF)
    assert {f.code: f.sites for f in said.findings} == {"BN108": ("4",), "BN110": ("2",), "BN111": ("4",)}
    assert {f.severity for f in said.findings} == {"info"}


def test_a_bias_with_a_second_reader_is_not_redundant() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = self.norm(y) + y
            return out

    assert check(lived_in(Read()), IMAGES, select=("BN108",)).findings == ()


# ------------------------------------------------------------------------------------------- BN206


def test_a_residual_end_is_told_by_the_graph_and_a_dead_layer_too() -> None:
    block = Residual()
    with torch.no_grad():
        block(torch.randn(8, 3, 6, 6))
    assert check(block, IMAGES).by_code("BN206") == ()
    nn.init.zeros_(block.bn1.weight)
    assert only(check(block, IMAGES), "BN206").sites == ("bn1",)


# ------------------------------------------------------------------------------------------- BN209


@settings(max_examples=25)
@given(kind=st.sampled_from(["conv", "grouped", "transpose", "grouped transpose", "linear"]), seed=st.integers(0, 99))
def test_the_sizes_in_front_of_a_norm_are_those_that_a_fold_gives(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer: nn.Module = {
        "conv": lambda: nn.Conv2d(4, 6, 3),
        "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
        "transpose": lambda: nn.ConvTranspose2d(4, 6, 3),
        "grouped transpose": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        "linear": lambda: nn.Linear(4, 6),
    }[kind]()
    norm = nn.BatchNorm1d(6) if kind == "linear" else nn.BatchNorm2d(6)
    model = lived_in(nn.Sequential(layer, norm), seed)
    example = torch.randn(3, 4) if kind == "linear" else torch.randn(3, 4, 5, 5)
    from bnfix.evidence import of_model

    (state,) = of_model(model, example).norms or ()
    assert state.feeder is not None
    assert state.weight is not None
    assert state.var is not None
    assert state.eps is not None
    expected = state.feeder * abs(state.weight) / (state.var + state.eps) ** 0.5
    folded = bnfix.fold(model, example).model
    assert folded is not None
    weight = folded[0].weight.detach().double()  # type: ignore[index]
    if "transpose" in kind:
        groups = 2 if "grouped" in kind else 1
        sizes = torch.cat([w.transpose(0, 1).flatten(1).norm(dim=1) for w in weight.chunk(groups)])
    else:
        sizes = weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(torch.from_numpy(expected), sizes, rtol=1e-6, atol=0)  # one rounding to float32 each


# ------------------------------------------------------------------------------------------- BN501


def test_an_exported_program_in_training_mode() -> None:
    torch._dynamo.reset()  # torch 2.7 counts what other tests exported against a limit
    model = small()
    said = check(torch.export.export(model.train(), (IMAGES,)))
    assert (only(said, "BN501").severity, only(said, "BN501").sites) == ("error", ("1", "4"))
    assert said.by_code("BN104") == ()
    assert check(torch.export.export(model.eval(), (IMAGES,))).findings == ()


def test_a_decomposed_program_in_training_mode() -> None:
    program = torch.export.export(small().train(), (IMAGES,)).run_decompositions()
    assert only(check(program), "BN501").sites == ("1", "4")


def test_a_model_in_training_mode_is_no_program() -> None:
    said = check(small().train(), IMAGES)
    assert "BN501" in said.checked
    assert said.findings == ()


# -------------------------------------------------------------------------- facts of training mode


def test_facts_of_training_mode_have_norms_in_evaluation_and_touch_nothing() -> None:
    model = lived_in(Functional())
    before, state = dict(model.state_dict()), torch.get_rng_state()
    facts, why = training_facts(model, [as_call(IMAGES[:1])])
    assert why == ""
    assert facts is not None
    (norm,) = facts.norms
    ((route, index),) = norm.calls
    assert facts.routes[route].ops[index].attrs["training"] is False
    assert any("dropout" in op.target and op.attrs["train"] for op in facts.routes[0].ops)
    assert not model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    torch.set_rng_state(state)
    check(model, IMAGES)  # drops, on a copy, and gives the dice back
    assert torch.equal(torch.get_rng_state(), state)


def test_each_of_several_examples_is_a_route() -> None:
    from bnfix.evidence import of_model

    evidence = of_model(small(), [IMAGES, IMAGES[:1]])
    assert isinstance(evidence, Evidence)
    assert evidence.facts is not None
    assert len(evidence.facts.routes) == 2
    assert evidence.facts_training is not None
    assert len(evidence.facts_training.routes) == 2
    assert gather(small(), [as_call(IMAGES)]).source == "exported"
