"""export: what is refused before, checked after, and never left behind half done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from parity_models import FrozenBatch, Named, folded, perturbed, small
from torch import nn

from bnfix.errors import ExportError, MissingDependencyError, PassError
from bnfix.parity import accepted, check_export, check_verify, export_onnx, probe_calls, verify
from bnfix.parity import export as export_module
from bnfix.parity import needs as needs_module
from bnfix.parity.tracing import trace
from bnfix.running import Call
from bnfix.types import Export, Refusal

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

OLD = tuple(int(p) for p in torch.__version__.split(".")[:2]) < (2, 7)
needs_exporter = pytest.mark.skipif(OLD, reason="the dynamo exporter of torch 2.6 can't translate a batch norm")


def image(batch: int = 4, size: int = 12) -> Call:
    return Call((torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)),))


def folded_small() -> nn.Sequential:
    model = small()
    return nn.Sequential(
        folded(model[0], model[1]), nn.Identity(), model[2], folded_second(model), nn.Identity(), *model[5:]
    ).eval()


def folded_second(model: nn.Sequential) -> nn.Module:
    return folded(model[3], model[4])


def left(folder: Path) -> set[str]:
    return set(os.listdir(folder))


# ------------------------------------------------------------------------------- refused before


def test_a_norm_or_dropout_in_training_mode_is_refused_by_name_and_the_model_left_as_it_was(tmp_path):
    # torch.onnx.export(verify=True) changes running_mean here, from 0.70 to 0.56
    model = Named()
    model.bn.train()
    model.drop.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ExportError, match=r"bn: BatchNorm2d in training mode; drop: Dropout[\s\S]*model\.eval\(\)"):
        export_onnx(model, tmp_path / "m.onnx", image())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [model.bn.training, model.drop.training, model.conv.training] == [True, True, False]
    assert left(tmp_path) == set()


def test_dropout_that_is_always_active_is_refused(tmp_path):
    class Always(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5)

    with pytest.raises(ExportError, match="dropout is active"):
        export_onnx(nn.Sequential(Always()).eval(), tmp_path / "m.onnx", image())
    assert left(tmp_path) == set()


def test_a_functional_norm_that_trains_is_refused_by_its_module(tmp_path):
    class Batchwise(nn.Module):
        def forward(self, x):
            return nn.functional.batch_norm(x, None, None, training=True)

    with pytest.raises(ExportError, match="0: batch_norm uses the statistics of its batch"):
        export_onnx(nn.Sequential(Batchwise()).eval(), tmp_path / "m.onnx", image())


def test_a_norm_that_does_not_track_running_stats_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.raises(ExportError, match=r"1: BatchNorm2d without running statistics"):
        export_onnx(model, tmp_path / "m.onnx", image())


def test_an_example_that_does_not_fit_is_the_models_own_error(tmp_path):
    with pytest.raises(PassError, match="4x2x8x8"):
        export_onnx(small(), tmp_path / "m.onnx", Call((torch.randn(4, 2, 8, 8),)))


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    import importlib

    real = importlib.import_module

    def without(name, *args):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=r"bnfix\[onnx\]"):
        export_onnx(small(), tmp_path / "m.onnx", image())
    with pytest.raises(MissingDependencyError, match=r"bnfix\[onnx\]"):
        verify(small(), tmp_path / "m.onnx", [image()])


# -------------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Export, Path]:
    """Named, exported unfolded with a mask: one norm before its convolution, one behind it."""
    if OLD:
        pytest.skip("the dynamo exporter of torch 2.6 can't translate a batch norm")
    folder = tmp_path_factory.mktemp("named")
    call = Call((torch.randn(4, 3, 8, 8),), {"mask": torch.randn(4, 8)})
    reasons = (Refusal("first", "read by relu, not by a convolution"),)
    return export_onnx(Named(), folder / "named.onnx", call, refusals=reasons), folder


def test_the_file_is_checked_compared_and_moved_into_place(exported):
    found, folder = exported
    assert left(folder) == {"named.onnx"}
    assert found.files == (str(folder / "named.onnx"),)
    onnx.checker.check_model(found.path, full_check=True)
    assert found.parity is not None
    assert found.parity.verdict == "passed"
    assert found.parity.candidate == "named.onnx"
    batches = [s.removeprefix("(").split("x")[0] for s in found.parity.signatures]
    assert sorted(batches) == ["1", "2", "4", "5"]


def test_dict_outputs_keep_their_names(exported):
    found, _ = exported
    assert found.outputs == ("logits", "feat_0", "top")
    assert any("'feat': (tensor,)" in note for note in found.notes)
    assert found.inputs == ("x: Nx3x8x8 float32", "mask: Nx8 float32")


def test_every_norm_left_in_the_file_is_named_with_its_reason(exported):
    found, _ = exported
    assert found.norms_left == (Refusal("first", "read by relu, not by a convolution"),)


def test_the_opset_reported_is_that_of_the_file(exported):
    found, _ = exported
    opsets = {o.domain: o.version for o in onnx.load(found.path).opset_import}
    assert found.opset == opsets[""] >= 18


def test_the_written_file_is_verified_again_and_a_changed_model_is_not(exported):
    found, _ = exported
    x, mask = torch.randn(3, 3, 8, 8), torch.randn(3, 8)
    assert verify(Named(), found.path, [{"x": x, "mask": mask}]).passed
    changed = Named()
    changed.bn.running_var[3] *= 1.05
    assert verify(changed, found.path, [(x, None, mask)]).verdict == "failed"


def test_a_folded_model_is_compared_with_its_original_and_has_no_norms_left(tmp_path):
    found = export_onnx(folded_small(), tmp_path / "m.onnx", image(), reference=small(), folded=2)
    assert found.parity is not None
    assert found.parity.passed
    assert (found.norms_left, found.folded) == ((), 2)
    assert left(tmp_path) == {"m.onnx"}


def test_an_example_of_one_sample_of_zeros_is_enough(tmp_path):
    found = export_onnx(folded_small(), tmp_path / "m.onnx", Call((torch.zeros(1, 3, 12, 12),)))
    assert found.inputs == ("x: Nx3x12x12 float32",) or found.inputs[0].endswith(": Nx3x12x12 float32")
    assert found.parity is not None
    assert set(found.parity.signatures) == {"1x3x12x12", "2x3x12x12", "5x3x12x12"}


def test_a_static_batch_where_asked_for(tmp_path):
    found = export_onnx(folded_small(), tmp_path / "m.onnx", image(3), dynamic=False)
    assert found.inputs[0].endswith(": 3x3x12x12 float32")
    assert found.parity is not None
    assert found.parity.signatures == ("3x3x12x12",)


def test_a_frozen_batch_is_found_and_said(tmp_path):
    # Dim('b') with this reshape exports without a word elsewhere, and the file's batch is 4
    found = export_onnx(FrozenBatch().eval(), tmp_path / "m.onnx", image(4))
    assert found.inputs[0].endswith(": 4x3x12x12 float32")
    assert any(n.startswith("the batch is frozen to 4: ") and "constant (4)" in n for n in found.notes)
    assert found.parity is not None
    assert found.parity.passed


def test_a_model_that_takes_one_batch_only_is_said(tmp_path):
    class Only(nn.Module):
        def forward(self, x):
            return x + torch.ones(4, 1, 1, 1) * x.reshape(4, 3, 12, 12)

    found = export_onnx(Only().eval(), tmp_path / "m.onnx", image(4))
    assert found.notes == ("the model itself runs with a batch of 4 only: so does the file",)
    assert found.parity is not None
    assert found.parity.passed


def test_a_tensor_marked_by_a_failed_export_is_not_the_users(tmp_path):
    # torch.export leaves `_dynamo_dynamic_indices` on an input, and every later static export of it fails
    call = image(4)
    with pytest.raises(ExportError):
        trace(FrozenBatch().eval(), call, batch=4)
    assert not [k for k in vars(call.args[0]) if "dynamo" in k]
    trace(FrozenBatch().eval(), call, batch=None)


def test_an_opset_that_is_not_got_is_an_error_and_nothing_is_written(tmp_path):
    class Means(nn.Module):  # its ReduceMean is what the converter to old opsets stumbles over
        def forward(self, x):
            return x.mean((2, 3))

    # found before any work on torch 2.7, after the conversion on newer ones, which convert a lone convolution
    with pytest.raises(ExportError, match=r"opset 9 (was asked for, torch's exporter wrote opset 18|can't be written)"):
        export_onnx(Means().eval(), tmp_path / "m.onnx", image(), opset=9)
    assert left(tmp_path) == set()


@pytest.mark.parametrize("opset", [-1, 6, 99])
def test_an_opset_that_nothing_can_write_is_refused_before_the_model_runs(tmp_path, opset):
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("the model was run")

    with pytest.raises(ExportError, match=rf"opset {opset} can't be written[\s\S]*ask for opset 18"):
        check_export(opset)
    with pytest.raises(ExportError, match="can't be written"):
        export_onnx(Never().eval(), tmp_path / "m.onnx", image(), opset=opset)


def test_an_opset_that_onnx_runtime_cannot_open_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(needs_module, "opens", lambda model: model.opset_import[0].version < 23)
    check_export(22)
    with pytest.raises(ExportError, match="can't run a file of opset 23"):
        check_export(23)


def test_torchs_own_opset_and_none_can_be_exported():
    check_export()
    check_export(18)
    check_verify()


@pytest.mark.parametrize("name", ["x.pt2", "x", "x.onnx.pt"])
def test_a_path_with_another_suffix_is_a_value_error(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: an ONNX file ends in \.onnx"):
        export_onnx(small(), tmp_path / name, image())
    with pytest.raises(ValueError, match="ends in"):
        check_export(path=name)
    assert left(tmp_path) == set()


def test_a_variable_batch_is_called_batch_everywhere(tmp_path):
    class Two(nn.Module):
        def forward(self, x, y, z):
            return torch.cat([x, x]), x + y, z * 2

    call = Call(tuple(torch.randn(3, 4) for _ in range(3)))
    found = export_onnx(Two().eval(), tmp_path / "m.onnx", call)
    graph = onnx.load(found.path).graph
    ends = [*graph.input, *graph.output]
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in ends}
    # nothing in the model ties z to the others: its batch has a name of its own
    assert dims == {
        "x": ["batch", 4], "y": ["batch", 4], "z": ["batch_z", 4],
        "out_0": ["2*batch", 4], "out_1": ["batch", 4], "out_2": ["batch_z", 4],
    }  # fmt: skip
    assert found.inputs == ("x: Nx4 float32", "y: Nx4 float32", "z: Nx4 float32")
    assert found.parity is not None
    assert found.parity.passed


def test_an_in_place_activation_that_others_see_stays_in_place(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            z = y.flatten(1)
            nn.functional.relu_(z)  # a view: y changes too
            w = self.conv(x) + 1
            v = nn.functional.relu6(w, inplace=True)  # read once: the exporter is given relu6 with its own result
            u = self.conv(-x)
            nn.functional.relu_(u)
            return y, v, u

    model = Shared().eval()
    program = trace(model, image(4), batch=4)
    targets = [str(n.target) for n in program.graph.nodes if "relu" in str(n.target) or "hardtanh" in str(n.target)]
    assert targets[0] == "aten.relu_.default"
    assert targets[1] in ("aten.hardtanh.default", "aten.relu6.default")
    assert targets[2] == "aten.relu.default"
    found = export_onnx(model, tmp_path / "m.onnx", image())
    assert found.parity is not None
    assert [o.verdict for o in found.parity.outputs] == ["passed"] * 3


def test_a_fixed_image_size_is_said_where_the_inputs_have_several(tmp_path):
    said = "the image size is fixed at 12x12 in this file"
    found = export_onnx(folded_small(), tmp_path / "m.onnx", image(), inputs=[image(4, 16), image(4, 20)])
    assert found.notes.count(said) == 1
    assert said not in export_onnx(folded_small(), tmp_path / "m.onnx", image(), inputs=[image(7)]).notes


def test_a_forward_is_taken_off_and_said(tmp_path):
    call = Call(({"image": image().args[0]},), forward=lambda m, b: m(b["image"]).softmax(-1))
    found = export_onnx(folded_small(), tmp_path / "m.onnx", call)
    assert found.notes[0].startswith("the file holds the model itself")
    assert found.parity is not None
    assert found.parity.passed


def test_data_of_the_user_is_compared_too(tmp_path):
    found = export_onnx(folded_small(), tmp_path / "m.onnx", image(), inputs=[image(7)])
    assert found.parity is not None
    assert "7x3x12x12" in found.parity.signatures


def test_without_verify_there_is_no_parity(tmp_path):
    found = export_onnx(folded_small(), tmp_path / "m.onnx", image(), verify=False)
    assert found.parity is None
    assert left(tmp_path) == {"m.onnx"}


def test_the_exporter_prints_nothing(tmp_path, capfd):
    export_onnx(folded_small(), tmp_path / "m.onnx", image(), verify=False)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------ nothing half done


def test_a_file_that_fails_parity_is_not_written(tmp_path):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"the old one")
    other = small()
    other[4].running_var *= 1.05
    found = export_onnx(folded_small(), target, image(), reference=other)
    assert found.parity is not None
    assert found.parity.verdict == "failed"
    assert found.files == ()
    assert found.notes[-1] == "m.onnx was NOT written: it does not compute what the model does"
    assert left(tmp_path) == {"m.onnx"}
    assert target.read_bytes() == b"the old one"


@pytest.mark.parametrize("where", ["check_file", "verify_file", "_move"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ExportError("stop")])
def test_whatever_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, error):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"the old one")

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(export_module, where, fail)
    with pytest.raises((KeyboardInterrupt, ExportError)):
        export_onnx(folded_small(), target, image())
    assert left(tmp_path) == {"m.onnx"}
    assert target.read_bytes() == b"the old one"


def test_external_data_moves_together_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "EXTERNAL_FROM", 100)
    # onnxscript keeps small tensors in the model itself: one layer has to be large
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.Linear(64, 5)).eval()
    found = export_onnx(model, tmp_path / "m.onnx", image())
    assert left(tmp_path) == {"m.onnx", "m.onnx.data"}
    assert found.files == (str(tmp_path / "m.onnx"), str(tmp_path / "m.onnx.data"))
    assert (tmp_path / "m.onnx.data").stat().st_size >= 432 * 64 * 4
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in found.files:
        os.rename(file, moved / os.path.basename(file))
    assert verify(model, moved / "m.onnx", [image()]).passed


def test_both_files_are_restored_when_the_second_cannot_be_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "EXTERNAL_FROM", 100)
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text(f"old {name}")
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 64)).eval()
    real = os.replace

    def replace(source, target):
        if str(target).endswith("m.onnx") and "replaced" not in str(source):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, tmp_path / "m.onnx", image())
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {n: f"old {n}" for n in ("m.onnx", "m.onnx.data")}


@pytest.mark.skipif(not OLD, reason="newer ones can")
def test_an_old_exporter_that_cannot_translate_a_norm_is_one_clear_error(tmp_path):
    with pytest.raises(ExportError, match=r"can't translate the model to ONNX[\s\S]*pip install -U torch"):
        export_onnx(small(), tmp_path / "m.onnx", image())
    assert left(tmp_path) == set()


# ---------------------------------------------------------------------------------------- probes


def test_probes_are_like_the_example():
    x = torch.rand(4, 3, 6, 6) * 2 + 5
    ids, matrix, mask = torch.arange(4), torch.randn(7, 7), torch.tensor([1.0, 0.0, 1.0, 1.0])
    calls = probe_calls(Call((x, ids), {"matrix": matrix, "mask": mask}), batches=(1, 5), seeds=(0, 1))
    assert [c.args[0].shape[0] for c in calls] == [1, 5, 1, 5]
    assert all(c.kwargs["matrix"].shape == (7, 7) for c in calls)
    assert not torch.equal(calls[0].args[0], calls[2].args[0])
    assert float(calls[1].args[0].min()) >= 5
    assert float(calls[1].args[0].max()) <= 7
    assert float(calls[1].args[0].mean()) == pytest.approx(6, abs=0.2)  # 540 numbers of deviation 0.58: 8 sigma
    assert all(set(c.args[1].tolist()) <= {0, 1, 2, 3} for c in calls)
    assert all(set(c.kwargs["mask"].tolist()) <= {0.0, 1.0} for c in calls)
    again = probe_calls(Call((x, ids), {"matrix": matrix, "mask": mask}), batches=(1, 5), seeds=(0, 1))
    assert torch.equal(again[3].args[0], calls[3].args[0])


def test_an_example_of_zeros_is_replaced_by_numbers_that_can_show_an_error():
    (probe,) = probe_calls(Call((torch.zeros(1, 3, 16, 16),)), batches=(2,))
    assert float(probe.args[0].std()) == pytest.approx(1.0, abs=0.1)


def test_whole_numbers_stay_whole():
    (probe,) = probe_calls(Call((torch.randint(0, 256, (2, 3, 8, 8)).float(),)), batches=(3,))
    assert torch.equal(probe.args[0], probe.args[0].round())
    assert len(probe.args[0].unique()) > 50


def test_batch_sizes_that_the_model_does_not_take_are_told_apart():
    model = perturbed(nn.Sequential(FrozenBatch())).eval()
    good, bad = accepted(model, [Call((torch.randn(b, 1, 1, 3),)) for b in (1, 4, 5, 8)])
    assert [c.args[0].shape[0] for c in good] == [4, 8]
    assert [c.args[0].shape[0] for c in bad] == [1, 5]
