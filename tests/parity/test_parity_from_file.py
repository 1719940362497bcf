"""An input from an ONNX file's own inputs, and what is said of inputs that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity_models import Named, small
from torch import nn

from bnfix.errors import LoadError, PassError
from bnfix.parity import file_call, verify

pytest.importorskip("onnxruntime")


def written(model: nn.Module, args: tuple, path: Path, names: list[str], free: dict[str, dict[int, str]]) -> Path:
    torch.onnx.export(model, args, str(path), dynamo=False, input_names=names, dynamic_axes=free)
    return path


def test_sizes_types_and_names_come_from_the_file(tmp_path):
    model = Named()
    args = (torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randn(4, 8))
    file = written(model, args, tmp_path / "m.onnx", ["x", "unused", "mask"], {"x": {0: "n"}, "mask": {0: "n"}})
    call = file_call(model, file, batch=3)
    assert call is not None
    assert call.signature == "(3x3x8x8, mask=3x8)"  # the unused input was pruned by the exporter
    assert verify(model, file, [call]).passed
    again, other = file_call(model, file, batch=3), file_call(model, file, batch=3, seed=1)
    assert again is not None
    assert other is not None
    assert torch.equal(call.args[0], again.args[0])
    assert not torch.equal(call.args[0], other.args[0])


def test_a_fixed_batch_stays_and_foreign_names_go_by_position(tmp_path):
    file = written(small(), (torch.randn(4, 3, 12, 12),), tmp_path / "m.onnx", ["image"], {})
    call = file_call(small(), file, batch=2)
    assert call is not None
    assert call.signature == "4x3x12x12"


def test_open_sizes_are_some_that_the_model_accepts(tmp_path):
    model = nn.Sequential(small()[:6], nn.MaxPool2d(100)).eval()  # 64 is too small for it, 224 is not
    free = {"x": {0: "n", 2: "h", 3: "w"}}
    file = written(model, (torch.randn(1, 3, 224, 224),), tmp_path / "m.onnx", ["x"], free)
    call = file_call(model, file)
    assert call is not None
    assert call.signature == "2x3x224x224"


def test_integers_are_valid_indices_and_masks_are_ones(tmp_path):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(2, 8)

        def forward(self, ids, attention_mask):
            return (self.table(ids) * attention_mask[..., None]).sum(1)

    model = Tokens().eval()
    args = (torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
    names = ["ids", "attention_mask"]
    file = written(model, args, tmp_path / "m.onnx", names, {n: {0: "n"} for n in names})
    call = file_call(model, file)
    assert call is not None
    ids, mask = call.args
    assert set(ids.unique().tolist()) == {0, 1}
    assert bool((mask == 1).all())
    assert verify(model, file, [call]).passed


def test_a_float64_model_gets_numbers_that_the_file_holds_exactly(tmp_path):
    file = written(small(), (torch.randn(2, 3, 12, 12),), tmp_path / "m.onnx", ["x"], {})
    call = file_call(small().double(), file)
    assert call is not None
    assert call.args[0].dtype == torch.float64
    assert torch.equal(call.args[0], call.args[0].float().double())


def test_no_call_where_the_model_takes_nothing_like_it(tmp_path):
    file = written(nn.Linear(7, 2).eval(), (torch.randn(2, 7),), tmp_path / "m.onnx", ["x"], {"x": {0: "n"}})
    assert file_call(small(), file) is None
    with pytest.raises(LoadError):
        file_call(small(), tmp_path / "absent.onnx")


def test_what_does_not_fit_is_said_by_its_axis_with_the_sizes_to_give(tmp_path):
    file = written(small(), (torch.randn(2, 3, 12, 12),), tmp_path / "m.onnx", ["x"], {"x": {0: "n"}})
    with pytest.raises(PassError) as caught:
        verify(small(), file, [torch.randn(2, 3, 16, 12)])
    assert caught.value.message == "no input fits m.onnx: the file takes x as Nx3x12x12, not 2x3x16x12 (axis 2)"
    assert caught.value.hint == "give inputs of 3x12x12, any batch"
    found = verify(small(), file, [torch.randn(2, 3, 12, 12), torch.randn(1, 3, 16, 16)])
    assert found.notes == (
        "the file takes x as Nx3x12x12, not 1x3x16x16 (axes 2 and 3): 1 of 2 inputs were not judged",
    )
