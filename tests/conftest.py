"""One thread, flags for long runs, and models whose statistics mean something."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# No timed assertions: on a busy machine the first example alone takes longer than Hypothesis allows.
settings.register_profile("bnfix", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("bnfix")

_FLAGS = {"slow": "--slow", "zoo": "--zoo"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")
    parser.addoption("--zoo", action="store_true", help="run every architecture of the zoo")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for marker, flag in _FLAGS.items():
            if marker in item.keywords and not config.getoption(flag):
                item.add_marker(pytest.mark.skip(reason=f"give {flag}"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
