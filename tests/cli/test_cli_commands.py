"""What each command asks of the api, what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_fakes import EDIT, REFUSAL, FakeApi, Named, parity

from bnfix.cli import run
from bnfix.types import Result

Output = pytest.CaptureFixture[str]
W = Path("w.pt")


# ------------------------------------------------------------------------------------------ fold


def test_fold_writes_and_says_how_to_go_on(api: FakeApi, capsys: Output) -> None:
    code = run(["fold", "w.pt", "--arch", "timm:net", "--arch-kw", "num_classes=10", "-o", "my folded.pt"])
    out, err = capsys.readouterr()
    assert code == 0
    assert "✓ folded 1 of 1 norm" in out
    assert 'bnfix.load("my folded.pt", arch="timm:net", arch_kwargs={\'num_classes\': 10})' in out
    assert "bnfix export 'my folded.pt' --arch timm:net --arch-kw num_classes=10 -o 'my folded.onnx'" in out
    assert "note: took 'ema'" in out
    assert "note: assumed 1x3x8x8" in out
    assert err.splitlines()[:3] == ["loading w.pt ...", "step of examples ...", "a model that prints in its forward"]
    assert api.asked("open_model") == (
        ("w.pt",),
        {"arch": "timm:net", "arch_kwargs": {"num_classes": 10}, "trust": False},
    )
    args, kwargs = api.asked("fold")
    assert args == ("model of w.pt", ["call"])
    assert (kwargs["verify"], kwargs["dry_run"], kwargs["leave"]) == (True, False, "norm")
    assert api.asked("save")[1]["inplace"] is False


def test_the_next_line_is_a_command_that_parses(api: FakeApi, capsys: Output) -> None:
    run(
        [
            "fold",
            "w.pt",
            "--arch",
            "net.py:Net",
            "--input",
            "1x3x8x8",
            "--forward",
            "lambda m, b: m(b['x'])",
            "-o",
            "f.pt",
        ]
    )
    line = next(x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("next"))
    words = shlex.split(line.replace("next", "", 1))
    assert words[:3] == ["bnfix", "export", "f.pt"]
    api.calls.clear()
    assert run(words[1:]) == 0
    kwargs = api.asked("examples")[1]
    assert (kwargs["input"], kwargs["forward"]) == (["1x3x8x8"], "lambda m, b: m(b['x'])")


def test_leave_is_handed_on(api: FakeApi, capsys: Output) -> None:
    assert run(["fold", "w.pt", "--arch", "a:b", "--leave", "affine", "-o", "f.pt"]) == 0
    assert api.asked("fold")[1]["leave"] == "affine"
    assert run(["fold", "w.pt", "--arch", "a:b", "--leave", "nothing", "-o", "f.pt"]) == 2


def test_fold_with_refusals_is_done(api: FakeApi, capsys: Output) -> None:
    api.fold_result = replace(api.fold_result, refusals=(REFUSAL,))
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt"]) == 0
    assert "– head.bn" in capsys.readouterr().out
    assert Path("f.pt").exists()


def test_require_all_writes_nothing_where_a_norm_is_kept(api: FakeApi, capsys: Output) -> None:
    api.fold_result = replace(api.fold_result, refusals=(REFUSAL,))
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt", "--require-all"]) == 1
    assert "nothing was written" in capsys.readouterr().out
    assert not Path("f.pt").exists()
    api.fold_result = replace(api.fold_result, refusals=())
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt", "--require-all"]) == 0
    assert Path("f.pt").exists()


def test_a_fold_that_fails_its_proof_is_not_written(api: FakeApi, capsys: Output) -> None:
    api.fold_result = replace(api.fold_result, parity=parity("failed"))
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert not Path("f.pt").exists()


@pytest.mark.parametrize(("edits", "code"), [((EDIT,), 1), ((), 0)])
def test_dry_run_exits_1_if_it_would_change_something(api: FakeApi, capsys: Output, edits: tuple, code: int) -> None:
    api.fold_result = Result(None, edits, (REFUSAL,), dry_run=True)
    assert run(["fold", "w.pt", "--arch", "a:b", "--dry-run"]) == code
    assert sorted(os.listdir()) == ["w.pt"]
    assert ("would fold 1 of 2 norms" in capsys.readouterr().out) == bool(edits)
    assert api.asked("fold")[1]["dry_run"] is True


def test_no_output_is_a_usage_error_that_names_all_ways(api: FakeApi, capsys: Output) -> None:
    assert run(["fold", "w.pt", "--arch", "a:b"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: where should the folded model go?\n  -o folded.pt\n  --in-place  writes over MODEL\n"
        "  --dry-run   shows the plan only\n"
    )
    assert api.calls == []


@pytest.mark.parametrize("target", ["w.pt", "./w.pt", "link.pt"])
def test_the_input_is_never_overwritten_unasked(api: FakeApi, capsys: Output, target: str) -> None:
    os.symlink("w.pt", "link.pt")
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", target]) == 2
    assert "--in-place" in capsys.readouterr().err
    assert api.calls == []  # known before any work
    assert W.read_bytes() == b"weights"


@pytest.mark.parametrize("target", ["folded.h5", "folded", "folded.onnx"])
def test_an_ending_that_nothing_writes_is_known_before_any_work(api: FakeApi, capsys: Output, target: str) -> None:
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", target]) == 2
    assert f"error: -o: {target}: bnfix saves models as" in capsys.readouterr().err
    assert api.calls == []


def test_in_place(api: FakeApi) -> None:
    assert run(["fold", "w.pt", "--arch", "a:b", "--in-place"]) == 0
    assert W.read_bytes() == b"folded"
    assert api.asked("save")[1]["inplace"] is True


def test_a_pickled_module_loads_again_with_trust(api: FakeApi, capsys: Output) -> None:
    api.kind = "pickled_module"
    run(["fold", "w.pt", "--trust", "-o", "f.pt"])
    out = capsys.readouterr().out
    assert 'bnfix.load("f.pt", trust=True)' in out
    assert "bnfix export f.pt --trust -o f.onnx" in out


def test_weights_need_no_trust_though_it_was_given(api: FakeApi, capsys: Output) -> None:
    run(["fold", "w.pt", "--arch", "a:b", "--trust", "-o", "f.pt"])
    out = capsys.readouterr().out
    assert "trust" not in out.split("wrote")[1]


@pytest.mark.parametrize("entry", ["classes", "=3", "1a=3"])
def test_a_malformed_arch_kw(api: FakeApi, capsys: Output, entry: str) -> None:
    assert run(["fold", "w.pt", "--arch", "a:b", "--arch-kw", entry, "-o", "f.pt"]) == 2
    assert "--arch-kw: " in capsys.readouterr().err
    assert api.calls == []


def test_arch_kw_values(api: FakeApi) -> None:
    kw = ["n=10", "p=0.5", "flag=true", "off=None", "name=resnet", "sizes=(3, 4)", "x=a=b"]
    run(["fold", "w.pt", "--arch", "a:b", *(w for e in kw for w in ("--arch-kw", e)), "-o", "f.pt"])
    expected = {"n": 10, "p": 0.5, "flag": True, "off": None, "name": "resnet", "sizes": (3, 4), "x": "a=b"}
    assert api.asked("open_model")[1]["arch_kwargs"] == expected


# -------------------------------------------------------------------------------- export, verify


@pytest.mark.parametrize(("verdict", "code"), [("passed", 0), ("warned", 0), ("failed", 1), ("inconclusive", 3)])
def test_export_and_verify_end_with_the_verdict(api: FakeApi, capsys: Output, verdict: str, code: int) -> None:
    api.parity = parity(verdict)
    assert run(["export", "w.pt", "--arch", "a:b", "-o", "m.onnx"]) == code
    Path("m.onnx").write_bytes(b"onnx")
    assert run(["verify", "w.pt", "m.onnx", "--arch", "a:b"]) == code
    out = capsys.readouterr().out
    assert ("FAILED" in out) == (verdict == "failed")
    assert ("INCONCLUSIVE" in out) == (verdict == "inconclusive")


def test_an_export_that_failed_is_not_said_to_be_written(api: FakeApi, capsys: Output) -> None:
    """Though a file of that name was there before, it is not this export's."""
    Path("m.onnx").write_bytes(b"older")
    api.parity = parity("failed")
    assert run(["export", "w.pt", "--arch", "a:b", "-o", "m.onnx"]) == 1
    out = capsys.readouterr().out
    assert "✗ did not write m.onnx" in out
    assert "wrote" not in out
    assert "bnfix export w.pt --arch a:b --no-fold -o m.onnx" in out
    assert Path("m.onnx").read_bytes() == b"older"


def test_export_options(api: FakeApi, capsys: Output) -> None:
    run(
        [
            "export",
            "w.pt",
            "--arch",
            "a:b",
            "-o",
            "m.onnx",
            "--no-fold",
            "--opset",
            "17",
            "--static-batch",
            "--seed",
            "4",
        ]
    )
    args, kwargs = api.asked("export")
    assert args == ("model of w.pt", "m.onnx", ["call"])
    assert (kwargs["fold"], kwargs["opset"], kwargs["dynamic"]) == (False, 17, False)
    assert api.asked("examples")[1]["seed"] == 4
    out = capsys.readouterr().out
    assert "wrote" in out
    assert "bnfix verify w.pt m.onnx --arch a:b" in out


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["export", "timm:resnet50"], "-o resnet50.onnx"),
        (["export", "w.pt"], "-o w.onnx"),
        (["export", "w.pt", "-o", "m.pt"], "-o m.onnx"),
        (["export", "w.pt", "-o", "no/such/m.onnx"], "mkdir -p"),
    ],
)
def test_export_targets_are_checked_before_any_work(api: FakeApi, capsys: Output, argv: list[str], hint: str) -> None:
    assert run(argv) == 2
    assert hint in capsys.readouterr().err
    assert api.calls == []


def test_verify_takes_onnx_by_path_and_weights_by_architecture(api: FakeApi) -> None:
    Path("m.onnx").write_bytes(b"onnx")
    run(["verify", "w.pt", "m.onnx", "--arch", "a:b"])
    assert api.asked("verify")[0] == ("model of w.pt", "m.onnx", ["call"])
    api.calls.clear()
    Path("f.pt").write_bytes(b"other")
    run(["verify", "w.pt", "f.pt", "--arch", "a:b", "--arch-kw", "n=1"])
    assert api.asked("verify")[0][1] == "model of f.pt"
    opened = [(args, kw["arch"], kw["arch_kwargs"]) for name, args, kw in api.calls if name == "open_model"]
    assert opened == [(("w.pt",), "a:b", {"n": 1}), (("f.pt",), "a:b", {"n": 1})]
    api.calls.clear()
    run(["verify", "w.pt", "f.pt", "--arch", "a:b", "--arch-kw", "n=1", "--other-arch", "c:d"])
    assert [kw["arch_kwargs"] for name, _, kw in api.calls if name == "open_model"] == [{"n": 1}, {}]


def test_verify_that_failed_says_how_to_make_the_file_anew(api: FakeApi, capsys: Output) -> None:
    Path("m.onnx").write_bytes(b"onnx")
    api.parity = parity("failed")
    run(["verify", "w.pt", "m.onnx", "--arch", "a:b"])
    assert "bnfix export w.pt --arch a:b -o m.onnx" in capsys.readouterr().out


def test_input_and_data_exclude_each_other(api: FakeApi, capsys: Output) -> None:
    Path("m.onnx").write_bytes(b"onnx")
    assert run(["verify", "w.pt", "m.onnx", "--input", "1x3", "--data", "x.npy"]) == 2
    assert "exclude" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ info


def test_info_of_several_files_goes_on_after_an_error(api: FakeApi, capsys: Output) -> None:
    assert run(["info", "w.pt", "gone.pt", "w.pt"]) == 2
    out, err = capsys.readouterr()
    assert out.count("a state_dict") == 2
    assert err == "error: gone.pt: no such file\n  ls\n"


def test_info_json_is_one_document(api: FakeApi, capsys: Output) -> None:
    assert run(["info", "w.pt", "--output-format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "state_dict"
    assert run(["info", "w.pt", "w.pt", "--output-format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["values"]) == 2


def test_a_model_named_by_its_architecture_needs_no_file(api: FakeApi, capsys: Output) -> None:
    api.open_model = lambda path, **kw: SimpleNamespace(value=Named("m"), info=None, arch=path, notes=())  # type: ignore[method-assign]
    assert run(["fold", "timm:resnet18", "-o", "f.pt"]) == 0
    out = capsys.readouterr().out
    assert 'bnfix.load("f.pt", arch="timm:resnet18")' in out
    assert "bnfix export f.pt --arch timm:resnet18 -o f.onnx" in out
