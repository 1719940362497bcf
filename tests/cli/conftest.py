from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_fakes import FakeApi

import bnfix


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeApi:
    """The verbs replaced, in a folder of its own with a file ``w.pt``."""
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "bnfix.api", fake)
    monkeypatch.setattr(bnfix, "api", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNFIX_TRACEBACK", raising=False)
    Path("w.pt").write_bytes(b"weights")
    return fake
