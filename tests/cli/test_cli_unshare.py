"""``bnfix unshare`` on real files, in process, and what its next lines lead to."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from nets import lived_in

import bnfix
from bnfix.cli import main

Output = pytest.CaptureFixture[str]

NET = """
import torch
from torch import nn

class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4), nn.BatchNorm1d(4))
    def forward(self, a, p, n):
        return self.net(a), self.net(p), self.net(n)

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16))

def loader():
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(16, 8, generator=draw) * (i + 1) + i for i in range(3)) for _ in range(4)]
"""
INPUT = ["--input", "4x8,4x8,4x8"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    for name in ("Siamese", "Plain"):
        model = lived_in(bnfix.load(f"net.py:{name}"))
        torch.save(model.state_dict(), f"{name}.pt")
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(args))
    return int(left.value.code or 0)


ARCH = ["--arch", "net.py:Siamese"]


def test_unshare_recalibrate_and_load(files: Path, capsys: Output) -> None:
    assert run("unshare", "Siamese.pt", *ARCH, *INPUT, "-o", "u.pt") == 0
    said = capsys.readouterr()
    assert "un-shared 2 of 2 shared norms" in said.out
    assert "identical to the bit" in said.out
    assert "net.1.0 … net.1.2" in said.out
    assert "counting the calls of each norm" in said.err
    model, before = bnfix.load("u.pt", arch="net.py:Siamese"), bnfix.load("Siamese.pt", arch="net.py:Siamese")
    x = torch.randn(3, 8)
    assert all(torch.equal(a, b) for a, b in zip(model(x, x, x), before(x, x, x), strict=True))
    line = next(li for li in said.out.splitlines() if li.strip().startswith("next")).split("next", 1)[1]
    words = shlex.split(line.replace("train.py:loader", "net.py:loader"))
    assert words[:2] == ["bnfix", "recalibrate"]
    assert run(*words[1:]) == 0
    healed = bnfix.load("u-recalibrated.pt", arch="net.py:Siamese")
    first, _, third = (n.running_mean for n in healed.net[1])
    assert (third - first).abs().max() > 0.5  # each branch has its own now
    assert run("unshare", "u-recalibrated.pt", *ARCH, *INPUT, "-o", "again.pt") == 0
    assert "found no norm that several calls share" in capsys.readouterr().out
    assert not Path("again.pt").exists()


def test_a_dry_run_writes_nothing_and_exits_1(files: Path, capsys: Output) -> None:
    before = set(files.iterdir())
    assert run("unshare", "Siamese.pt", *ARCH, *INPUT, "--dry-run") == 1
    out = capsys.readouterr().out
    assert "would un-share 2 of 2 shared norms" in out
    assert "nothing changed, this is the plan" in out
    assert "-o Siamese-unshared.pt" in out
    assert {p for p in files.iterdir() if p.suffix == ".pt"} == {p for p in before if p.suffix == ".pt"}
    assert run("unshare", "Plain.pt", "--arch", "net.py:Plain", "--input", "4x8", "--dry-run") == 0


def test_json_has_edits_and_the_run(files: Path, capsys: Output) -> None:
    assert run("unshare", "Siamese.pt", *ARCH, *INPUT, "--sites", "net.4", "--share-affine", "-o", "u.safetensors",
               "--output-format", "json") == 0  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert document["verb"] == "unshare"
    assert [e["site"] for e in document["edits"]] == ["net.4"]
    assert "net.4.2.running_mean" in document["edits"][0]["gains"]
    assert document["run"]["written"] == ["u.safetensors"]
    assert bnfix.load("u.safetensors", arch="net.py:Siamese").net[4][0].weight is not None


@pytest.mark.parametrize("format", ["full", "concise", "github", "markdown", "html"])
def test_every_format(files: Path, capsys: Output, format: str) -> None:
    assert run("unshare", "Siamese.pt", *ARCH, *INPUT, "--dry-run", "--output-format", format) == 1
    assert "would un-share 2 of 2 shared norms" in capsys.readouterr().out


def test_wrong_use(files: Path, capsys: Output) -> None:
    assert run("unshare", "Siamese.pt", *ARCH, *INPUT) == 2
    assert "where should the unshared model go?" in capsys.readouterr().err
    assert run("unshare", "Siamese.pt", *ARCH, *INPUT, "-o", "u.pt", "--sites", "net.9") == 2
    error = capsys.readouterr().err
    assert "--sites: there is no norm at 'net.9' to un-share; there is net.1, net.4" in error
    assert not Path("u.pt").exists()


def test_several_files_into_a_folder(files: Path, capsys: Output) -> None:
    torch.save(lived_in(bnfix.load("net.py:Siamese"), 3).state_dict(), "other.pt")
    assert run("unshare", "Siamese.pt", "other.pt", *ARCH, *INPUT, "-o", "out/") == 0
    assert "un-shared 4 norms in 2 files" in capsys.readouterr().out
    assert {p.name for p in Path("out").iterdir()} == {"Siamese.pt", "other.pt"}


def test_in_place(files: Path, capsys: Output) -> None:
    assert run("unshare", "Siamese.pt", *ARCH, *INPUT, "--in-place") == 0
    assert len(bnfix.info("Siamese.pt").norms) == 6
    assert "un-shared" in capsys.readouterr().out
    assert run("info", "Siamese.pt") == 0
    assert "un-shared  by bnfix" in capsys.readouterr().out


def test_a_forward_that_calls_the_network_itself_is_told_what_to_do(files: Path, capsys: Output) -> None:
    """Training code that calls the network three times: there is no forward that holds the calls."""
    done = run("unshare", "Plain.pt", "--arch", "net.py:Plain", "--data", "net.py:loader",
               "--forward", "lambda m, b: [m(x) for x in b]", "-o", "u.pt")  # fmt: skip
    out = capsys.readouterr().out
    assert done == 0
    assert "Put these calls into the forward of one module" in " ".join(out.split())
    assert not Path("u.pt").exists()
