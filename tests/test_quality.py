"""Lint and types, as part of the test run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.fx.config

ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_ruff() -> None:
    _run("ruff", "check", "bnfix", "tests", "examples")


@pytest.mark.skipif(
    not hasattr(torch.fx.config, "do_not_emit_stack_traces"), reason="types are checked against those of a newer torch"
)
def test_mypy() -> None:
    _run("mypy")
