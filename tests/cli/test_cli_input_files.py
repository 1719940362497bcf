"""``--input`` as a file: keyword and positional arguments of the forward, and every way in which they don't fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bnfix
from bnfix.cli import run

Output = pytest.CaptureFixture[str]
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.emb = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(10, 4)

    def forward(self, image, ids, scale=None):
        y = self.bn(self.conv(image)) + self.emb(ids).mean(1)[:, :, None, None]
        return y if scale is None else y * scale

class Together(Net):
    def forward(self, batch):
        image, ids = (batch["image"], batch["ids"]) if isinstance(batch, dict) else batch
        return super().forward(image, ids)

class Placed(Net):
    def forward(self, image, ids, /):
        return super().forward(image, ids)

def lived(cls):
    torch.manual_seed(0)
    model = cls().eval()
    nn.init.normal_(model.bn.running_mean)
    nn.init.uniform_(model.bn.running_var, 0.5, 2.0)
    nn.init.uniform_(model.bn.weight, 0.5, 2.0)
    nn.init.normal_(model.bn.bias)
    return model

def net(): return lived(Net)
def together(): return lived(Together)
def placed(): return lived(Placed)
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """``net.py``, the weights ``w.pt`` and the image and the indices that the files hold; the test runs there."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.save(bnfix.load("net.py:net").state_dict(), "w.pt")
    draw = np.random.default_rng(0)
    return {"image": draw.normal(size=(2, 3, 8, 8)), "ids": draw.integers(0, 10, (2, 5))}


def written(name: str, arrays: dict[str, np.ndarray]) -> str:
    if name.endswith(".safetensors"):
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        save_file({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, name)
    elif name.startswith("placed"):
        np.savez(name, *arrays.values())
    elif name.startswith("mixed"):
        np.savez(name, arrays["image"], ids=arrays["ids"], scale=np.array(2.0))
    else:
        np.savez(name, **arrays)
    return name


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("named.npz", "(image=2x3x8x8, ids=2x5 int64)"),
        ("named.safetensors", "(image=2x3x8x8, ids=2x5 int64)"),
        ("placed.npz", "(2x3x8x8, 2x5 int64)"),
        ("mixed.npz", "(2x3x8x8, ids=2x5 int64, scale=scalar)"),
    ],
)
def test_fold_is_traced_and_proven_on_the_file(
    shop: dict[str, np.ndarray], capsys: Output, name: str, signature: str
) -> None:
    argv = ["fold", "w.pt", "--arch", "net.py:Net", "--input", written(name, shop)]
    assert run([*argv, "-o", "f.pt", "--output-format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["signatures"][0] == signature
    assert [e["site"] for e in document["edits"]] == ["bn"]
    assert document["parity"]["passed"] is True
    folded, original = bnfix.load("f.pt", arch="net.py:Net"), bnfix.load("w.pt", arch="net.py:Net").double()
    image, ids = torch.from_numpy(shop["image"]).float(), torch.from_numpy(shop["ids"])
    with torch.no_grad():
        expected = original(image.double(), ids)
        error = (folded(image, ids).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-6  # some float32 roundings of 6e-8; the norm left out is off by more than 0.1


def test_export_and_verify_take_the_same_file(shop: dict[str, np.ndarray], capsys: Output) -> None:
    options = ["--arch", "net.py:Net", "--input", written("named.npz", shop)]
    assert run(["export", "w.pt", *options, "-o", "m.onnx"]) == 0
    assert "image: Nx3x8x8 float32, ids: Nx5 int64" in capsys.readouterr().out
    assert run(["verify", "w.pt", "m.onnx", *options]) == 0
    spoilt = torch.load("w.pt")
    spoilt["bn.running_mean"][1] += 0.1
    torch.save(spoilt, "spoilt.pt")
    assert run(["verify", "spoilt.pt", "m.onnx", *options]) == 1


def test_several_files_and_shapes_are_several_signatures(shop: dict[str, np.ndarray], capsys: Output) -> None:
    inputs = [written("named.npz", shop), written("mixed.npz", shop), "1x3x9x9,ids=1x4:int64"]
    argv = ["fold", "w.pt", "--arch", "net.py:Net", *(w for i in inputs for w in ("--input", i)), "-o", "f.pt"]
    assert run([*argv, "--output-format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["signatures"] == [
        "(image=2x3x8x8, ids=2x5 int64)",
        "(2x3x8x8, ids=2x5 int64, scale=scalar)",
        "(1x3x9x9, ids=1x4 int64)",
    ]


def test_positional_only_parameters_are_found_by_name(shop: dict[str, np.ndarray], capsys: Output) -> None:
    argv = ["fold", "w.pt", "--arch", "net.py:Placed", "--input", written("named.npz", shop), "--dry-run"]
    assert run([*argv, "--output-format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["signatures"][0] == "(2x3x8x8, 2x5 int64)"


@pytest.mark.parametrize(
    ("name", "signature"), [("named.npz", "{image: 2x3x8x8, ids: 2x5 int64}"), ("placed.npz", "[2x3x8x8, 2x5 int64]")]
)
def test_a_model_that_takes_the_dict_or_the_tuple_itself(
    shop: dict[str, np.ndarray], capsys: Output, name: str, signature: str
) -> None:
    argv = ["fold", "w.pt", "--arch", "net.py:Together", "--input", written(name, shop), "--dry-run"]
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert "it takes (batch), and in the file are" in error
    assert "--forward 'lambda m, b: m(b)'" in error
    assert run([*argv, "--forward", "lambda m, b: m(b)", "--output-format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["signatures"] == [signature]


@pytest.mark.parametrize("verb", [["fold", "w.pt"], ["export", "w.pt"], ["verify", "w.pt", "w.pt"]])
@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        ({"ids": None}, "has no ids", "it takes (image, ids, scale=None), and in the file are image"),
        ({"idz": 1}, "has idz, which the forward does not take", "it takes (image, ids, scale=None), and in the file"),
        ({"image": "uint8"}, "failed on (image=2x3x8x8 uint8, ids=2x5 int64)", "image=image.astype('float32')"),
        ({"ids": "float32"}, "failed on (image=2x3x8x8, ids=2x5)", ".astype('int64')"),
        ({"image": (2, 4, 8, 8)}, "failed on (image=2x4x8x8", "in the file: image float32 (2, 4, 8, 8), ids int64"),
        ({"image": (0, 3, 8, 8)}, "image is empty", "its shape is (0, 3, 8, 8)"),
    ],
)
def test_what_does_not_fit_is_one_error_that_names_the_file(
    shop: dict[str, np.ndarray], capsys: Output, verb: list[str], change: dict, said: str, hint: str
) -> None:
    for name, how in change.items():
        if how is None:
            del shop[name]
        elif isinstance(how, str):
            shop[name] = shop[name].astype(how)
        else:
            shop[name] = np.ones(how, dtype=np.float32) if isinstance(how, tuple) else np.ones(1)
    target = {"fold": ["-o", "f.pt"], "export": ["-o", "f.onnx"]}.get(verb[0], [])
    assert run([*verb, "--arch", "net.py:Net", "--input", written("x.npz", shop), *target]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = err[err.index("error: x.npz") :]
    assert said in error
    assert hint in error
    assert "defect" not in err
    assert not Path("f.pt").exists()
    assert not Path("f.onnx").exists()


def test_too_many_positional_arguments(shop: dict[str, np.ndarray], capsys: Output) -> None:
    np.savez("x.npz", *([shop["image"]] * 4))
    assert run(["fold", "w.pt", "--arch", "net.py:Net", "--input", "x.npz", "--dry-run"]) == 2
    assert "x.npz has 4 positional arguments\n  it takes (image, ids, scale=None)" in capsys.readouterr().err
    np.savez("x.npz", shop["image"], image=shop["image"], ids=shop["ids"])
    assert run(["fold", "w.pt", "--arch", "net.py:Net", "--input", "x.npz", "--dry-run"]) == 2
    assert "x.npz has image by name and by position" in capsys.readouterr().err


def test_a_missing_file_is_known_before_anything_is_loaded(shop: dict[str, np.ndarray], capsys: Output) -> None:
    assert run(["fold", "w.pt", "--arch", "net.py:Net", "--input", "gone.npz", "--dry-run"]) == 2
    assert capsys.readouterr().err == "error: --input: there is no file gone.npz\n  or a shape:  --input 1x3x224x224\n"


def test_a_file_of_another_kind(shop: dict[str, np.ndarray], capsys: Output) -> None:
    assert run(["fold", "w.pt", "--arch", "net.py:Net", "--input", "w.pt", "--dry-run"]) == 2
    assert "error: w.pt is no input that bnfix reads\n  a file .npy, .npz, .safetensors" in capsys.readouterr().err
