"""``bnfix swap`` with the real verb: a file goes in, one that loads again comes out, or nothing does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import relative_error
from torch import nn

import bnfix
from bnfix.cli import run
from bnfix.types import Diagnosis, Finding, Fix

Output = pytest.CaptureFixture[str]
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, features=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)
        self.fc, self.top = nn.Linear(32, features), nn.BatchNorm1d(features)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.top(self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3))))

def images():
    return torch.randn(70, 3, 9, 9, generator=torch.Generator().manual_seed(1)) * 2 + 1

def make():
    for batch in images().split(16):
        yield batch, torch.zeros(len(batch))

def leaves():
    yield images()[:4]
    raise SystemExit(3)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the architecture, trained weights, and images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("net.py").write_text(NET)
    space: dict[str, Any] = {}
    exec(compile(NET, "net.py", "exec"), space)
    torch.manual_seed(0)
    model, images = space["Net"]().train(), space["images"]()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.top):
            norm.momentum = None
            norm.weight.copy_(1 + 0.4 * torch.randn(norm.num_features))
            norm.bias.copy_(0.4 * torch.randn(norm.num_features))
        for batch in images.split(16):
            model(batch)
    torch.save(model.eval().state_dict(), "w.pt")
    np.save("x.npy", images.numpy())
    return tmp_path


ARGS = ["swap", "w.pt", "--arch", "net.py:Net"]


@pytest.mark.parametrize("data", ["x.npy", "net.py:make"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_goes_in_and_one_that_loads_comes_out(folder: Path, capsys: Output, data: str, suffix: str) -> None:
    before = Path("w.pt").read_bytes()
    assert run([*ARGS, "--data", data, "-o", f"out{suffix}"]) == 0
    out, err = capsys.readouterr()
    assert "swapped 2 of 3 norms for GroupNorm, kept 1" in out
    assert "kept: 8 channels with 1 position each" in out
    assert "R²" in out
    assert "calibrated on 70 samples" in out
    assert "samples don't depend on one another" in out
    assert "norm 1 of 2: bn1" in err
    assert Path("w.pt").read_bytes() == before
    old, new = bnfix.load("w.pt", arch="net.py:Net"), bnfix.load(f"out{suffix}", arch="net.py:Net")
    assert isinstance(new.bn1, nn.GroupNorm)
    assert isinstance(new.top, nn.BatchNorm1d)
    x = torch.from_numpy(np.load("x.npy"))
    with torch.no_grad():
        assert relative_error(new(x), old(x)) < 0.5
    line = next(line for line in out.splitlines() if "load it" in line).partition("load it")[2].strip()
    code = f"{line}; print(type(model.bn1).__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "GroupNorm", found.stderr


def test_a_dry_run_exits_1_and_says_what_to_type(folder: Path, capsys: Output) -> None:
    assert run([*ARGS, "--data", "x.npy", "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "would swap 2 of 3 norms" in out
    assert "nothing changed, this is the plan" in out
    assert "bnfix swap w.pt --arch net.py:Net --data x.npy -o w-swapped.pt" in out
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".pt") == ["w.pt"]


def test_json_has_the_edits_with_r2(folder: Path, capsys: Output) -> None:
    assert run([*ARGS, "--data", "x.npy", "--to", "layer", "-o", "o.pt", "--output-format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verb"] == "swap"
    assert [e["site"] for e in found["edits"]] == ["bn1", "bn2"]
    assert all(0 < e["r2"] <= 1 for e in found["edits"])
    assert found["refusals"][0]["site"] == "top"


@pytest.mark.parametrize("form", ["concise", "github", "markdown", "html"])
def test_every_format_can_show_it(folder: Path, capsys: Output, form: str) -> None:
    assert run([*ARGS, "--data", "x.npy", "-o", "o.pt", "--output-format", form]) == 0
    out = capsys.readouterr().out
    assert "GroupNorm" in out
    assert "top" in out


def test_options_reach_the_verb(folder: Path, capsys: Output) -> None:
    options = ["--only", "bn2", "--groups", "4", "--init", "ls", "--max-samples", "32"]
    assert run([*ARGS, "--data", "x.npy", *options, "-o", "o.pt"]) == 0
    out = capsys.readouterr().out
    assert "now GroupNorm(4, 32)" in out
    assert "calibrated on 32 samples" in out
    assert "2 norms were not asked for (only=)" in out
    assert isinstance(bnfix.load("o.pt", arch="net.py:Net").bn1, nn.BatchNorm2d)


def test_exact_targets_need_no_data(folder: Path, capsys: Output) -> None:
    assert run([*ARGS, "--to", "frozen", "--input", "2x3x9x9", "-o", "f.pt"]) == 0
    assert "the outputs are the same to the bit" in capsys.readouterr().out
    x = torch.from_numpy(np.load("x.npy"))
    old, new = bnfix.load("w.pt", arch="net.py:Net"), bnfix.load("f.pt", arch="net.py:Net")
    assert torch.equal(old(x), new.train()(x))


def test_swapped_then_folded(folder: Path, capsys: Output) -> None:
    assert run([*ARGS, "--to", "group", "--only", "bn1", "--data", "x.npy", "-o", "s.pt"]) == 0
    assert run(["fold", "s.pt", "--arch", "net.py:Net", "--input", "2x3x9x9", "-o", "sf.pt"]) == 0
    out = capsys.readouterr().out
    assert "swapped by bnfix: 1 norm is GroupNorm, as its recipe says" in out
    model = bnfix.load("sf.pt", arch="net.py:Net")
    assert [type(m).__name__ for m in (model.bn1, model.bn2, model.top)] == ["GroupNorm", "Identity", "Identity"]
    assert run(["info", "sf.pt"]) == 0


def test_fragile_takes_what_the_rules_flag(folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfix.api import checking

    finding = Finding("BN301", "too-few-values", "error", "…", ("bn1",), Fix("swap", "…", sites=("bn1",)))
    monkeypatch.setattr(checking, "check", lambda *_a, **_k: Diagnosis((finding,), checked=("BN301",)))
    assert run([*ARGS, "--data", "x.npy", "--only", "fragile", "-o", "o.pt"]) == 0
    assert "swapped 1 of 1 norm for GroupNorm" in capsys.readouterr().out


def test_several_files_make_one_table(folder: Path, capsys: Output) -> None:
    Path("v.pt").write_bytes(Path("w.pt").read_bytes())
    assert run(["swap", "w.pt", "v.pt", "--arch", "net.py:Net", "--data", "x.npy", "-o", "out/"]) == 0
    out = capsys.readouterr().out
    assert "swapped 4 of 6 norms in 2 files, kept 2" in out
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["v.pt", "w.pt"]


def test_nothing_to_swap_writes_nothing(folder: Path, capsys: Output) -> None:
    assert run([*ARGS, "--only", "top", "--data", "x.npy", "-o", "o.pt"]) == 0
    assert "o.pt was not written" in capsys.readouterr().out
    assert not Path("o.pt").exists()


def test_a_whole_module_keeps_its_modes(folder: Path, capsys: Output) -> None:
    model = bnfix.load("w.pt", arch="net.py:Net").train()
    model.bn2.eval()
    torch.save(model, "whole.pt")
    assert run(["swap", "whole.pt", "--trust", "--data", "x.npy", "--in-place"]) == 0
    saved = torch.load("whole.pt", weights_only=False)
    assert (saved.bn1.training, saved.bn2.training) == (True, False)
    assert isinstance(saved.bn2, nn.GroupNorm)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_programs_become_programs(folder: Path, capsys: Output) -> None:
    """TorchScript, a .pt2, and weights written as one; with any number of samples."""
    x = torch.from_numpy(np.load("x.npy"))
    model = bnfix.load("w.pt", arch="net.py:Net")
    torch.jit.trace(model, x[:2]).save("script.pt")
    assert run(["swap", "script.pt", "--trust", "--data", "x.npy", "-o", "a.pt2"]) == 0
    assert run([*ARGS, "--data", "x.npy", "-o", "b.pt2"]) == 0
    assert run(["swap", "b.pt2", "--to", "frozen", "-o", "c.pt2"]) == 0
    assert capsys.readouterr().out.count("swapped 2 of 3 norms for GroupNorm") == 2
    expected = bnfix.swap(model, data=[x[:64], x[64:]]).model
    for name in ("a.pt2", "b.pt2", "c.pt2"):
        found = bnfix.load(name, trust=name == "a.pt2").module()  # conditions on sizes, as the converter leaves them
        for part in (x[:64],) if name == "a.pt2" else (x[:64], x[:3]):
            with torch.no_grad():
                torch.testing.assert_close(found(part), expected(part), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "o.pt"], "fitted to which data?"),
        (["--data", "x.npy"], "where should the swapped model go?"),
        (["--data", "random:3x9x9", "-o", "o.pt"], "fitted to noise"),
        (["--data", "missing.npy", "-o", "o.pt"], "there is no file missing.npy"),
        (["--data", "x.npy", "--only", "(", "-o", "o.pt"], "no regular expression"),
        (["--data", "x.npy", "--only", "nothing", "-o", "o.pt"], "fits no norm of the model: bn1, bn2, top"),
        (["--data", "x.npy", "--groups", "some", "-o", "o.pt"], "--groups is auto or a number"),
        (["--data", "x.npy", "--groups", "0", "-o", "o.pt"], "--groups is auto or a number"),
        (["--data", "x.npy", "--groups", "2", "--to", "frozen", "-o", "o.pt"], "--to 'frozen' has none to choose"),
        (["--only", "fragile", "-o", "o.pt", "--init", "copy"], "--only fragile asks how many values"),
        (["--to", "instance", "-o", "o.pt"], "A new instance norm on old weights is another function"),
        (["--data", "net.py:leaves", "-o", "o.pt"], "ended the program"),
        (["--data", "x.npy", "-o", "o.pt", "--in-place"], "exclude each other"),
    ],
)
def test_wrong_use_is_said_and_nothing_is_written(folder: Path, capsys: Output, options: list[str], said: str) -> None:
    assert run([*ARGS, *options]) == 2
    assert said in capsys.readouterr().err
    assert not Path("o.pt").exists()
