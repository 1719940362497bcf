"""How a command ends: what goes to which stream, exit codes, interrupts, a standard output that takes nothing."""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path

import pytest
from cli_fakes import FakeApi

from bnfix.cli import run
from bnfix.cli.door import Terminated
from bnfix.errors import UntrustedModelError

Output = pytest.CaptureFixture[str]


def test_json_is_all_there_is_on_stdout(api: FakeApi, capsys: Output) -> None:
    """Although the model prints in its forward."""
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt", "--output-format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["type"] == "Result"
    assert document["run"]["written"] == ["f.pt"]


def test_an_error_is_a_line_and_its_hint_and_stdout_is_empty(api: FakeApi, capsys: Output) -> None:
    api.fails["open_model"] = UntrustedModelError(
        "model.pt is a pickled nn.Module (shop.net.Net): loading it can run any code inside.",
        hint="if you trust it   bnfix fold model.pt --trust\nsafer             save model.state_dict()",
    )
    assert run(["fold", "w.pt", "-o", "f.pt", "--output-format", "json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(
        "error: model.pt is a pickled nn.Module (shop.net.Net): loading it can run any code inside.\n"
        "  if you trust it   bnfix fold model.pt --trust\n"
        "  safer             save model.state_dict()\n"
    )


def test_an_error_gives_the_terminal_no_orders(api: FakeApi, capsys: Output) -> None:
    api.fails["open_model"] = UntrustedModelError("m.pt names \x1b]0;owned\x07", hint="\x1b[2J")
    assert run(["fold", "w.pt", "-o", "f.pt"]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "error: m.pt names \\x1b]0;owned\\x07\n  \\x1b[2J\n" in err


def test_a_defect_is_one_line_and_a_traceback_on_demand(
    api: FakeApi, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.fails["fold"] = ZeroDivisionError("division by zero\nsecond line")
    argv = ["fold", "w.pt", "--arch", "a:b", "-o", "f.pt"]
    assert run(argv) == 2
    err = capsys.readouterr().err
    assert "error: ZeroDivisionError: division by zero\n  this is a defect of bnfix" in err
    assert "Traceback" not in err
    assert run([*argv, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("BNFIX_TRACEBACK", "1")
    assert run(argv) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_value_error_about_what_was_typed_is_no_defect(api: FakeApi, capsys: Output) -> None:
    api.fails["examples"] = ValueError("'3xx8' is no shape")
    assert run(["fold", "w.pt", "--arch", "a:b", "--input", "3xx8", "-o", "f.pt"]) == 2
    err = capsys.readouterr().err
    assert "error: --input 3xx8: '3xx8' is no shape" in err
    assert "defect" not in err


@pytest.mark.parametrize("step", ["open_model", "examples", "fold", "save"])
@pytest.mark.parametrize(
    ("end", "code", "word"), [(KeyboardInterrupt(), 130, "interrupted"), (Terminated(), 143, "terminated")]
)
def test_an_interrupt_is_one_line(
    api: FakeApi, capsys: Output, step: str, end: BaseException, code: int, word: str
) -> None:
    api.fails[step] = end
    assert run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"{word}: nothing was written"
    assert "Traceback" not in err
    assert sorted(os.listdir()) == ["w.pt"]


@pytest.mark.parametrize("argv", [["fold", "gone.pt", "-o", "f.pt"], ["verify", "w.pt", "gone.onnx"]])
def test_a_missing_file_is_known_before_any_work(api: FakeApi, capsys: Output, argv: list[str]) -> None:
    assert run(argv) == 2
    assert "no such file" in capsys.readouterr().err
    assert [name for name, _, _ in api.calls] == ["info"]


def test_arguments_that_exclude_each_other_are_no_defect(api: FakeApi, capsys: Output) -> None:
    api.fails["open_model"] = ValueError("timm:a is an architecture: give a file of weights with arch")
    assert run(["fold", "timm:a", "--arch", "timm:a", "-o", "f.pt"]) == 2
    assert "defect" not in capsys.readouterr().err


@pytest.mark.parametrize("step", ["open_model", "examples"])
def test_a_script_that_ends_the_program_does_not_end_ours_with_0(api: FakeApi, capsys: Output, step: str) -> None:
    api.fails[step] = SystemExit(0)
    assert run(["fold", "w.pt", "--arch", "train.py:Net", "-o", "f.pt"]) == 2
    assert "__main__" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["fold"], ["fold", "w.pt", "--nonsense"], ["nonsense"], ["fold", "w.pt", "--output-format", "xml"], ["info"]],
)
def test_wrong_use_is_2(api: FakeApi, argv: list[str]) -> None:
    assert run(argv) == 2


def test_help_and_version_are_0(api: FakeApi, capsys: Output) -> None:
    import bnfix

    for argv in (["--help"], ["-h"], ["fold", "--help"], ["demo", "-h"]):
        assert run(argv) == 0
    capsys.readouterr()
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"bnfix {bnfix.__version__}\n"


@pytest.mark.parametrize("command", ["fold", "recalibrate", "export", "verify", "info", "demo"])
def test_help_teaches(api: FakeApi, capsys: Output, command: str) -> None:
    assert run([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Examples" in text
    assert "Exit codes" in text
    assert text.count(f"bnfix {command}") >= 2


def test_examples_in_help_parse(api: FakeApi) -> None:
    """Every line that the help offers for pasting is one that the command takes."""
    from bnfix.cli.commands import export, fold, info, verify

    for name in ("weights.pt", "model.pt", "folded.pt", "net.pt", "model.onnx"):
        Path(name).write_bytes(b"x")
    lines = [x.strip("`") for m in (fold, export, verify, info) for x in m.EPILOG.splitlines() if x.startswith("`")]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(
            line.split(" | ")[0].replace("epoch-*.pt", "weights.pt model.pt").replace("*.pt", "weights.pt")
        )
        words = ["1x3x8x8" if word == "inputs.npz" else word for word in words]  # as a file: test_cli_input_files.py
        assert run(words[1:]) in (0, 1), line


# ------------------------------------------------------------------------- when stdout can't take it


class Closed:
    """A standard output whose reader has left, or whose disk is full."""

    encoding = "utf-8"

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise ValueError("none")


@pytest.mark.parametrize("format", ["full", "json", "concise"])
def test_a_reader_that_left_changes_nothing(
    api: FakeApi, capsys: Output, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Closed(BrokenPipeError(errno.EPIPE, "Broken pipe")))
        code = run(["fold", "w.pt", "--arch", "a:b", "-o", "f.pt", "--output-format", format])
    assert code == 0
    assert Path("f.pt").exists()
    assert "rror" not in capsys.readouterr().err


def test_a_full_disk_under_the_report_is_an_error(
    api: FakeApi, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Closed(OSError(errno.ENOSPC, "No space left on device")))
        code = run(["info", "w.pt"])
    assert code == 2
    assert "the report can't be written: No space left on device" in capsys.readouterr().err
