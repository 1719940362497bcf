"""Both ways to park a forward."""

from __future__ import annotations

import pytest

from bnfix.calibration.fibers import Guard


@pytest.fixture(params=["fibers", "threads"])
def parked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How forwards park: in fibers where they can, or in threads in any case."""
    kind: str = request.param
    if kind == "threads":
        monkeypatch.setattr(Guard, "possible", staticmethod(lambda: False))
    return kind
