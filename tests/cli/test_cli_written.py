"""What becomes of the files that a command writes: none of its inputs, and its last line says which were written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_fakes import FakeApi
from test_cli_ends import Closed
from test_cli_process import ENV

import bnfix.cli.several
from bnfix.cli import main, run
from bnfix.cli.door import Terminated

Output = pytest.CaptureFixture[str]
FOLD = ["fold", "w.pt", "--arch", "net.py:Net"]


@pytest.fixture
def inputs(api: FakeApi) -> FakeApi:
    """Beside ``w.pt`` the code ``net.py`` and the arrays ``d.safetensors``, and links to both that end as models do."""
    for name in ("net.py", "d.safetensors", "v.safetensors", "base.json"):
        Path(name).write_bytes(name.encode())
    Path("code.pt").symlink_to("net.py")
    Path("link.pt").symlink_to("d.safetensors")
    os.link("d.safetensors", "hard.pt")
    Path("out").mkdir()
    Path("out/w.pt").symlink_to("../d.safetensors")
    return api


# ---------------------------------------------------------------------------- no input is written over


@pytest.mark.parametrize(
    ("argv", "target", "option"),
    [
        ([*FOLD, "--data", "d.safetensors"], "d.safetensors", "--data d.safetensors"),
        ([*FOLD, "--data", "d.safetensors"], "./out/../d.safetensors", "--data d.safetensors"),
        ([*FOLD, "--data", "./d.safetensors"], "link.pt", "--data ./d.safetensors"),
        ([*FOLD, "--input", "1x3x8x8", "--input", "d.safetensors"], "hard.pt", "--input d.safetensors"),
        (FOLD, "code.pt", "--arch net.py:Net"),
        (["fold", "w.pt", "--arch", "net:Net"], "code.pt", "--arch net:Net"),
        (["fold", "net.py:Net"], "code.pt", "MODEL net.py:Net"),
        (["fold", "w.pt", "--arch", "a:b", "--data", "net.py:make"], "code.pt", "--data net.py:make"),
        (["swap", "w.pt", "--arch", "a:b", "--data", "d.safetensors"], "link.pt", "--data d.safetensors"),
        (["unshare", "w.pt", "--arch", "a:b", "--input", "d.safetensors"], "link.pt", "--input d.safetensors"),
        (["recalibrate", "w.pt", "--arch", "a:b", "--data", "d.safetensors"], "link.pt", "--data d.safetensors"),
        (["check", "w.pt", "--fix", "--data", "net.py:make", "--val-data", "d.safetensors"], "link.pt",
         "--val-data d.safetensors"),
        (["check", "w.pt", "--fix", "--against", "v.safetensors"], "v.safetensors", "--against v.safetensors"),
        (["fold", "w.pt", "v.safetensors", "--arch", "a:b", "--input", "d.safetensors"], "out/",
         "--input d.safetensors"),
    ],
)  # fmt: skip
def test_no_file_that_is_read_is_written_over(
    inputs: FakeApi, capsys: Output, argv: list[str], target: str, option: str
) -> None:
    assert run([*argv, "-o", target]) == 2
    shown = "out/w.pt" if target == "out/" else target
    assert capsys.readouterr().err == (
        f"error: {shown} is what {option} reads: it would be overwritten\n  name another file with -o\n"
    )
    assert not [name for name, _, _ in inputs.calls if name != "info"]
    assert Path("d.safetensors").read_bytes() == b"d.safetensors"
    assert Path("net.py").read_bytes() == b"net.py"


def test_an_export_too(inputs: FakeApi, capsys: Output) -> None:
    os.link("d.safetensors", "m.onnx")
    assert run(["export", *FOLD[1:], "--input", "d.safetensors", "-o", "m.onnx"]) == 2
    assert "m.onnx is what --input d.safetensors reads" in capsys.readouterr().err


def test_in_place_is_said_of_the_model_and_not_of_the_data(inputs: FakeApi, capsys: Output) -> None:
    argv = ["fold", "d.safetensors", "--arch", "net.py:Net", "--data", "link.pt", "--in-place"]
    assert run(argv) == 2
    assert "d.safetensors is what --data link.pt reads" in capsys.readouterr().err
    assert run([*FOLD, "--data", "d.safetensors", "--in-place"]) == 0
    assert Path("w.pt").read_bytes() == b"folded"


# ------------------------------------------------------------------ the last line says what was written


@pytest.mark.parametrize(
    ("end", "code", "word"), [(KeyboardInterrupt(), 130, "interrupted"), (Terminated(), 143, "terminated")]
)
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_after_the_file_is_in_place_says_so(
    api: FakeApi, capsys: Output, monkeypatch: pytest.MonkeyPatch, end: BaseException, code: int, word: str, there: bool
) -> None:
    """Where it comes right behind the move, before any line could take note of it."""
    if there:
        Path("f.pt").write_bytes(b"old")

    def save(model: object, path: str, **how: object) -> None:
        Path("beside").write_bytes(b"folded")
        os.replace("beside", path)
        raise end

    monkeypatch.setattr(api, "save", save)
    assert run([*FOLD, "-o", "f.pt"]) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"{word} after f.pt was written"
    assert Path("f.pt").read_bytes() == b"folded"


def test_before_that_nothing_was_written_and_the_old_file_is_no_proof(api: FakeApi, capsys: Output) -> None:
    Path("f.pt").write_bytes(b"old")
    api.fails["save"] = KeyboardInterrupt()
    assert run([*FOLD, "-o", "f.pt"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: nothing was written"


@pytest.mark.parametrize("argv", [[*FOLD, "--dry-run"], ["verify", "w.pt", "w.pt", "--arch", "a:b"]])
def test_of_files_nothing_is_said_where_none_was_asked_for(api: FakeApi, capsys: Output, argv: list[str]) -> None:
    api.fails["open_model"] = KeyboardInterrupt()
    assert run(argv) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize(("done", "said"), [(1, "out/a.pt was"), (2, "out/a.pt, out/b.pt were"),
                                            (4, "out/a.pt, out/b.pt, out/c.pt and 1 more were")])  # fmt: skip
def test_of_several_those_that_were_written(
    api: FakeApi, capsys: Output, monkeypatch: pytest.MonkeyPatch, done: int, said: str
) -> None:
    models = [f"{name}.pt" for name in "abcde"]
    for name in models:
        Path(name).write_bytes(b"weights")
    save = api.save

    def interrupted(model: object, path: str, **how: object) -> Path:
        if path == f"out/{models[done]}":
            raise KeyboardInterrupt
        return save(model, path, **how)

    monkeypatch.setattr(api, "save", interrupted)
    assert run(["fold", *models, "--arch", "a:b", "-o", "out/"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted after {said} written"
    assert len(os.listdir("out")) == done


def test_an_interrupt_in_the_report_comes_after_the_file(
    api: FakeApi, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bnfix.cli.several, "report", report)
    assert run([*FOLD, "-o", "f.pt"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted after f.pt was written"


def test_a_report_that_can_t_be_written_does_not_hide_the_file_that_was(
    api: FakeApi, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Closed(OSError(errno.ENOSPC, "No space left on device")))
        assert run([*FOLD, "-o", "f.pt"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: the report can't be written: No space left on device (f.pt was written)"
    assert Path("f.pt").read_bytes() == b"folded"


# ---------------------------------------------------------------------------------- after the last line

_LEAVING = """
import atexit, importlib.abc, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job hands on that it is ignored
from bnfix.cli import main

def slow():
    print("leaving", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.{name})
    time.sleep({seconds})

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "bnfix.cli.app":  # as torch does, when a command imports it
            atexit.register(slow)

{register}
sys.argv[1:] = {argv!r}
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("argv", "code"), [(["info", "w.bin"], 1), (["--version"], 0), (["fold", "gone.pt"], 2)])
def test_a_signal_after_the_last_line_ends_it_at_once_with_the_code_that_it_has(
    tmp_path: Path, name: str, argv: list[str], code: int
) -> None:
    """Exit handlers, such as torch's, would else show a traceback."""
    (tmp_path / "w.bin").write_bytes(b"<!DOCTYPE html><html></html>")
    source = _LEAVING.format(name=name, argv=argv, seconds=30, register="sys.meta_path.insert(0, Finder())")
    ended = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, cwd=tmp_path, env=ENV, timeout=25, check=False
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1] == "leaving"
    assert "Traceback" not in ended.stderr
    assert bool(ended.stdout) == (code != 2)


def test_while_python_is_taken_down_ctrl_c_is_ignored(tmp_path: Path) -> None:
    """Behind the last exit handler a signal would be death: 130 for what went well."""
    late = "class Late:\n    def __del__(self, kill=os.kill, me=os.getpid()): kill(me, 2)\nlate = Late()"
    source = _LEAVING.format(name="SIGINT", argv=["--version"], seconds=0, register=late)
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=ENV, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"bnfix {bnfix.__version__}\n"


def test_a_process_of_somebody_else_s_keeps_its_signals(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    terminate = signal.getsignal(signal.SIGTERM)
    registered: list[object] = []
    monkeypatch.setattr("atexit.register", registered.append)
    try:
        with pytest.raises(SystemExit):
            main(["info", "w.pt"])
        assert (signal.getsignal(signal.SIGINT), registered) == (before, [])
    finally:
        signal.signal(signal.SIGTERM, terminate)


def test_help_names_the_code_of_an_interrupt(api: FakeApi, capsys: Output) -> None:
    for command in ("check", "recalibrate", "swap", "unshare", "fold", "export", "verify"):
        assert run([command, "--help"]) == 0
        assert "130 interrupted" in " ".join(capsys.readouterr().out.split()), command
