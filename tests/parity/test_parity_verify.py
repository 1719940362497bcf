"""verify: modules, exported programs, and files of every exporter. The dynamo exporter's files: test_parity_export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from parity_models import FrozenBatch, Named, folded, perturbed, small
from torch import nn

from bnfix.errors import LoadError, PassError
from bnfix.parity import verify
from bnfix.parity.modes import training_modules

pytest.importorskip("onnxruntime")


def images(*batches: int, size: int = 12) -> list[torch.Tensor]:
    return [torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(b)) for b in batches]


def legacy(model: nn.Module, args: tuple, path: Path, **options) -> Path:
    """A file of the exporter that torch had before dynamo: other names, unused inputs pruned, batch frozen."""
    torch.onnx.export(model, args, str(path), dynamo=False, **options)
    return path


# ------------------------------------------------------------------------------------- modules


def test_a_correct_fold_passes_and_reports_what_it_was_tried_on():
    model = small(16)
    fold = nn.Sequential(folded(model[0], model[1]), nn.Identity(), *model[2:]).eval()
    found = verify(model, fold, images(1, 2, 5))
    assert found.verdict == "passed"
    assert found.signatures == ("1x3x12x12", "2x3x12x12", "5x3x12x12")
    assert found.versions["torch"] == torch.__version__.split("+")[0] or found.versions["torch"] == torch.__version__
    assert found.outputs[0].noise_ratio < 4  # healthy folds were measured at up to 1.5


@pytest.mark.parametrize("factor", [1.05, 1.002])
def test_a_factor_in_one_channels_variance_is_found(factor):
    model = small(16)
    wrong = copy.deepcopy(model)
    wrong[4].running_var[3] *= factor
    found = verify(model, wrong, images(2, 5))
    assert found.verdict == "failed"
    assert found.outputs[0].noise_ratio > 100
    assert found.first_divergence == "4"


def test_eps_of_1e_3_for_1e_5_is_found_where_it_rises_above_the_noise():
    model = small(16)
    wrong = copy.deepcopy(model)
    wrong[4].eps = 1e-3
    assert verify(model, wrong, images(2)).verdict == "failed"
    hidden, other = copy.deepcopy(model), copy.deepcopy(wrong)
    for m in (hidden, other):  # variances of 1e6: an eps of 1e-3 is 5e-10 of the scale, below float32 itself
        m[4].running_var *= 1e6
    assert verify(hidden, other, images(2)).passed


def test_a_layer_that_passes_nothing_on_hides_its_error_and_is_not_blamed():
    model = small(16)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[8].weight[2] *= 1.01
    assert verify(model, wrong, images(3)).first_divergence == "8"


def test_the_models_are_left_as_they_were():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()
            self.last = None

        def forward(self, x):
            self.last = x
            return self.inner(x)

    one, two = Remembers().eval(), Remembers().eval()
    before = {k: v.clone() for k, v in one.state_dict().items()}
    verify(one, two, images(2))
    assert one.last is None
    assert two.last is None
    assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())


def test_a_model_in_training_mode_is_refused_with_the_next_step():
    model = small().train()
    before = model[1].running_mean.clone()
    with pytest.raises(PassError, match=r"1: BatchNorm2d in training mode[\s\S]*model\.eval\(\)"):
        verify(model, small(), images(2))
    with pytest.raises(PassError, match="the other model is in training mode"):
        verify(small(), model, images(2))
    assert torch.equal(model[1].running_mean, before)
    assert model.training


def test_what_training_mode_concerns():
    class Reads(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.1, self.training)

    model = nn.ModuleDict(
        {
            "harmless": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2), nn.Dropout(0.0)),
            "norm": nn.BatchNorm1d(2),
            "sync": nn.SyncBatchNorm(2),
            "drop": nn.Dropout2d(0.1),
            "reads": Reads(),
        }
    )
    assert [r.site for r in training_modules(model)] == ["norm", "sync", "drop", "reads"]
    assert training_modules(model.eval()) == ()


def test_wrong_use_is_a_type_error():
    model, (x,) = small(), images(1)
    with pytest.raises(TypeError, match=r"\[example\]"):
        verify(model, model, x)
    with pytest.raises(TypeError, match=r"\[example\]"):
        verify(model, model, (x,))
    with pytest.raises(ValueError, match="empty"):
        verify(model, model, [])
    with pytest.raises(TypeError, match="not int"):
        verify(model, 3, [x])


def test_forward_says_how_a_batch_is_fed(tmp_path):
    model = small()
    batches = [{"image": x, "label": torch.zeros(len(x))} for x in images(2, 2)]

    def feed(m, batch):
        return m(batch["image"]).softmax(-1)

    assert verify(model, copy.deepcopy(model), batches, forward=feed).passed
    file = legacy(model, (batches[0]["image"],), tmp_path / "m.onnx")
    assert verify(model, file, batches, forward=feed).passed
    with pytest.raises(PassError, match="never calls the model"):
        verify(model, file, batches, forward=lambda m, batch: batch["image"])


def test_an_exported_program_is_judged_on_the_inputs_that_it_takes():
    model = small()
    program = torch.export.export(model, tuple(images(4)), strict=False)
    found = verify(model, program, images(4, 2))
    assert found.passed
    assert found.signatures == ("4x3x12x12",)
    assert found.notes[0].startswith("1 of 2 inputs were not judged")
    with pytest.raises(PassError, match="no input fits"):
        verify(model, program, images(2))
    wrong = small()
    wrong[4].running_var[0] *= 1.05
    assert verify(wrong, program, images(4)).verdict == "failed"


# --------------------------------------------------------------------------------- legacy files


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "small.onnx"
    return legacy(small(16), tuple(images(2)), path, input_names=["x"], dynamic_axes={"x": {0: "n"}})


def test_a_legacy_file_passes_and_says_what_ran_it(small_file):
    found = verify(small(16), small_file, images(1, 2, 5))
    assert found.verdict == "passed"
    assert found.providers == ("CPUExecutionProvider",)
    assert set(found.versions) >= {"torch", "onnxruntime"}
    assert found.candidate == "small.onnx"


@pytest.mark.parametrize("relative", [2e-3, 2e-5])
def test_a_stale_file_is_found_whose_running_var_differs(small_file, relative):
    # torch.onnx.export(verify=True) passed 2.3e-3. Here 2e-3 is thousands of times the noise, 2e-5 still tens.
    fresh = small(16)
    for index in (1, 4):
        fresh[index].running_var *= 1 + relative
    found = verify(fresh, small_file, images(2, 5))
    assert found.verdict == "failed"
    assert found.outputs[0].noise_ratio > (100 if relative > 1e-3 else 8)


def test_a_difference_below_the_noise_is_not_found_and_cannot_be(small_file):
    fresh = small(16)
    fresh[1].running_var *= 1 + 1e-7
    assert verify(fresh, small_file, images(2)).passed


def test_a_frozen_batch_is_said_and_only_what_fits_is_judged(tmp_path):
    model = small()
    file = legacy(model, tuple(images(4)), tmp_path / "frozen.onnx")
    found = verify(model, file, images(4, 2, 1))
    assert found.passed
    assert found.signatures == ("4x3x12x12",)
    assert found.notes == ("the file's batch is frozen to 4: 2 of 3 inputs were not judged",)
    with pytest.raises(PassError, match=r"batch is frozen to 4[\s\S]*inputs of 4x3x12x12"):
        verify(model, file, images(2))


def test_pruned_inputs_renamed_ones_and_flattened_dicts_of_the_legacy_exporter(tmp_path):
    model = Named()
    x, unused, mask = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randn(4, 8)
    file = legacy(model, (x, unused, mask), tmp_path / "named.onnx", input_names=["image", "spare", "weights"])
    found = verify(model, file, [(x, unused, mask), {"x": x, "mask": mask}])
    assert found.passed
    assert [o.name for o in found.outputs] == ["out['logits']", "out['feat'][0]", "out['top']"]
    with pytest.raises(PassError, match=r"takes weights: 4x8 float32; the example gives x: 4x3x8x8"):
        verify(model, file, [(x, unused)])


def test_outputs_are_matched_and_a_missing_one_fails(tmp_path):
    class One(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)["logits"]

    model, x = Named(), torch.randn(4, 3, 8, 8)
    file = legacy(One(model).eval(), (x,), tmp_path / "one.onnx", output_names=["other"])
    found = verify(model, file, [x])
    assert found.verdict == "failed"
    assert {o.name: o.reason for o in found.outputs}["out['logits']"] == "it is missing"


def test_integer_inputs_are_cast_only_where_nothing_is_lost(tmp_path):
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(300, 16)

        def forward(self, ids):
            return self.table(ids % 300).mean(1)

    model = Embeds().eval()
    file = legacy(model, (torch.zeros(2, 3, dtype=torch.int32),), tmp_path / "ids.onnx")
    assert verify(model, file, [torch.tensor([[1, 299, 3], [4, 5, 6]])]).passed
    with pytest.raises(PassError, match="int32, which can't hold"):
        verify(model, file, [torch.tensor([[1, 2**40, 3], [4, 5, 6]])])


def test_a_half_precision_file_says_that_inputs_are_rounded(tmp_path):
    model = nn.Linear(8, 8).eval()
    x = torch.randn(4, 8)
    file = legacy(copy.deepcopy(model).half(), (x.half(),), tmp_path / "half.onnx")
    found = verify(model, file, [x])
    assert any("float16" in n and "rounded" in n for n in found.notes)
    assert found.verdict == "failed"  # it computes in float16, a thousand times the float32 model's noise
    assert verify(copy.deepcopy(model).half(), file, [x.half()]).passed


def test_files_that_cannot_be_opened_are_one_clear_line(tmp_path):
    (tmp_path / "text.onnx").write_text("<html>not found</html>")
    for name in ("text.onnx", "absent.onnx"):
        with pytest.raises(LoadError) as caught:
            verify(small(), tmp_path / name, images(1))
        assert len(str(caught.value).splitlines()) == 1
        assert "ONNXRuntimeError" not in str(caught.value)


def test_a_file_that_fails_while_it_runs_is_one_clear_line(tmp_path):
    class Any(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], -1) * 1.5

    x = torch.randn(4, 3, 3, 3)
    file = legacy(FrozenBatch(), (x,), tmp_path / "m.onnx", input_names=["x"], dynamic_axes={"x": {0: "n"}})
    with pytest.raises(PassError, match=r"ONNX Runtime failed on m\.onnx") as caught:
        verify(Any().eval(), file, [x[:3]])  # 81 numbers: no four rows
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_provider_is_a_value_error(small_file):
    with pytest.raises(ValueError, match="NoSuchProvider"):
        verify(small(16), small_file, images(1), providers=["NoSuchProvider"])


def test_a_reference_in_train_mode_is_refused_before_the_file_is_opened(tmp_path):
    with pytest.raises(PassError, match="training mode"):
        verify(small().train(), tmp_path / "absent.onnx", images(1))


def test_a_wrapper_in_train_mode_around_an_eval_model_is_fine():
    model = nn.Sequential(perturbed(small()))
    assert model.training
    assert verify(model, nn.Sequential(small()), images(2)).passed
