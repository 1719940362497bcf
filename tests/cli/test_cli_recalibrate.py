"""``bnfix recalibrate`` with the real verb: a file with spoilt statistics goes in, one at the fixed point comes out."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration.calib_nets import residual
from torch import Tensor, nn

import bnfix
from bnfix.cli import run

Output = pytest.CaptureFixture[str]
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(self.stem(x)))).mean((2, 3)))

def spoilt():
    torch.manual_seed(0)
    model = Net().eval()
    for norm in (model.stem[1], model.bn):
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(40.0)
    return model
"""
LOADER = """
import os, sys
import torch
from torch.utils.data import DataLoader, TensorDataset

def images():
    return torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1

def make():
    return DataLoader(TensorDataset(images(), torch.arange(70)), batch_size=16)

def pairs():
    for batch in images().split(10):
        yield batch[:5], batch[5:], torch.zeros(5)

def breaks():
    yield images()[:8]
    yield images()[8:16]
    raise OSError("disk gone")

def leaves():
    yield images()[:8]
    sys.exit(0)
"""
PRE = """
import torch
from torch import nn

class Pre(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.b(torch.relu(self.a(self.conv(x))))
"""
ARCH = ["--arch", "net.py:Net"]
SPOILT = ["recalibrate", "spoilt.pt", *ARCH]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``net.py``, ``loader.py``, ``x.npy`` and the weights ``spoilt.pt``; the test runs in it."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("loader.py").write_text(LOADER)
    torch.save(net("spoilt").state_dict(), "spoilt.pt")
    np.save("x.npy", x().numpy())
    return tmp_path


def named(source: str, name: str) -> Any:
    names: dict[str, Any] = {}
    exec(source, names)
    return names[name]()


def net(name: str) -> nn.Module:
    return named(NET, name)


def x() -> Tensor:
    return named(LOADER, "images")


def fixed(path: str = "fixed.pt") -> nn.Module:
    return bnfix.load(path, arch="net.py:Net")


def offered(out: str, label: str) -> str:
    return next(line.strip().removeprefix(label).strip() for line in out.splitlines() if line.strip().startswith(label))


@pytest.mark.parametrize("data", ["x.npy", "loader.py:make", "loader.py:images"])
def test_the_file_written_is_at_the_fixed_point(shop: Path, capsys: Output, data: str) -> None:
    before = Path("spoilt.pt").read_bytes()
    assert residual(fixed("spoilt.pt"), [x()]).mean > 0.3  # spoilt indeed
    assert run([*SPOILT, "--data", data, "-o", "fixed.pt"]) == 0
    out, err = capsys.readouterr()
    assert "✓ recalibrated 2 of 2 norms on 70 samples" in out
    found = residual(fixed(), x().split(16))
    assert max(found) <= 1e-5
    was, now = torch.load("spoilt.pt"), torch.load("fixed.pt")
    assert list(was) == list(now)
    moved = {k for k in was if not torch.equal(was[k], now[k])}
    counters = {"stem.1.num_batches_tracked", "bn.num_batches_tracked"}
    assert moved - counters == {f"{n}.running_{s}" for n in ("stem.1", "bn") for s in ("mean", "var")}
    assert Path("spoilt.pt").read_bytes() == before
    # said before the work, also where there is no terminal
    lines = err.splitlines()
    said = next(i for i, line in enumerate(lines) if line.startswith("method staged: all 70 samples fit"))
    assert said < next(i for i, line in enumerate(lines) if line.startswith("norm 1"))
    names: dict[str, nn.Module] = {}
    exec(offered(out, "load it"), names)
    assert torch.equal(names["model"].bn.running_var, fixed().bn.running_var)
    assert run(shlex.split(offered(out, "next"))[1:]) == 0  # folds it
    assert Path("fixed-folded.pt").exists()


def test_batch_size_order_and_dropout_do_not_matter(shop: Path) -> None:
    """To 1e-5 σ: activations differ by some 1e-6 with the batch size."""
    for size in ("7", "64"):
        assert run([*SPOILT, "--data", "x.npy", "--batch-size", size, "-o", f"{size}.pt"]) == 0
    a, b = fixed("7.pt").bn, fixed("64.pt").bn
    assert ((a.running_mean - b.running_mean).abs() / b.running_var.sqrt()).max() < 1e-5
    assert (a.running_var / b.running_var - 1).abs().max() < 1e-5


def test_json_holds_the_whole_report(shop: Path, capsys: Output) -> None:
    argv = [*SPOILT, "--data", "x.npy", "--certify", "full", "-o", "fixed.pt", "--output-format", "json"]
    assert run(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["type"] == "Recalibration"
    assert document["residual"]["mean"] <= 1e-5
    assert document["run"]["written"] == ["fixed.pt"]
    assert document["run"]["verdict"].startswith("recalibrated 2 of 2 norms on 70 samples")


def test_concise_ends_with_the_verdict_and_the_file(shop: Path, capsys: Output) -> None:
    argv = [*SPOILT, "--data", "x.npy", "-o", "fixed.pt", "--output-format", "concise"]
    assert run(argv) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("spoilt.pt: recalibrated 2 of 2 norms on 70 samples")
    assert last.endswith(" · wrote fixed.pt")


def test_without_data_the_three_forms_are_shown(shop: Path, capsys: Output) -> None:
    assert run([*SPOILT, "-o", "fixed.pt"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[:2] for line in err.splitlines()[1:]] == [
        ["--data", "loader.py:make"],
        ["--data", "train_images/"],
        ["--data", "x.npy"],
    ]


def test_noise_is_refused(shop: Path, capsys: Output) -> None:
    assert run([*SPOILT, "--data", "random:3x8x8", "-o", "fixed.pt"]) == 2
    assert "statistics of noise" in capsys.readouterr().err
    assert not Path("fixed.pt").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--select", "("], "--select ( is no regular expression"),
        (["--select", "nothing"], "fits no norm"),
        (["--tol", "0"], "--tol is a positive number"),
        (["--memory-budget", "lots"], "--memory-budget: 'lots' is no amount of memory"),
        (["--forward", "3"], "--forward '3' is no function"),
        (["--device", "abacus"], "--device abacus: "),
        (["--data", "loader.py:gone"], "loader.py has no gone"),
        (
            ["--data", "loader.py"],
            "loader.py is Python code: say what in it gives the batches\n  --data loader.py:images",
        ),
        (["--data", "empty.npy"], "empty.npy is empty: there are no samples in array (0, 3, 8, 8)"),
        (
            ["--mask", "m"],
            "x.npy: batch 0: no mask: the batch is one tensor, and --mask m is the key of a dict\n  a mask",
        ),
        (
            ["--data", "two.npz", "--mask", "m"],
            "two.npz: batch 0: no mask: KeyError: 'm'\n  the keys of a batch:  x, y",
        ),
        (["--spill-dir", "no-such-folder"], "--spill-dir"),
        (["--data", "nowhere.npy"], "error: there is no file nowhere.npy\n  --data loader.py:make "),
        (["--data", "bytes.npy"], "\n  --forward 'lambda m, b: m(b.permute(0, 3, 1, 2).float() / 255)'"),
        (["--arch", "torch.nn:Flatten"], "unknown to it"),
    ],
)
def test_wrong_use_is_one_error_in_words_of_the_command_line(
    shop: Path, capsys: Output, more: list[str], said: str
) -> None:
    np.save("bytes.npy", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    np.save("empty.npy", np.zeros((0, 3, 8, 8)))
    np.savez("two.npz", x=np.ones((4, 3, 8, 8)), y=np.ones(4))
    assert run([*SPOILT, "--data", "x.npy", "-o", "fixed.pt", *more]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert "defect" not in err
    assert out == ""
    assert not Path("fixed.pt").exists()


def test_dry_run_tells_whether_anything_would_change(shop: Path, capsys: Output) -> None:
    files = sorted(os.listdir())
    assert run([*SPOILT, "--data", "x.npy", "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "would recalibrate 2 of 2 norms" in out
    assert sorted(f for f in os.listdir() if f != "__pycache__") == files
    line = shlex.split(offered(out, "next"))
    assert line == ["bnfix", *SPOILT, "--data", "x.npy", "-o", "spoilt-recalibrated.pt"]
    assert run(line[1:]) == 0
    capsys.readouterr()
    assert run(["recalibrate", "spoilt-recalibrated.pt", *ARCH, "--data", "x.npy", "--dry-run"]) == 0
    assert "next" not in capsys.readouterr().out


def test_when_needed_writes_nothing_where_nothing_is_gained(shop: Path, capsys: Output) -> None:
    needed = ["--data", "x.npy", "--when", "needed"]
    assert run([*SPOILT, *needed, "--dry-run"]) == 1
    assert run([*SPOILT, *needed, "-o", "fixed.pt"]) == 0
    assert Path("fixed.pt").exists()
    again = ["recalibrate", "fixed.pt", *ARCH, *needed]
    assert run([*again, "--dry-run"]) == 0
    capsys.readouterr()
    assert run([*again, "-o", "twice.pt"]) == 0
    assert "nothing was changed: twice.pt was not written" in capsys.readouterr().out
    assert not Path("twice.pt").exists()


def test_a_model_without_running_statistics_is_told_so_before_the_data_is_read(shop: Path, capsys: Output) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), "linear.pt")
    sizes = ["--arch-kw", "in_features=3", "--arch-kw", "out_features=4"]
    argv = ["recalibrate", "linear.pt", "--arch", "torch.nn:Linear", *sizes, "--data", "loader.py:breaks", "-o", "f.pt"]
    assert run(argv) == 2
    err = capsys.readouterr().err
    assert (
        "linear.pt keeps no running statistics: nothing to recalibrate\n  looked for: modules with running_mean" in err
    )


def test_two_inputs_and_batches_of_one_names_the_parameters(shop: Path, capsys: Output) -> None:
    source = NET.replace("def forward(self, x):", "def forward(self, x, weight):")
    Path("both.py").write_text(source.replace(".mean((2, 3))", ".mean((2, 3)) * weight"))
    argv = ["recalibrate", "spoilt.pt", "--arch", "both.py:Net", "-o", "f.pt", "--data"]
    assert run([*argv, "x.npy"]) == 2
    err = capsys.readouterr().err
    assert "x.npy: batch 0: the batch has 1 element, and the forward requires 2: x, weight" in err
    assert "tuples (x, weight), or dicts (or an .npz file) with these names" in err
    np.savez("both.npz", x=x().numpy(), weight=np.ones((70, 1)))
    assert run([*argv, "both.npz"]) == 0  # as the hint says


def test_what_did_not_drift_is_not_called_drift(shop: Path, capsys: Output) -> None:
    assert run([*SPOILT, "--data", "x.npy", "-o", "fixed.pt"]) == 0
    assert capsys.readouterr().out.count("drifted most") == 2  # the row and the line
    assert run(["recalibrate", "fixed.pt", *ARCH, "--data", "x.npy", "-o", "again.pt"]) == 0
    assert "drifted most" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ what is in the file


def test_norms_frozen_when_the_module_was_saved_stay(shop: Path, capsys: Output, monkeypatch: Any) -> None:
    """The modes in the file count, not those of a model made ready for inference; they are written as they were."""
    monkeypatch.syspath_prepend(str(shop))
    from net import spoilt

    model = spoilt().train()
    model.stem[1].eval()
    torch.save(model, "whole.pt")
    whole = ["recalibrate", "whole.pt", "--trust", "--data", "x.npy"]
    assert run([*whole, "-o", "a.pt"]) == 0
    out = capsys.readouterr().out
    assert "recalibrated 1 of 2 norms" in out
    assert "frozen when it was saved (--include-frozen takes it along)" in out
    a = torch.load("a.pt", weights_only=False)
    assert torch.equal(a.stem[1].running_mean, model.stem[1].running_mean)
    assert not torch.equal(a.bn.running_mean, model.bn.running_mean)
    assert [m.training for m in a.modules()] == [m.training for m in model.modules()]
    assert run([*whole, "--include-frozen", "-o", "b.pt"]) == 0
    assert max(residual(torch.load("b.pt", weights_only=False), x().split(16))) <= 1e-5


def test_in_a_module_saved_in_evaluation_mode_nothing_is_frozen(shop: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(shop))
    from net import spoilt

    torch.save(spoilt(), "whole.pt")
    assert run(["recalibrate", "whole.pt", "--trust", "--data", "x.npy", "-o", "a.pt"]) == 0
    assert max(residual(torch.load("a.pt", weights_only=False), x().split(16))) <= 1e-5


def test_a_checkpoint_comes_back_whole(shop: Path, capsys: Output) -> None:
    state = {f"module.{k}": v for k, v in net("spoilt").state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, "c.pt")
    assert run(["recalibrate", "c.pt", *ARCH, "--data", "x.npy", "--in-place"]) == 0
    assert "written into 'state_dict': all else in the checkpoint is as it was" in capsys.readouterr().out
    found = torch.load("c.pt")
    assert (found["epoch"], found["optimizer"], list(found["state_dict"])) == (3, {"lr": 0.1}, list(state))
    assert max(residual(fixed("c.pt"), x().split(16))) <= 1e-5


def test_what_a_fold_left_is_recalibrated_and_the_recipe_stays(shop: Path, capsys: Output) -> None:
    Path("pre.py").write_text(PRE)
    arch = ["--arch", "pre.py:Pre"]
    torch.manual_seed(0)
    torch.save(bnfix.load("pre.py:Pre").state_dict(), "w.pt")
    assert run(["fold", "w.pt", *arch, "--input", "2x3x8x8", "-o", "f.pt"]) == 0
    assert run(["recalibrate", "f.pt", *arch, "--data", "x.npy", "-o", "g.pt"]) == 0
    assert "folded norms have no statistics any more" in capsys.readouterr().out
    model = bnfix.load("g.pt", arch="pre.py:Pre")
    assert isinstance(model.a, nn.Identity)
    assert max(residual(model, x().split(16))) <= 1e-5


# ------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            "loader.py:breaks",
            "error: loader.py:breaks: the data raised after batch 1: OSError: disk gone\n  it is code of",
        ),
        ("loader.py:leaves", "the code in it ended the program"),
    ],
)
def test_a_loader_that_fails_half_way_leaves_no_file(shop: Path, capsys: Output, data: str, said: str) -> None:
    files = sorted(os.listdir())
    assert run([*SPOILT, "--data", data, "-o", "fixed.pt"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert sorted(f for f in os.listdir() if f != "__pycache__") == files


def test_an_ambiguous_batch_is_resolved_by_pasting_the_hint(shop: Path, capsys: Output) -> None:
    """``(view, view, label)``: calibrating on the first views alone would be a guess."""
    argv = [*SPOILT, "--data", "loader.py:pairs", "-o", "fixed.pt"]
    assert run(argv) == 2
    hints = [line for line in capsys.readouterr().err.splitlines() if "--forward" in line]
    assert len(hints) >= 2
    joint = next(line for line in hints if "torch.cat" in line)
    assert run([*argv, *shlex.split(joint[joint.index("--forward") :])]) == 0
    assert max(residual(fixed(), x().split(16))) <= 1e-5


def test_neither_help_nor_usage_errors_import_torch_and_the_work_imports_no_compiler(shop: Path) -> None:
    code = (
        "import sys; from bnfix.cli import run\n"
        "codes = [run(['recalibrate', *words]) for words in (['--help'], ['w.pt'], ['spoilt.pt'])]\n"
        "print(codes, 'torch' in sys.modules, file=sys.stderr)\n"
        f"print(run({[*SPOILT, '--data', 'x.npy', '-o', 'f.pt']!r}), 'torch._dynamo' in sys.modules, file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(bnfix.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    lines = done.stderr.splitlines()
    assert "[0, 2, 2] False" in lines
    assert lines[-1] == "0 False"


@pytest.mark.gpu
def test_on_a_gpu_and_written_for_anywhere(shop: Path) -> None:
    assert run([*SPOILT, "--data", "x.npy", "-o", "cpu.pt"]) == 0
    assert run([*SPOILT, "--data", "x.npy", "--device", "cuda", "-o", "gpu.pt"]) == 0
    state = torch.load("gpu.pt", map_location=None)
    assert {t.device.type for t in state.values()} == {"cpu"}
    # convolutions of the GPU may round to TF32's 2⁻¹¹
    torch.testing.assert_close(state, torch.load("cpu.pt"), rtol=5e-3, atol=5e-3)
