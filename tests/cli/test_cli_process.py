"""The command as a process: what it imports, and how it meets pipes and signals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bnfix

ENV = {**os.environ, "PYTHONPATH": str(Path(bnfix.__file__).parents[1])}

HEAVY = "[m for m in ('torch', 'numpy', 'onnx', 'onnxruntime', 'sklearn', 'safetensors') if m in sys.modules]"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--help"], 0),
        (["fold", "--help"], 0),
        (["demo", "--help"], 0),
        (["--version"], 0),
        (["info", "w.bin"], 1),
        (["fold", "w.bin"], 2),
    ],
)
def test_help_and_info_import_nothing_heavy(argv: list[str], expected: int, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    code = f"import sys; from bnfix.cli import run; print('code', run({argv!r}), {HEAVY}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENV, check=True
    )
    assert done.stderr.splitlines()[-1] == f"code {expected} []"


def test_python_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bnfix", "--version"], capture_output=True, text=True, env=ENV, check=True
    )
    assert done.stdout.startswith("bnfix ")


def test_a_pipe_that_closes_is_quiet(tmp_path: Path) -> None:
    files = " ".join(["w.bin"] * 400)
    (tmp_path / "w.bin").write_bytes(b"<!DOCTYPE html><html></html>")
    shell = f"{sys.executable} -m bnfix info {files} --output-format concise | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=tmp_path, env=ENV, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_help_to_a_reader_that_leaves_is_quiet() -> None:
    shell = f"{sys.executable} -m bnfix --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=ENV, check=False, timeout=120)
    assert done.stdout.strip() in ("0", "141")  # 0: all of it went into the pipe before the reader left
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"<!DOCTYPE html><html></html>")
    shell = f"{sys.executable} -m bnfix info w.bin > /dev/full"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=tmp_path, env=ENV, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: the report can't be written: No space left on device"]


def test_every_public_name_resolves() -> None:
    assert sorted(bnfix.__all__) == bnfix.__all__
    for name in bnfix.__all__:
        assert getattr(bnfix, name) is not None
    assert set(bnfix.__all__) <= set(dir(bnfix))
