"""Legitimate practice that looks like a fault: neither errors nor warnings."""

from __future__ import annotations

import pytest
from oddities import odd_loops, odd_models, odd_teachers  # noqa: F401
from oddities.oddity import ODDITIES, Oddity


def test_the_table() -> None:
    assert len(ODDITIES) >= 40
    assert len({o.name for o in ODDITIES}) == len(ODDITIES)


@pytest.mark.parametrize("oddity", ODDITIES, ids=lambda o: o.name)
def test_what_is_meant_stays_clean(oddity: Oddity) -> None:
    said = oddity.show()
    assert said.clean, said
    assert said.checked
