"""Rules over files: weights without a model, pairs of checkpoints, exported programs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import lived_in
from rules_nets import IMAGES, check, codes, only, small
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bnfix
from bnfix.errors import LoadError, UntrustedModelError
from bnfix.evidence import of_file, of_weights
from bnfix.rules import all_rules

VALUES = {"BN201", "BN202", "BN203", "BN206"}
MODULE = {"BN104", "BN105", "BN106"}


def bn(model: nn.Module, index: int = 1) -> nn.BatchNorm2d:
    norm = model[index]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def write(model: nn.Module, path: Path, kind: str) -> Path:
    """The weights of ``model`` in a file of this kind."""
    state = model.state_dict()
    if kind == "safetensors":
        save_file({k: v.clone() for k, v in state.items()}, str(path))
    elif kind == "lightning":
        torch.save(
            {"state_dict": {f"model.{k}": v for k, v in state.items()}, "pytorch-lightning_version": "2.2"}, path
        )
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "wrapped":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path)
    return path


# ------------------------------------------------------------------------------- weights alone


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "lightning", "wrapped"])
def test_value_rules_run_on_weights_alone(kind: str, tmp_path: Path) -> None:
    model = small()
    said = check(write(model, tmp_path / "good.pt", kind))
    assert (said.findings, said.norms) == ((), 2)
    assert set(said.checked) >= VALUES | {"BN101", "BN107"}
    bn(model).running_mean[1] = float("nan")  # type: ignore[index]
    bn(model, 4).reset_running_stats()
    said = check(write(model, tmp_path / "bad.pt", kind))
    prefix = "model." if kind == "lightning" else ""
    assert only(said, "BN201").sites == (f"{prefix}1",)
    assert only(said, "BN202").sites == (f"{prefix}4",)
    assert only(said, "BN202").severity == "error"


def test_what_a_state_dict_can_not_tell_is_not_called_checked() -> None:
    said = check(small().state_dict())
    assert not MODULE & set(said.checked)
    reasons = {s.code: s for s in said.skipped}
    assert "momentum" in reasons["BN106"].reason
    assert "--arch" in reasons["BN106"].needs
    assert {r.code for r in all_rules() if not r.optional} == set(said.checked) | set(reasons)


def test_the_momentum_is_taken_for_torchs_and_that_is_said() -> None:
    state = small().state_dict()
    for key in ("1.num_batches_tracked", "4.num_batches_tracked"):
        state[key] = torch.tensor(5)
    state["1.running_var"].clamp_(min=0.7)
    state["4.running_var"].clamp_(min=0.7)
    assert "torch's default; the file does not say" in only(check(state), "BN203").message


def test_two_names_for_the_same_memory_are_one_norm(tmp_path: Path) -> None:
    shared = small()
    torch.save(nn.ModuleDict({"a": shared, "b": shared}).state_dict(), tmp_path / "shared.pt")
    finding = only(check(tmp_path / "shared.pt"), "BN101")
    assert set(finding.sites) == {"a.1", "b.1", "a.4", "b.4"}


def test_half_precision_and_norms_at_the_root() -> None:
    norm = lived_in(nn.BatchNorm1d(3)).half()
    finding = only(check(norm.state_dict()), "BN107")
    assert finding.sites == ("(root)",)


def test_odd_tensors_in_a_state_dict_do_no_harm() -> None:
    state: dict[Any, Any] = dict(small().state_dict())
    state |= {"x.running_var": torch.ones(3), "y.running_mean": torch.ones(2), "scale": 3, 7: torch.ones(1)}
    state |= {f"q.running_{s}": torch.ones(2, device="meta") for s in ("mean", "var")}
    said = check(state)
    assert (said.findings, said.norms) == ((), 3)
    assert [s.sites for s in said.skipped if s.code == "BN201"] == [("q",)]


def test_fold_range_reads_the_weights_in_front() -> None:
    state = small().state_dict()
    assert check(state, select=("BN209",)).findings == ()
    state["1.running_var"][2] = 1e-13
    finding = only(check(state, select=("BN209",)), "BN209")
    assert finding.sites == ("1",)
    weight = state["0.weight"].double().flatten(1).norm(dim=1)
    size = weight * state["1.weight"].double().abs() / (state["1.running_var"].double() + 1e-5).sqrt()
    expected = size.max() / size.sort().values[1:3].mean()
    assert finding.measured["ratio"] == pytest.approx(expected.item())


def test_nothing_is_unpickled_without_trust(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "whole.pt")
    with pytest.raises(UntrustedModelError):
        check(tmp_path / "whole.pt")
    said = check(tmp_path / "whole.pt", IMAGES, trust=True)
    assert said.findings == ()
    assert set(said.checked) >= {"BN102", "BN104"}


def test_files_that_hold_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(LoadError):
        check(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(LoadError):
        check(tmp_path / "list.pt")
    with pytest.raises(TypeError, match="not int"):
        check(3)
    assert of_weights({}).norms == ()


# --------------------------------------------------------------------------------------- pairs


def trained(steps: int = 60, momentum: float = 0.1) -> tuple[nn.Module, AveragedModel, AveragedModel]:
    """A trained model, its average with buffers and one without."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with_buffers = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    without = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 3, 6, 6) + 1
        (model(x).mean((2, 3)) - x.mean((1, 2, 3))[:, None]).square().mean().backward()
        optimizer.step()
        with_buffers.update_parameters(model)
        with torch.no_grad():
            for mine, other in zip(without.parameters(), model.parameters(), strict=True):
                mine.lerp_(other, 0.1)
    return model, with_buffers, AveragedModel(without)


def test_an_average_of_the_parameters_alone_is_found_from_either_side(tmp_path: Path) -> None:
    model, good, bad = trained()
    said = check(bad, against=model)
    finding = only(said, "BN207")
    assert (finding.severity, finding.sites) == ("warning", ("module.1",))
    assert finding.message.startswith("module.1: this model has initial statistics")
    assert only(said, "BN202").severity == "error"
    said = check(model, against=bad)
    assert only(said, "BN207").sites == ("1",)
    assert "the reference has initial statistics" in only(said, "BN207").message
    assert check(good, against=model).by_code("BN207") == ()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(bad.state_dict(), tmp_path / "ema.pt")
    assert only(check(tmp_path / "model.pt", against=tmp_path / "ema.pt"), "BN207").sites == ("1",)
    assert only(check(tmp_path / "ema.pt", against=str(tmp_path / "model.pt")), "BN207").sites == ("1",)


def test_a_fresh_model_beside_a_trained_one_is_no_average() -> None:
    model, _, _ = trained()
    fresh = copy.deepcopy(model)
    for layer in fresh:  # type: ignore[attr-defined]
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    assert check(fresh, against=model).by_code("BN207") == ()
    assert check(model, against=fresh).by_code("BN207") == ()


@pytest.mark.parametrize(("mine", "theirs", "var", "found"), [
    (1e-5, 1e-3, 1e-3, True), (1e-3, 1e-5, 1e-3, True), (1e-5, 1e-3, 1.0, False), (1e-3, 1e-3, 0.0, False),
    (1e-5, 1e-3, 9e-3, True), (1e-5, 1e-3, 1.1e-2, False),
])  # fmt: skip
def test_eps_counts_where_it_scales_a_channel(mine: float, theirs: float, var: float, found: bool) -> None:
    model, reference = small(eps=mine), small(eps=theirs)
    for m in (model, reference):
        bn(m).running_var[0] = var  # type: ignore[index]
        bn(m, 4).running_var.fill_(2.0)  # type: ignore[union-attr]
        bn(m).running_var[1:] = 2.0  # type: ignore[index]
    said = check(model, against=reference)
    assert [f.sites for f in said.by_code("BN208")] == ([("1",)] if found else [])
    with torch.no_grad():
        bn(model).weight[0], bn(model).bias[0] = 1.0, 0.0
        x = torch.full((1, 4, 1, 1), bn(model).running_mean[0].item() + 1.0)  # type: ignore[index]
        y = bn(model)(x)[0, 0, 0, 0]
        bn(model).eps = theirs
        off = (y / bn(model)(x)[0, 0, 0, 0]).item()  # the outputs themselves
    assert (min(off, 1 / off) < 0.95) is found
    if found:
        assert said.by_code("BN208")[0].measured["ratio"] == pytest.approx(min(off, 1 / off), rel=1e-5)


def test_eps_is_not_in_a_file_and_that_is_said(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "reference.pt")
    for subject in (small(), tmp_path / "reference.pt"):
        said = check(subject, against=tmp_path / "reference.pt")
        assert "BN208" not in said.checked
        assert "eps" in next(s for s in said.skipped if s.code == "BN208").reason


def test_a_reference_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no norm of the same name"):
        check(small(), against=nn.ModuleDict({"other": nn.BatchNorm2d(3)}))
    assert "BN207" not in check(small()).checked


# ------------------------------------------------------------------------------------ programs


def test_a_program_in_a_file(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(small().train(), (IMAGES,)), tmp_path / "m.pt2")
    said = check(tmp_path / "m.pt2")
    assert only(said, "BN501").sites == ("1", "4")
    assert of_file(tmp_path / "m.pt2").program
    assert codes(check(torch.export.export(small(), (IMAGES,)))) == set()
    assert bnfix.check is not None
