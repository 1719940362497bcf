"""``bnfix recalibrate`` on models and data of other kinds: padded sequences, photos, a model without a norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from calibration.calib_nets import residual

import bnfix
from bnfix.cli import run

Output = pytest.CaptureFixture[str]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder; the test runs in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_masked_positions_do_not_count(workdir: Path) -> None:
    Path("seq.py").write_text("from torch import nn\n\ndef seq():\n    return nn.Sequential(nn.BatchNorm1d(2))\n")
    values = torch.randn(40, 2, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(6).expand(40, 6) < torch.arange(40).remainder(6).add(1).unsqueeze(1)
    np.savez("s.npz", input=torch.where(mask.unsqueeze(1), values, 99.0).numpy(), mask=mask.numpy())
    torch.save(bnfix.load("seq.py:seq").state_dict(), "s.pt")
    argv = ["recalibrate", "s.pt", "--arch", "seq.py:seq", "--data", "s.npz", "--mask", "mask", "-o", "t.pt"]
    assert run(argv) == 0
    kept = values.double().transpose(0, 1)[:, mask]
    found = bnfix.load("t.pt", arch="seq.py:seq")[0]
    torch.testing.assert_close(found.running_mean.double(), kept.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.running_var.double(), kept.var(1), rtol=1e-6, atol=0)


def test_images_are_read_as_the_model_is_evaluated_and_that_is_said(workdir: Path, capsys: Output) -> None:
    """timm's test_resnet: 160 px out of 168, mean and deviation 1/2; torch's values would be others."""
    timm, image = pytest.importorskip("timm"), pytest.importorskip("PIL.Image")
    Path("photos/one").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(6):
        pixels = generator.integers(0, 256, (200, 180 + i, 3), dtype=np.uint8)
        image.fromarray(pixels).save(f"photos/one/{i}.png")
    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), "t.pt")
    argv = ["recalibrate", "t.pt", "--arch", "timm:test_resnet", "--data", "photos", "-o", "u.pt"]
    assert run(argv) == 0
    out, err = capsys.readouterr()
    line = next(line for line in err.splitlines() if line.startswith("6 images, shuffled with seed 0: "))
    assert "shorter side 168, centre 160, " in line
    assert "mean 0.5/0.5/0.5, std 0.5/0.5/0.5 (timm's default_cfg;" in line
    assert f"note: {line}" in out
    fresh = bnfix.load("u.pt", arch="timm:test_resnet")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    photos = torch.stack([transform(image.open(p)) for p in sorted(Path("photos/one").iterdir())])
    found = residual(fresh, [photos])
    assert max(found) <= 1e-5


def test_a_model_with_other_buffers_and_no_norm_is_told_what_was_looked_for(workdir: Path, capsys: Output) -> None:
    source = "from torch import nn\nclass Odd(nn.Linear):\n    def __init__(self):\n        super().__init__(8, 2)\n"
    Path("odd.py").write_text(f"{source}        self.register_buffer('steps', self.bias.detach() * 0)\n")
    np.save("x.npy", np.ones((4, 3, 8, 8), np.float32))
    argv = ["recalibrate", "odd.py:Odd", "--data", "x.npy", "-o", "f.pt"]
    assert run(argv) == 2
    err = capsys.readouterr().err
    assert "the model has no norm with running statistics: nothing to recalibrate" in err
    assert "looked for: modules with running_mean and running_var" in err
