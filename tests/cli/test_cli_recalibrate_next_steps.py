"""``bnfix recalibrate`` where something is wrong: the message is true, and the line below it works when pasted."""

from __future__ import annotations

import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bnfix
from bnfix.cli import run

Output = pytest.CaptureFixture[str]
NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
"""
LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset

X = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 30 + 120

def bytes_and_labels():
    for batch in X.split(8):
        yield batch.clamp(0, 255).to(torch.uint8), torch.arange(8)

def channels_last_in_a_dict():
    for batch in X.split(8):
        yield {"input": batch.permute(0, 2, 3, 1), "label": torch.arange(8)}

def one_by_one():
    yield from X

def grey():
    yield from X[:, :1].split(8)

def doubles():
    yield from X.double().split(8)

def with_a_path(path):
    return X.split(8)

class Broken(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        if index == 20:
            raise ValueError("sample 20 is damaged")
        return X[index]

def workers():
    return DataLoader(Broken(), batch_size=8, num_workers=1)
"""
START = ["recalibrate", "weights.pt", "--arch", "net.py:net", "-o", "fixed.pt"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("loader.py").write_text(LOADER)
    torch.save(net().state_dict(), "weights.pt")
    return tmp_path


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("data", ["bytes_and_labels", "channels_last_in_a_dict", "one_by_one", "grey"])
def test_what_is_offered_for_a_batch_that_does_not_fit_works(shop: Path, capsys: Output, data: str) -> None:
    argv = [*START, "--data", f"loader.py:{data}"]
    assert run(argv) == 2
    offered = capsys.readouterr().err.splitlines()[-1]
    more = shlex.split(offered)
    assert more[0] == "--forward"
    assert run([*argv, *more]) == 0
    assert Path("fixed.pt").exists()


def test_a_forward_that_was_given_and_fails_is_not_answered_with_another(shop: Path, capsys: Output) -> None:
    assert run([*START, "--data", "loader.py:grey", "--forward", "lambda m, b: m(b[:, :2])"]) == 2
    err = capsys.readouterr().err
    assert "it is code of yours" in err
    assert "permute" not in err


def test_loaders_of_float64_feed_a_float32_model(shop: Path, capsys: Output) -> None:
    assert run([*START, "--data", "loader.py:doubles"]) == 0
    assert "taken from a batch: the batch, float64 as float32" in capsys.readouterr().out


def test_what_a_worker_raised_is_said(shop: Path, capsys: Output) -> None:
    assert run([*START, "--data", "loader.py:workers"]) == 2
    assert "the data raised after batch 1: ValueError: sample 20 is damaged (in a worker)" in capsys.readouterr().err


def test_a_function_that_needs_arguments_is_shown_how_to_get_them(shop: Path, capsys: Output) -> None:
    assert run([*START, "--data", "loader.py:with_a_path"]) == 2
    assert "def make(): return with_a_path(…)" in capsys.readouterr().err


def test_a_damaged_image_is_no_code_of_the_users(shop: Path, capsys: Output) -> None:
    images = pytest.importorskip("PIL.Image")
    Path("images").mkdir()
    images.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save("images/good.png")
    Path("images/bad.png").write_bytes(Path("images/good.png").read_bytes()[:60])
    assert run([*START, "--data", "images"]) == 2
    err = capsys.readouterr().err
    assert "images/bad.png can't be read as an image" in err
    assert "mend it, or take it out of the folder" in err
    assert "code of yours" not in err


def test_a_program_for_one_batch_size_names_it(shop: Path, capsys: Output) -> None:
    torch.export.save(torch.export.export(net().eval(), (torch.randn(4, 3, 12, 12),)), "net.pt2")
    np.save("x.npy", np.random.default_rng(0).normal(size=(16, 3, 12, 12)))
    argv = ["recalibrate", "net.pt2", "--data", "x.npy", "-o", "fixed.pt2"]
    assert run(argv) == 2
    assert "--batch-size 4 " in capsys.readouterr().err
    assert run([*argv, "--batch-size", "4"]) == 0


def test_in_place_is_of_files(shop: Path, capsys: Output) -> None:
    assert run(["recalibrate", "net.py:net", "--data", "loader.py:X", "--in-place"]) == 2
    assert "--in-place writes over a file, and net.py:net is none\n  -o recalibrated.pt" in capsys.readouterr().err


def test_the_safer_way_around_trust_is_what_was_asked_for(shop: Path, capsys: Output) -> None:
    torch.save(net(), "whole.pt")
    assert run(["recalibrate", "whole.pt", "--arch", "net.py:net", "--data", "loader.py:X", "-o", "fixed.pt"]) == 2
    safer = capsys.readouterr().err.splitlines()[-1]
    assert safer.endswith("bnfix recalibrate weights.pt --arch net.py:net --data loader.py:X -o fixed.pt")


def test_the_method_is_said_before_the_work_also_where_it_was_chosen(shop: Path, capsys: Output) -> None:
    assert run([*START, "--data", "loader.py:X", "--method", "population"]) == 0
    assert "method population: as asked for; one pass over the loader" in capsys.readouterr().err


def test_samples_that_were_asked_for_are_not_all_there_are(shop: Path, capsys: Output) -> None:
    assert run([*START, "--data", "loader.py:X", "--max-samples", "9"]) == 0
    assert "method staged: the 9 samples asked for fit in memory" in capsys.readouterr().err


def limited(kind: int, amount: int, *more: str) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(kind, (amount, amount))

    argv = [sys.executable, "-m", "bnfix", *START, "--data", "loader.py:X", *more]
    return subprocess.run(argv, preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_is_called_that_and_the_old_file_stays(shop: Path) -> None:
    table = "    made.register_buffer('table', torch.zeros(1 << 18))\n    return made\n"
    Path("net.py").write_text("import torch\n" + NET.replace("return nn", "made = nn") + table)
    torch.save({**net().state_dict(), "table": torch.zeros(1 << 18)}, "weights.pt")
    Path("fixed.pt").write_bytes(b"old")
    ended = limited(resource.RLIMIT_FSIZE, 1 << 19)
    assert ended.returncode == 2
    assert "fixed.pt can't be written: File too large" in ended.stderr
    assert Path("fixed.pt").read_bytes() == b"old"
    assert not list(shop.glob(".bnfix-*"))


def test_out_of_memory_is_no_defect() -> None:
    from bnfix.cli.door import explained

    full = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …")
    message, hint = explained(full)
    assert message == "out of memory"
    assert "--memory-budget" in hint[0]


def test_no_memory_to_prepare_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfix.running import heap, kept_heap

    def full(count: int) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(heap, "_block", full)
    with kept_heap(1 << 30):
        pass


def test_ctrl_c_while_the_command_itself_is_imported_is_one_line() -> None:
    code = """
import importlib.abc, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from bnfix.cli import main
main(["info", "nothing.pt"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGINT, "interrupted\n")


def test_num_batches_tracked_moves_only_where_it_says_initial_values_are_left(shop: Path) -> None:
    weights = torch.load("weights.pt")
    weights["1.num_batches_tracked"].fill_(5000)
    torch.save(weights, "weights.pt")
    assert run([*START, "--data", "loader.py:X"]) == 0
    after = torch.load("fixed.pt")
    changed = {name for name in weights if not torch.equal(weights[name], after[name])}
    stats = {f"{i}.running_{what}" for i in (1, 4) for what in ("mean", "var")}
    assert changed == {*stats, "4.num_batches_tracked"}
    assert "44 with the default momentum" in (Path(bnfix.__file__).parent / "docs/recalibration.md").read_text()


@pytest.mark.parametrize("form", ["full", "concise", "json", "markdown", "html", "github"])
def test_what_was_not_measured_is_asked_for_as_an_option(shop: Path, capsys: Output, form: str) -> None:
    assert run([*START, "--data", "loader.py:doubles", "--output-format", form]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "residual not measured (--certify full)" in out
    assert "certify=" not in out
    report = bnfix.recalibrate(net(), [torch.randn(8, 3, 12, 12)])
    assert 'residual not measured (certify="full")' in " ".join(str(report).split())
