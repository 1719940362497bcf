"""What can't be done is said at the first step, for the reason that it has, and with a step that leads on."""

from __future__ import annotations

import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bnfix
from bnfix.cli import run
from bnfix.errors import LoadError, UntrustedModelError

Output = pytest.CaptureFixture[str]
NET = """
from torch import nn
def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
"""
LOADER = """
import torch
X = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 + 1
def make(): return [X[:12], X[12:]]
"""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("loader.py").write_text(LOADER)
    torch.save(net().state_dict(), "w.pt")
    return tmp_path


def failed(argv: list[str], capsys: Output) -> list[str]:
    """The error of a command and its hints, which may stand behind steps."""
    assert run(argv) == 2
    err = capsys.readouterr().err
    return err[err.index("error: ") :].splitlines()


START = ["recalibrate", "w.pt", "--arch", "net.py:net", "-o", "fixed.pt"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("more", [[], ["--trust"], ["--trust", "-o", "fixed.pt2"]])
def test_torchscript_can_t_be_recalibrated_and_its_class_can(shop: Path, capsys: Output, more: list[str]) -> None:
    torch.jit.script(net().eval()).save("script.pt")
    error, way, line = failed(["recalibrate", "script.pt", "--data", "loader.py:make", "-o", "f.pt", *more], capsys)
    assert error == "error: script.pt is a TorchScript program: a ScriptModule, whose run can't be observed"
    assert way.strip() == "save the state_dict of its Python class as weights.pt, and pass that class with it:"
    output = "fixed.pt2" if "-o" in more else "f.pt"
    assert line.strip() == (f"bnfix recalibrate weights.pt --arch net.py:Net --data loader.py:make -o {output}")
    torch.save(net().state_dict(), "weights.pt")
    offered = line.replace("net.py:Net", "net.py:net").replace(".pt2", ".pt")
    assert run(shlex.split(offered)[1:]) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_check_of_torchscript_offers_what_can_be_done(shop: Path, capsys: Output) -> None:
    stale = net().eval()
    stale.state_dict()["1.running_mean"].fill_(5)
    stale.state_dict()["1.num_batches_tracked"].fill_(1000)
    torch.jit.script(stale).save("script.pt")
    assert run(["check", "script.pt", "--trust", "--data", "loader.py:make", "--exit-zero"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "bnfix recalibrate" in x)
    assert line.split("bnfix ")[1] == (
        "recalibrate weights.pt --arch net.py:Net --data loader.py:make -o weights-recalibrated.pt"
    )


@pytest.mark.parametrize("content", ["state_dict", "module"])
def test_what_pickle_dump_wrote_is_not_called_what_no_model_needs(shop: Path, capsys: Output, content: str) -> None:
    with open("plain.pkl", "wb") as file:
        pickle.dump(net() if content == "module" else net().state_dict(), file)
    told = "tensors written by pickle.dump: each hides a pickle of its own, which loading would run unseen"
    again = "torch.save(pickle.load(open('plain.pkl', 'rb')), 'weights.pt')"
    with pytest.raises(UntrustedModelError) as caught:
        bnfix.load("plain.pkl", trust=True)
    assert caught.value.message == f"plain.pkl holds {told}. It is not loaded, whatever the flags."
    assert caught.value.hint == f"where you trust it, save it again:  {again}"
    assert run(["info", "plain.pkl"]) == 1
    assert told in " ".join(capsys.readouterr().out.split())
    exec(again, {"torch": torch, "pickle": pickle})
    arch = None if content == "module" else "net.py:net"
    assert torch.equal(bnfix.load("weights.pt", arch=arch, trust=True)[0].weight, net()[0].weight)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1",)


def test_beside_such_tensors_what_no_model_needs_is_called_that(shop: Path) -> None:
    with open("plain.pkl", "wb") as file:
        pickle.dump({"w": torch.zeros(2), "x": Evil()}, file)
    with pytest.raises(UntrustedModelError, match=r"names .*builtins\.eval: no model needs that"):
        bnfix.load("plain.pkl")


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"hello", "is no NumPy file: it begins with b'hello'"), (b"", "is empty")],
)
@pytest.mark.parametrize("name", ["bad.npy", "bad.npz"])
def test_what_is_no_array_holds_no_objects(shop: Path, capsys: Output, content: bytes, told: str, name: str) -> None:
    Path(name).write_bytes(content)
    assert failed([*START, "--data", name], capsys) == [
        f"error: {name} {told}",
        "  in Python:  np.save('x.npy', array)",
    ]
    with pytest.raises(LoadError, match=f"^{name} is "):
        bnfix.formats.load_input(name)


def test_what_holds_objects_is_called_that(shop: Path, capsys: Output) -> None:
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with open("pickled.npy", "wb") as file:
        pickle.dump([1], file)
    for name in ("objects.npy", "pickled.npy"):
        told = f"error: {name} holds Python objects, which bnfix does not unpickle"
        assert failed([*START, "--data", name], capsys) == [told]


def test_random_data_is_offered_to_the_commands_that_take_it(shop: Path, capsys: Output) -> None:
    error, forms, more = failed([*START, "--data", "w.pt"], capsys)
    assert error == "error: w.pt is no data that bnfix reads"
    assert "random" not in forms
    assert more == "  for fold, export and verify also  random:3x224x224"
    assert run(["fold", "w.pt", "--arch", "net.py:net", "--data", "random:3x12x12", "-o", "folded.pt"]) == 0


def test_only_fold_says_that_fresh_norms_have_nothing_to_fold_in(shop: Path, capsys: Output) -> None:
    told = "note: timm:test_resnet has the weights it was built with: no file was given\n"
    np.save("x.npy", np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32))
    assert run(["recalibrate", "timm:test_resnet", "--data", "x.npy", "-o", "r.pt"]) == 0
    out = capsys.readouterr().out
    assert told in out
    assert "fold in" not in out
    assert run(["fold", "timm:test_resnet", "--input", "2x3x32x32", "-o", "f.pt"]) == 0
    out = capsys.readouterr().out
    assert told in out
    assert "note: fresh norms have nothing to fold in\n" in out


@pytest.mark.parametrize("verb", ["recalibrate", "swap", "fold", "export", "check"])
def test_an_empty_data_is_not_none(shop: Path, capsys: Output, verb: str) -> None:
    """As of a variable of the shell that is not set."""
    output = [] if verb == "check" else ["-o", "f.onnx" if verb == "export" else "f.pt"]
    error, *forms = failed([verb, "w.pt", "--arch", "net.py:net", "--data", "", *output], capsys)
    assert error == "error: --data is empty"
    assert forms[0].startswith("  --data loader.py:make ")
    assert not Path("f.pt").exists()


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("timm:", "timm: names no model"),
        ("torchvision:", "torchvision: names no model"),
        ("timm:zqzqzqzq", "timm has no model 'zqzqzqzq'"),
    ],
)
def test_where_no_name_is_near_all_are_to_be_had(shop: Path, capsys: Output, arch: str, told: str) -> None:
    error, hint = failed(["fold", "w.pt", "--arch", arch, "-o", "f.pt"], capsys)
    assert error == f"error: {told}"
    line = hint.partition("all names:  ")[2]
    python, flag, code = shlex.split(line)
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert "resnet50" in capsys.readouterr().out.split()
