"""``bnfix check --fix``: what is applied, what is written, what is left; never over the input unasked."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_cli_check import ARCH, DATA, Output, here, report

import bnfix
from bnfix.cli import run

__all__ = ["here"]


@pytest.fixture
def ill(here: Path) -> Path:
    """As ``here``, with a pickled module ``ill.pt``: NaN in one norm, a momentum of .99 in another."""
    import a_net

    torch.manual_seed(0)
    model = a_net.Net()
    for _ in range(20):
        model(torch.randn(8, 3, 8, 8))
    model.head.momentum = 0.99
    model.bn.running_var[2] = float("nan")
    torch.save(model.eval(), "ill.pt")
    return here


def loaded(path: str) -> torch.nn.Module:
    model = bnfix.load(path, trust=True)
    assert isinstance(model, torch.nn.Module)
    return model


def test_exact_fixes_are_applied_and_the_rest_is_left(ill: Path, capsys: Output) -> None:
    before = Path("ill.pt").read_bytes()
    assert run(["check", "ill.pt", "--trust", "--fix", "-o", "f.pt"]) == 1
    out = report(capsys)
    assert "✓ set  head  momentum=0.99 → momentum=0.1" in out
    assert "✗ fixed 1 of 2 findings (1 norm changed) · left: 1 error" in out
    assert "healed: BN902 fake-momentum (head)" in out
    assert "note: BN901: not fixed: it needs data" in out
    assert re.search(r"^  wrote +f\.pt$", out, re.M)
    assert Path("ill.pt").read_bytes() == before
    new, old = loaded("f.pt"), loaded("ill.pt")
    assert new.head.momentum == 0.1
    assert old.head.momentum == 0.99
    same = {k: torch.equal(v, old.state_dict()[k]) or bool(v.isnan().any()) for k, v in new.state_dict().items()}
    assert all(same.values()), "an exact fix changes no number"


def test_with_data_those_that_need_data_too(ill: Path, capsys: Output) -> None:
    assert run(["check", "ill.pt", "--trust", *DATA, "--fix", "-o", "f.pt"]) == 0
    out = report(capsys)
    assert "✓ fixed 2 of 2 findings (2 norms changed) · left: no error, no warning" in out
    new = loaded("f.pt")
    import a_net

    truth = a_net.Net().eval()
    truth.load_state_dict(loaded("ill.pt").state_dict())
    bnfix.recalibrate(truth, a_net.loader())
    for name in ("bn", "head"):
        assert torch.equal(getattr(new, name).running_var, getattr(truth, name).running_var)
    assert run(["check", "f.pt", "--trust", *DATA, "--fail-on", "info"]) == 0


def test_a_dry_run_shows_the_difference_writes_nothing_and_exits_1(ill: Path, capsys: Output) -> None:
    files = {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()}
    assert run(["check", "ill.pt", "--trust", *DATA, "--dry-run"]) == 1
    out = report(capsys)
    assert "✓ set  head  momentum=0.99 → momentum=0.1" in out
    assert "✓ recalibrate  bn  mean moved by" in out
    assert "would fix 2 of 2 findings" in out
    assert "nothing was written, this is the plan" in out
    assert {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()} == files
    line = next(x for x in out.splitlines() if x.strip().startswith("next"))
    assert run(shlex.split(line[line.index("bnfix ") :])[1:]) == 0
    assert Path("ill-fixed.pt").exists()
    capsys.readouterr()
    assert run(["check", "ok.pt", *ARCH, "--dry-run"]) == 0, "there is nothing that it would change"


def test_a_checkpoint_keeps_all_but_the_statistics(here: Path, capsys: Output) -> None:
    state = torch.load("nan.pt", weights_only=True)
    optimizer = {"state": {0: {"exp_avg": torch.arange(3.0)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 7, "model": {f"module.{k}": v for k, v in state.items()}, "optimizer": optimizer}, "ck.pt")
    assert run(["check", "ck.pt", *ARCH, *DATA, "--fix", "-o", "f.pt"]) == 0
    new, old = (torch.load(name, weights_only=True) for name in ("f.pt", "ck.pt"))
    assert new["epoch"] == 7
    assert torch.equal(new["optimizer"]["state"][0]["exp_avg"], torch.arange(3.0))
    assert list(new["model"]) == list(old["model"])
    changed = [k for k, v in new["model"].items() if not torch.equal(v, old["model"][k])]
    assert changed
    assert all("running_" in k or "num_batches" in k for k in changed)
    assert "note: written into 'model': all else in the checkpoint is as it was" in report(capsys)


def test_a_file_of_weights_holds_no_settings(here: Path, capsys: Output) -> None:
    """Setting an attribute on a model whose file can't keep it would look like a repair and be none."""
    argv = ["check", "nan.pt", *ARCH, "--arch-kw", "momentum=0.99", "--fix", "-o", "f.pt"]
    assert run(argv) == 1
    out = report(capsys)
    assert "nothing was changed: f.pt was not written" in out
    assert "BN902: not fixed: the code that builds the model sets that, a file of weights does not" in out
    assert not Path("f.pt").exists()
    assert run([*argv, *DATA]) == 0
    assert "! fixed 1 of 2 findings" in report(capsys)


def test_never_over_the_input_without_in_place(ill: Path, capsys: Output) -> None:
    before = Path("ill.pt").read_bytes()
    assert run(["check", "ill.pt", "--trust", "--fix", "-o", "ill.pt"]) == 2
    assert Path("ill.pt").read_bytes() == before
    Path("link.pt").symlink_to("ill.pt")
    assert run(["check", "ill.pt", "--trust", "--fix", "-o", "link.pt"]) == 2
    assert Path("ill.pt").read_bytes() == before
    assert run(["check", "ill.pt", "--trust", *DATA, "--fix", "--in-place"]) == 0
    assert loaded("ill.pt").head.momentum == 0.1


def test_nothing_to_fix_writes_nothing(here: Path, capsys: Output) -> None:
    assert run(["check", "ok.pt", *ARCH, *DATA, "--fix", "-o", "f.pt"]) == 0
    out = report(capsys)
    assert "✓ nothing to fix: no finding" in out
    assert "note: nothing was changed: f.pt was not written" in out
    assert not Path("f.pt").exists()


def test_what_needs_training_is_never_applied(here: Path, capsys: Output) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.BatchNorm2d(1)), "narrow.pt")
    before = Path("narrow.pt").read_bytes()
    assert run(["check", "narrow.pt", "--trust", *DATA, "--fix", "-o", "f.pt"]) == 0
    out = report(capsys)
    assert "! nothing that bnfix can fix by itself in 1 finding · left: 1 warning" in out
    assert "note: BN904: not fixed: it takes training: swap it" in out
    assert not Path("f.pt").exists()
    assert Path("narrow.pt").read_bytes() == before


def test_several_go_into_a_folder(here: Path, capsys: Output) -> None:
    Path("b.pt").write_bytes(Path("nan.pt").read_bytes())
    argv = ["check", "nan.pt", "b.pt", "ok.pt", *ARCH, *DATA, "--fix", "-o", "out/"]
    assert run([*argv, "--output-format", "json"]) == 0
    document = json.loads(report(capsys))
    assert [len(v["edits"]) for v in document["values"]] == [2, 2, 0]
    assert [v["run"]["written"] for v in document["values"]] == [["out/nan.pt"], ["out/b.pt"], []]
    assert sorted(p.name for p in Path("out").iterdir()) == ["b.pt", "nan.pt"]
    assert run(["check", "out/nan.pt", "out/b.pt", *ARCH]) == 0


def test_what_is_ignored_is_not_fixed(ill: Path, capsys: Output) -> None:
    assert run(["check", "ill.pt", "--trust", *DATA, "--fix", "-o", "f.pt", "--ignore", "BN902"]) == 0
    assert loaded("f.pt").head.momentum == 0.99
    Path("pyproject.toml").write_text('[tool.bnfix.per-layer-ignores]\nhead = ["BN902"]\n')
    assert run(["check", "ill.pt", "--trust", *DATA, "--fix", "-o", "g.pt"]) == 0
    assert loaded("g.pt").head.momentum == 0.99


@pytest.mark.parametrize("target", ["-o f.pt", "-o f.onnx", "-o f.txt", "--in-place", "", "--dry-run"])
def test_an_onnx_file_is_not_mended(here: Path, capsys: Output, target: str) -> None:
    import a_net

    bnfix.export(a_net.Net().eval(), "m.onnx", torch.randn(2, 3, 8, 8), verify=False)
    capsys.readouterr()
    assert run(["check", "m.onnx", "--fix", *target.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: m.onnx is an ONNX file: what is wrong in it is mended in the model that it was ")
    assert "bnfix export" in err


SHARED = """
from torch import nn

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)
        self.left = self.right = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.left(self.a(x)) + self.right(self.b(x * 2 + 1))

def loader():
    import torch
    torch.manual_seed(0)
    return [torch.randn(16, 5) for _ in range(4)]
"""


@pytest.mark.parametrize("fed", [["--data", "shared_net.py:loader"], ["--input", "2x5"]])
def test_norms_taken_apart_can_be_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, fed: list[str]
) -> None:
    """With the real rules: the file has names that its architecture has not, and a recipe that explains them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("shared_net.py").write_text(SHARED)
    import shared_net

    torch.manual_seed(0)
    model = shared_net.Shared()
    for batch in shared_net.loader() * 20:
        model(batch)
    torch.save(model.eval().state_dict(), "s.pt")
    argv = ["--arch", "shared_net.py:Shared", *fed, "--select", "BN101"]
    assert run(["check", "s.pt", *argv, "--fix", "-o", "f.pt"]) == 0
    assert "fixed 1 of 1 finding" in report(capsys)
    new = bnfix.load("f.pt", arch="shared_net.py:Shared")
    assert new.left is not new.right
    with torch.no_grad():
        assert torch.equal(new(shared_net.loader()[0]), model(shared_net.loader()[0]))
    assert run(["check", "f.pt", *argv, "--fail-on", "info"]) == 0
