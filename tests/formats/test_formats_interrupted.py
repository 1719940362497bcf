"""What ends a write is what is raised: torch's writers say something else, or end the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_nets import net
from torch import nn

from bnfix.errors import BnfixError, LoadError
from bnfix.files import check_apart
from bnfix.formats import save, torch_files
from bnfix.types import FileInfo


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "old.pt").write_bytes(b"old")
    return tmp_path / "old.pt"


def untouched(old: Path) -> bool:
    return old.read_bytes() == b"old" and os.listdir(old.parent) == ["old.pt"]


class Failing:
    """A file that raises ``error`` at the write number ``at``."""

    def __init__(self, path: Path, at: int, error: BaseException) -> None:
        self.file, self.left, self.error = path.open("wb"), at, error

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


class Ended(BaseException):
    """As the command line makes of SIGTERM."""


@pytest.mark.parametrize("at", [1, 2, 3, 20, 40, 60])
def test_what_ends_a_write_of_torch_is_what_is_raised(old: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """torch's writer itself says ``unexpected pos``, whatever it was."""
    error: BaseException
    monkeypatch.setattr(torch_files, "open", lambda path, mode: Failing(path, at, error), raising=False)
    for error in (KeyboardInterrupt(), Ended()):
        with pytest.raises(type(error)):
            save(net(), old)
        assert untouched(old)
    error = OSError(122, "Disk quota exceeded")
    with pytest.raises(BnfixError, match=r"old\.pt can't be written: Disk quota exceeded"):
        save(net(), old)
    assert untouched(old)


def test_an_interrupt_that_the_caller_deals_with_is_not_one_of_the_write(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is saved because Ctrl-C came, and the disk is full."""

    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(BnfixError, match="the disk is full, or files must not be that large"):
            save(net(), old)
    assert untouched(old)


class Reads(nn.Module):
    def __reduce__(self) -> Any:
        try:
            Path("not there").read_bytes()
        except OSError as error:
            raise RuntimeError("its table is gone") from error


def test_an_error_of_a_file_that_a_module_reads_is_not_one_of_the_target(old: Path) -> None:
    source = FileInfo("m.pt", "pickled_module", "zip", 1, "a module", True)
    with pytest.raises(LoadError, match="the module can't be saved: RuntimeError: its table is gone"):
        save(Reads(), old, source=source)
    assert untouched(old)


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_disk_that_fills_while_a_program_is_written(tmp_path: Path) -> None:
    """torch's writer of programs would end the process (SIGABRT), so this is one of its own."""
    target = str(tmp_path / "out.pt2")
    code = f"""
import resource, torch
from bnfix.errors import BnfixError
from bnfix.formats import save
from bnfix.running import Call

model = torch.nn.Linear(1000, 100).eval()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save(model, {target!r}, calls=[Call((torch.ones(2, 1000),))])
except BnfixError as error:
    print(error.message)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, f"{target} can't be written: File too large\n"), ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_seen_through_links_and_spellings(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old.parent)
    Path("soft").symlink_to("old.pt")
    os.link("old.pt", "hard")
    for target in (old, "soft", "hard", f"../{old.parent.name}/old.pt"):
        with pytest.raises(BnfixError, match=r" is what --data x reads: it would be overwritten"):
            check_apart(target, [("--data other", "gone"), ("--data x", "./old.pt")])
    check_apart("new.pt", [("--data x", "old.pt"), ("--data y", "new.pt")])  # not there: nothing to lose
    check_apart("a\0b", [("--data x", "old.pt")])
