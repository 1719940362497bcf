"""The verbs themselves: what they accept, what they say, what they leave alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import nets
import onnx
import pytest
import torch
from nets import bits, lived_in, norms_left, relative_error, same_bits
from torch import Tensor, nn

import bnfix
from bnfix import api
from bnfix.errors import ExportError, PassError

IMAGE = (2, 3, 8, 8)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.bn(self.conv(x)) * scale + shift


@pytest.mark.parametrize(
    "example",
    [
        (torch.ones(IMAGE), torch.ones(1)),
        {"x": torch.ones(IMAGE), "scale": torch.ones(1), "shift": 2.0},
        bnfix.Call((torch.ones(IMAGE),), {"scale": torch.ones(1)}),
    ],
    ids=["tuple", "dict", "Call"],
)
def test_every_form_of_an_example(example: object) -> None:
    result = bnfix.fold(lived_in(TwoInputs()), example)
    assert len(result.edits) == 1
    assert result.parity is not None
    assert result.parity.passed


def test_data_is_bound_to_the_signature_and_its_first_batch_is_the_example() -> None:
    loader = [(torch.randn(IMAGE), torch.tensor([0, 1]))] * 3
    result = bnfix.fold(lived_in(nets.conv_bn()), data=loader)
    assert result.signatures == ("2x3x8x8",)


def test_ambiguous_batch_is_refused_with_the_lines_that_resolve_it() -> None:
    with pytest.raises(PassError, match="forward=lambda m, b"):
        bnfix.fold(lived_in(nets.conv_bn()), data=[(torch.randn(IMAGE), torch.randn(IMAGE), torch.randn(IMAGE))])


def test_forward_says_how_a_batch_is_fed() -> None:
    batch = {"img": torch.randn(IMAGE), "id": torch.tensor([1])}
    result = bnfix.fold(lived_in(nets.conv_bn()), batch, forward=lambda m, b: m(b["img"]))
    assert len(result.edits) == 1


def test_without_an_example_one_is_deduced_and_said() -> None:
    result = bnfix.fold(lived_in(nets.conv_bn()))
    assert "no example was given" in result.notes[0]
    assert result.signatures[0] == "1x3x224x224"
    assert len(result.edits) == 1


def test_without_an_example_that_can_be_deduced_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="--input x=1x8,scale=1x8"):
        bnfix.export(lived_in(TwoInputs()), tmp_path / "m.onnx")
    result = bnfix.fold(lived_in(TwoInputs()))  # the code alone is enough for what it shows
    assert (result.source, result.parity) == ("symbolic", None)
    assert any("outputs were not compared" in note for note in result.notes)


def test_wrong_example_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="an example is a tensor"):
        bnfix.fold(lived_in(nets.conv_bn()), "1x3x8x8")


def test_random_state_of_the_process_is_left_alone() -> None:
    model = lived_in(nn.Sequential(*nets.conv_bn(), nn.Dropout(0.5)))
    model[2].train()
    before = torch.get_rng_state()
    bnfix.fold(model, torch.ones(IMAGE))
    assert torch.equal(torch.get_rng_state(), before)


def test_grad_mode_and_gradients_are_left_alone() -> None:
    model = lived_in(nets.conv_bn())
    x = torch.randn(IMAGE, requires_grad=True)
    model(x).sum().backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    kept = gradient.clone()
    bnfix.fold(model, x)
    assert torch.is_grad_enabled()
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, kept)


def test_results_are_json_and_html() -> None:
    result = bnfix.fold(lived_in(nets.TwoConsumers()), torch.randn(IMAGE))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["schema_version"] == 1
    assert data["refusals"][0]["site"] == "bn"
    assert "<table" in result._repr_html_()
    assert result.parity is not None
    assert "<table" in result.parity._repr_html_()


def test_folded_model_saved_whole_needs_no_bnfix(tmp_path: Path) -> None:
    result = bnfix.fold(lived_in(nets.conv_bn()), torch.randn(IMAGE))
    assert b"bnfix" not in pickle.dumps(result.model)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_fold_save_load_gives_the_same_model(tmp_path: Path, suffix: str) -> None:
    model, x = lived_in(nets.RegisteredBackwards()), torch.randn(IMAGE)
    result = bnfix.fold(model, x)
    assert result.model is not None
    path = bnfix.save(result.model, tmp_path / f"folded{suffix}", recipe=result.recipe)
    loaded = bnfix.load(path, arch=nets.RegisteredBackwards)
    assert torch.equal(loaded(x), result.model(x))
    assert not bnfix.fold(loaded, x).edits


def test_fold_export_verify(tmp_path: Path) -> None:
    model, x = (
        lived_in(nn.Sequential(*nets.conv_bn(), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))),
        torch.randn(IMAGE),
    )
    before = bits(model)
    exported = bnfix.export(model, tmp_path / "m.onnx", x)
    assert exported.norms_left == ()
    assert exported.folded == 2
    assert exported.parity is not None
    assert exported.parity.passed
    assert not [n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "BatchNormalization"]
    assert bnfix.verify(model, tmp_path / "m.onnx", [x]).passed
    assert same_bits(model, before)


def test_verify_finds_a_stale_file(tmp_path: Path) -> None:
    model, x = lived_in(nets.conv_bn()), torch.randn(IMAGE)
    bnfix.export(model, tmp_path / "m.onnx", x)
    with torch.no_grad():
        model[1].running_var[2] *= 1.002
    parity = bnfix.verify(model, tmp_path / "m.onnx", x)
    assert not parity.passed
    assert parity.verdict == "failed"


def test_export_of_a_model_in_training_mode_is_refused_by_name(tmp_path: Path) -> None:
    model = lived_in(nets.conv_bn())
    model[1].train()
    before = bits(model)
    with pytest.raises(ExportError, match="1"):
        bnfix.export(model, tmp_path / "m.onnx", torch.randn(IMAGE))
    assert same_bits(model, before)
    assert list(tmp_path.iterdir()) == []


def test_verify_of_two_models() -> None:
    model, x = lived_in(nets.conv_bn()), torch.randn(IMAGE)
    folded = bnfix.fold(model, x).model
    assert bnfix.verify(model, folded, [x]).passed
    other = lived_in(nets.conv_bn(), seed=5)
    assert bnfix.verify(model, other, [x]).verdict == "failed"


def test_module_saved_in_training_mode_is_used_in_evaluation_mode(tmp_path: Path) -> None:
    torch.save(lived_in(nets.conv_bn()).train(), tmp_path / "m.pt")
    loaded = api.open_model(tmp_path / "m.pt", trust=True)
    assert not loaded.value.training  # type: ignore[union-attr]
    assert "saved in training mode" in loaded.notes[-1]


def test_inplace_changes_the_model_itself_only_after_the_proof() -> None:
    model, x = lived_in(nets.conv_bn()), torch.randn(IMAGE)
    expected = model(x)
    result = bnfix.fold(model, x, inplace=True)
    assert result.model is model
    assert norms_left(model) == 0
    assert relative_error(model(x), expected) < 1e-6
