"""The story that bnfix began with, run as users run it: the example's own numbers say that it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_swoosh_is_named_and_repaired(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "examples" / "siamese_swoosh.py"), "--seeds", "1", "--steps", "200"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, "--out", str(tmp_path)], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    for who in ("watch, around the training", "check, with data"):
        assert any(line.startswith("BN303 error") for line in numbers["named"][who])
        assert f"\n{who}:\n  BN303 error" in run.stdout
    step, in_train, in_eval = numbers["curve"][-1]
    assert step == 200
    assert in_train < 0.25 < 0.6 < in_eval  # the same weights and triplets: 0.14 and 0.88 were seen
    ((lost, _),), ((healed, _),) = (numbers["cross_modal"][name] for name in ("as trained", "unshare + recalibrate"))
    assert lost == pytest.approx(in_eval, abs=1e-6)  # the curve ends in the model that is repaired
    assert lost > 0.4
    assert healed < 0.2
    for name in ("swoosh.png", "repairs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in run.stdout
