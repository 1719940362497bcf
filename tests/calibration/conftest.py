"""Both ways to park a forward."""

from __future__ import annotations

import pytest
from calib_nets import FIBERS

from bnfix.calibration.fibers import Guard


@pytest.fixture(params=["fibers", "threads"])
def parked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How forwards park: in fibers where they can, or in threads in any case."""
    kind: str = request.param
    if kind != FIBERS == "threads":
        pytest.skip("no fibers with this Python")
    if kind == "threads":
        monkeypatch.setattr(Guard, "possible", staticmethod(lambda: False))
    return kind
