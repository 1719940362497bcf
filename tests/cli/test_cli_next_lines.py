"""The lines that a command offers for pasting work when they are pasted."""

from __future__ import annotations

import importlib.util
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_fakes import REFUSAL, FakeApi, info, parity
from torch import nn

from bnfix.cli import run
from bnfix.cli.typed import own, typing
from bnfix.errors import UntrustedModelError
from bnfix.types import FileInfo, Result

Output = pytest.CaptureFixture[str]
NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
"""
INPUT = ["--input", "2x3x8x8"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``a_net.py``, its weights ``a_net.pt`` and a pickled module ``whole.pt``; the test runs in it."""
    monkeypatch.chdir(tmp_path)
    Path("a_net.py").write_text(NET)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    nn.init.normal_(model[1].running_mean)
    torch.save(model.eval().state_dict(), "a_net.pt")
    torch.save(model, "whole.pt")
    return tmp_path


def offered(text: str) -> list[list[str]]:
    """Every command in what was printed, label or not, as a shell splits it."""
    found = [line[line.index("bnfix ") :] for line in text.splitlines() if "bnfix " in line and " · " not in line]
    return [words for words in map(shlex.split, found) if words[1] in ("fold", "export", "verify")]


def test_what_to_do_with_saved_weights_is_what_was_to_be_done() -> None:
    general = "safer: save model.state_dict() as weights.pt, then   bnfix fold weights.pt --arch n.py:N -o folded.pt"
    with typing(["unshare", "m.pt", "-o", "u.pt"]):
        assert own(general).endswith("then   bnfix unshare weights.pt --arch n.py:N -o u.pt")
        said = own(general.replace("then   ", "then: "))
        assert said.endswith("then: bnfix unshare weights.pt --arch n.py:N -o u.pt")
    with typing(["check", "m.pt", "--trust", "--ignore", "BN104"]):
        assert own(general).endswith("then   bnfix check weights.pt --arch n.py:N --ignore BN104")
    with typing(["check", "m.pt", "--arch", "mine.py:N"]):  # a person knows better than the file
        assert own(general).endswith("then   bnfix check weights.pt --arch mine.py:N")
    for same in (["fold", "m.pt"], ["info", "m.pt"], []):
        with typing(same):
            assert own(general) == general
    assert own(general) == general


def test_the_own_command_with_what_was_missing() -> None:
    general = "if you trust it   bnfix fold w.pt --trust -o w-folded.pt"
    with typing(["export", "w.pt", "--input=1x3", "-o", "my file.onnx"]):
        assert own(general) == "if you trust it   bnfix export w.pt --input=1x3 -o 'my file.onnx' --trust"
        which = "say which architecture, for example   bnfix fold w.pt --arch n.py:N --data n.py:batches -o f.pt"
        assert own(which).endswith("bnfix export w.pt --input=1x3 -o 'my file.onnx' --arch n.py:N")
        for other in ("safer   bnfix fold weights.pt --trust -o f.pt", "it's prose", "bnfix info w.pt", ""):
            assert own(other) == other
    with typing(["export", "w.pt", "--arch=a:b", "--trust"]):
        assert own(general) == general
    with typing(["info", "w.pt"]):
        assert own(general) == general
    assert own(general) == general


def test_an_error_gives_back_what_was_typed(api: FakeApi, capsys: Output) -> None:
    api.fails["open_model"] = UntrustedModelError("no", hint="if you trust it   bnfix fold w.pt --trust -o w-folded.pt")
    assert run(["export", "w.pt", "-o", "m.onnx", "--input", "1x3x8x8"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "  if you trust it   bnfix export w.pt -o m.onnx --input 1x3x8x8 --trust"


@pytest.mark.parametrize(
    "argv",
    [
        ["fold", "whole.pt", *INPUT, "-o", "f.pt"],
        ["fold", "a_net.pt", *INPUT, "-o", "f.pt"],
        ["fold", "whole.pt", *INPUT, "--dry-run"],
    ],
)
def test_the_command_in_an_error_works_as_it_is(here: Path, capsys: Output, argv: list[str]) -> None:
    assert run(argv) == 2
    words = offered(capsys.readouterr().err)[0]
    assert words[1 : len(argv) + 1] == argv
    assert run(words[1:]) == (1 if "--dry-run" in argv else 0)
    assert Path("f.pt").exists() == ("--dry-run" not in argv)


@pytest.mark.parametrize("file", ["whole.pt", "a_net.pt"])
def test_the_command_that_info_offers_works_as_it_is(here: Path, capsys: Output, file: str) -> None:
    assert run(["info", file]) == 0
    words = offered(capsys.readouterr().out)[0]
    assert run(words[1:]) == 0, words
    folded = file.replace(".pt", "-folded.pt")
    assert Path(folded).exists()
    capsys.readouterr()
    assert run(["info", folded]) == 0
    assert offered(capsys.readouterr().out)[0][1] == "export"  # nothing is left in it to fold


def test_the_load_line_is_python(here: Path, capsys: Output) -> None:
    assert run(["fold", "a_net.pt", "--arch", "a_net.py:Net", *INPUT, "-o", "f.pt"]) == 0
    line = next(x.split("load it")[1].strip() for x in capsys.readouterr().out.splitlines() if "load it" in x)
    names: dict[str, object] = {}
    exec(line, names)  # the point: it stands by itself
    assert isinstance(names["model"], nn.Module)


# ------------------------------------------------------------------------------ nothing was folded


def test_a_fold_of_nothing_writes_nothing_and_does_not_cheer(api: FakeApi, capsys: Output) -> None:
    api.fold_result = Result(api.fold_result.model, (), (REFUSAL,), parity())
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt"]) == 0
    out = capsys.readouterr().out
    assert "nothing was folded: f.pt was not written" in out
    assert "kept: conv has 2 users" in out
    assert "✓" not in out
    assert "load it" not in out
    assert sorted(os.listdir()) == ["w.pt"]
    assert "save" not in [name for name, _, _ in api.calls]
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt", "--require-all"]) == 1
    assert run(["fold", "w.pt", "--arch", "a:b", "--in-place"]) == 0
    assert "nothing was folded: w.pt is as it was" in capsys.readouterr().out
    assert Path("w.pt").read_bytes() == b"weights"


def test_a_file_that_was_there_stays_where_nothing_was_folded(api: FakeApi) -> None:
    api.fold_result = Result(api.fold_result.model, (), (), parity())
    Path("f.pt").write_bytes(b"older")
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt"]) == 0
    assert Path("f.pt").read_bytes() == b"older"


# --------------------------------------------------------------------------- known before any work


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_known_before_any_work(
    api: FakeApi, capsys: Output, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))
    assert run(["export", "w.pt", "--arch", "a:b", "-o", "m.onnx"]) == 2
    assert capsys.readouterr().err == f"error: exporting to ONNX needs {package}\n  pip install 'bnfix[onnx]'\n"
    assert api.calls == []
    if package != "onnxscript":
        Path("m.onnx").write_bytes(b"onnx")
        assert run(["verify", "w.pt", "m.onnx", "--arch", "a:b"]) == 2
        assert f"needs {package}" in capsys.readouterr().err
        assert {name for name, _, _ in api.calls} == {"info"}


@pytest.mark.parametrize("opset", ["0", "6", "-1", "999"])
def test_an_impossible_opset_is_known_before_any_work(api: FakeApi, capsys: Output, opset: str) -> None:
    pytest.importorskip("onnx")
    assert run(["export", "w.pt", "--arch", "a:b", "-o", "m.onnx", "--opset", opset]) == 2
    assert "--opset 18" in capsys.readouterr().err
    assert api.calls == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
@pytest.mark.parametrize("argv", [["fold", "w.pt", "-o", "/proc/x.pt"], ["export", "w.pt", "-o", "/proc/x.onnx"]])
def test_a_folder_that_only_says_it_can_be_written_is_known_before_any_work(
    api: FakeApi, capsys: Output, argv: list[str]
) -> None:
    assert run(argv) == 2
    assert "can't be written" in capsys.readouterr().err
    assert api.calls == []


def test_a_directory_as_target_is_called_one(api: FakeApi, capsys: Output) -> None:
    Path("adir").mkdir()
    assert run(["recalibrate", "w.pt", "--arch", "a:b", "--data", "w.pt", "-o", "adir"]) == 2
    assert f"adir is a directory: name a file in it, such as {Path('adir') / 'model.pt'}" in capsys.readouterr().err


def test_files_given_the_wrong_way_round_are_swapped(api: FakeApi, capsys: Output) -> None:
    Path("m.onnx").write_bytes(b"onnx")
    assert run(["verify", "m.onnx", "w.pt", "--arch", "a:b"]) == 2
    err = capsys.readouterr().err
    assert offered(err) == [["bnfix", "verify", "w.pt", "m.onnx", "--arch", "a:b"]]
    assert run(offered(err)[0][1:]) == 0


# ------------------------------------------------------------------------------- info as a gate


@pytest.mark.parametrize(
    ("fields", "code"),
    [({}, 0), ({"loadable": False}, 1), ({"loadable": False, "dangerous": ("os.system",)}, 1)],
)
def test_info_says_with_its_exit_code_whether_all_can_be_loaded(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], code: int
) -> None:
    Path("x.pt").write_bytes(b"x")

    def looked(path: str) -> FileInfo:
        return replace(info(path), **(fields if path == "x.pt" else {}))  # type: ignore[arg-type]

    monkeypatch.setattr(api, "info", looked)
    assert run(["info", "w.pt"]) == 0
    assert run(["info", "x.pt"]) == code
    assert run(["info", "w.pt", "x.pt", "w.pt"]) == code
