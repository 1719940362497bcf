"""``torchrun … -m bnfix recalibrate``: one result, one report, one error; nobody waits for a process that failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import bnfix

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo here")
NET = """
import os
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

def make():
    x = torch.randn(90, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)

def breaks_on_one():
    for i, (x,) in enumerate(make()):
        if i == 5 and os.environ.get("RANK") == "1":
            raise OSError("disk gone")
        yield x

def missing_on_one():
    if os.environ.get("RANK") == "1":
        raise FileNotFoundError("not mounted here")
    return make()
"""
COMMAND = ["recalibrate", "w.pt", "--arch", "net.py:Net"]
ENV = {**os.environ, "PYTHONPATH": str(Path(bnfix.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.save(bnfix.load("net.py:Net").state_dict(), "w.pt")
    return tmp_path


def launched(*words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """The command under torchrun on a port of its own; a hang is an error after two minutes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    argv = [sys.executable, *(torchrun if processes else []), "-m", "bnfix", *COMMAND, *words]
    return subprocess.run(argv, capture_output=True, text=True, env=ENV, check=False, timeout=120)


def test_two_processes_give_what_one_gives_and_one_report(here: Path) -> None:
    assert launched("--data", "net.py:make", "-o", "one.pt", processes=0).returncode == 0
    done = launched("--data", "net.py:make", "-o", "two.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recalibrated 2 of 2 norms on 90 samples") == 1
    assert "2 ranks" in done.stdout
    assert done.stderr.count("loading w.pt") == 1
    assert "destroy_process_group" not in done.stderr  # what torch says of a group that was left
    one, two, before = torch.load("one.pt"), torch.load("two.pt"), torch.load("w.pt")
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(two["4.running_var"], before["4.running_var"], rtol=0.1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("net.py:breaks_on_one", "the data raised after batch 1: OSError: disk gone"),
        ("net.py:missing_on_one", "net.py:missing_on_one() failed: FileNotFoundError: not mounted here"),
    ],
)
def test_one_process_that_fails_ends_all_with_one_error_and_no_file(here: Path, data: str, said: str) -> None:
    done = launched("--data", data, "-o", "two.pt")
    assert done.returncode == 1  # torchrun's own, whatever its processes ended with
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: rank 1 of 2 failed")
    assert said in errors[0]
    assert "exitcode  : 2" in done.stderr
    assert done.stdout == ""
    assert not Path("two.pt").exists()
    assert not [f for f in os.listdir() if f.startswith(".")]


def test_wrong_use_is_one_error_too(here: Path) -> None:
    done = launched("-o", "two.pt")
    assert done.returncode == 1
    assert done.stderr.count("error: on which data?") == 1


def test_a_dry_run_of_several_processes_writes_nothing(here: Path) -> None:
    done = launched("--data", "net.py:make", "--dry-run")
    assert done.returncode == 1
    assert "would recalibrate 2 of 2 norms on 90 samples" in done.stdout
    assert "exitcode  : 1" in done.stderr
