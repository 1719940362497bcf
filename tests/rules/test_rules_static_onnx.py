"""Rules over ONNX files, of both exporters of torch's and of every opset."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from nets import lived_in
from onnx import TensorProto, helper
from rules_nets import IMAGES, Conditional, check, only, small
from torch import Tensor, nn

from bnfix.errors import LoadError
from bnfix.evidence import of_onnx


class ByHand(nn.Module):
    """A batch norm in arithmetic, always with the statistics of the batch."""

    def __init__(self, one_pass: bool = False) -> None:
        super().__init__()
        self.scale, self.shift, self.one_pass = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3)), one_pass

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        var = (x * x).mean((0, 2, 3), keepdim=True) - mean * mean if self.one_pass else x.var((0, 2, 3), keepdim=True)
        return (x - mean) * torch.rsqrt(var + 1e-5) * self.scale[:, None, None] + self.shift[:, None, None]


class Cmvn(nn.Module):
    """What speech does to its features: no norm, no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear((x - x.mean(0, keepdim=True)) / (x.std(0, keepdim=True) + 1e-5))
        return out


def exported(model: nn.Module, args: tuple[Any, ...], path: Path, dynamo: bool, **options: Any) -> Path:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, str(path), dynamo=dynamo, **options)
    return path


both = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])


@both
@pytest.mark.parametrize(
    ("make", "args"),
    [
        (small, (IMAGES,)),
        (lambda: lived_in(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(432), nn.Linear(432, 2))), (IMAGES,)),
        (lambda: nn.Sequential(nn.LayerNorm(12), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)).eval(), (IMAGES,)),
        (lambda: Cmvn().eval(), (torch.randn(20, 5),)),
        (lambda: lived_in(Conditional()), (IMAGES, torch.tensor([0, 1, 2, 3]))),
    ],
    ids=["BatchNorm", "BatchNorm1d", "other norms", "CMVN", "conditional"],
)
def test_healthy_onnx_files_are_clean(
    dynamo: bool, make: Callable[[], nn.Module], args: tuple[Any, ...], tmp_path: Path
) -> None:
    said = check(exported(make(), args, tmp_path / "m.onnx", dynamo))
    assert said.findings == ()
    assert {"BN502", "BN503"} <= set(said.checked)
    assert "BN504" not in said.checked


@both
@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (4, 3)], ids=["2d", "1d"])
def test_no_running_statistics_become_batch_statistics(dynamo: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    cls = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    model = nn.Sequential(cls(3, track_running_stats=False), nn.ReLU()).eval()
    said = check(exported(model, (torch.randn(shape),), tmp_path / "m.onnx", dynamo))
    assert only(said, "BN503").severity == "error"
    assert only(said, "BN503").sites == ("0",)


@both
@pytest.mark.parametrize("one_pass", [True, False])
def test_a_norm_taken_apart(dynamo: bool, one_pass: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), ByHand(one_pass)).eval()
    assert len(only(check(exported(model, (IMAGES,), tmp_path / "m.onnx", dynamo)), "BN503").sites) == 1


def test_training_mode_of_the_legacy_exporter(tmp_path: Path) -> None:
    mode = torch.onnx.TrainingMode.TRAINING
    model = nn.ModuleDict({"stem": small().train()})["stem"]
    path = exported(
        nn.Sequential(model), (IMAGES,), tmp_path / "m.onnx", False, training=mode, do_constant_folding=False
    )
    finding = only(check(path), "BN502")
    assert (finding.severity, finding.sites) == ("error", ("0.1", "0.4"))


def node_file(path: Path, opset: int, outputs: int, *, inside: bool = False, **attributes: int) -> Path:
    """One BatchNormalization of an old or new opset; ``inside`` a branch of an If, with its mean computed there."""
    names = ["scale", "shift", "mean", "var"]
    constants = [helper.make_tensor(n, TensorProto.FLOAT, [3], [0.5, 1.0, 2.0]) for n in names]
    norm = helper.make_node("BatchNormalization", ["x", *names], ["y", "m", "v", "sm", "sv"][:outputs], name="bn",
                            **attributes)  # type: ignore[arg-type]  # fmt: skip
    info = lambda n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3])  # noqa: E731
    nodes = [norm]
    if inside:
        mean = helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=0)
        then = helper.make_graph([mean, norm], "then", [], [info("y")])
        other = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "else", [], [info("z")])
        nodes = [helper.make_node("If", ["flag"], ["out"], then_branch=then, else_branch=other)]
        constants = [c for c in constants if c.name != "mean"]
        constants.append(helper.make_tensor("flag", TensorProto.BOOL, [], [True]))
    graph = helper.make_graph(nodes, "g", [info("x")], [info("out" if inside else "y")], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), str(path))
    return path


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes", "training"),
    [(15, 1, {}, False), (15, 3, {"training_mode": 1}, True), (15, 1, {"training_mode": 0}, False), (9, 1, {}, False),
     (9, 5, {}, True), (6, 1, {"is_test": 1}, False), (6, 1, {}, True)],
)  # fmt: skip
def test_training_mode_in_every_opset(
    opset: int, outputs: int, attributes: dict[str, int], training: bool, tmp_path: Path
) -> None:
    said = check(node_file(tmp_path / "m.onnx", opset, outputs, **attributes))
    assert bool(said.by_code("BN502")) is training
    assert said.by_code("BN503") == ()


def test_branches_are_walked_and_constants_from_outside_count(tmp_path: Path) -> None:
    facts = of_onnx(node_file(tmp_path / "m.onnx", 15, 1, inside=True)).onnx
    assert facts is not None
    assert [(n.name, n.computed) for n in facts.norms] == [("bn", ("mean",))]


def test_functions_are_looked_into(tmp_path: Path) -> None:
    names = ["scale", "shift", "mean", "var"]
    norm = helper.make_node("BatchNormalization", ["x", *names], ["y"], name="bn")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Norm", ["x", *names], ["y"], [norm], opsets[:1])
    constants = [helper.make_tensor(n, TensorProto.FLOAT, [3], [0.5, 1.0, 2.0]) for n in names]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in ("x", "y")]
    call = helper.make_node("Norm", ["x", *names], ["y"], domain="local")
    graph = helper.make_graph([call], "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function]), str(tmp_path / "m.onnx"))
    facts = of_onnx(tmp_path / "m.onnx").onnx
    assert facts is not None
    assert [n.computed for n in facts.norms] == [()]


def test_a_damaged_onnx_file_is_a_load_error(tmp_path: Path) -> None:
    path = exported(small(), (IMAGES,), tmp_path / "m.onnx", False)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LoadError):
        check(path)
    with pytest.raises(LoadError):
        of_onnx(path)


def test_an_onnx_file_beside_its_model(tmp_path: Path) -> None:
    model = small()
    path = exported(model, (IMAGES,), tmp_path / "m.onnx", True)
    said = check(path, IMAGES, against=model)
    assert said.findings == ()
    assert "BN504" in said.checked
    model[1].running_mean += 0.1  # type: ignore[operator]
    finding = only(check(path, IMAGES, against=model), "BN504")
    assert finding.severity == "error"
    assert finding.measured["noise_ratio"] > finding.measured["limit"]
