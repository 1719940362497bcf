"""Bugs that people reported in public, made small: the right rule names the buggy code first, the fixed code is clean.

Each reproduction is what the thread describes, in a few lines that run; the fix is what the thread ended with, or what
it asks for.
"""

from __future__ import annotations

import re

import pytest
from public_bugs import bugs_data, bugs_files, bugs_frozen, bugs_loops, bugs_models, bugs_ranks  # noqa: F401
from public_bugs.bug import BUGS, Bug

each = pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name)


def test_the_table() -> None:
    assert len(BUGS) >= 30
    assert len({b.name for b in BUGS}) == len(BUGS)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", b.thread) for b in BUGS)
    assert len({b.code for b in BUGS}) >= 20


@each
def test_the_buggy_code_is_named_first(bug: Bug) -> None:
    said = bug.show(False)
    assert said.findings, said
    assert said.findings[0].code == bug.code, said
    assert said.findings[0].fix is not None


@each
def test_the_fixed_code_is_clean(bug: Bug) -> None:
    said = bug.show(True)
    assert said.clean, said
    assert bug.code in said.checked or bug.code.startswith("BN50"), said.skipped
    assert not said.by_code(bug.code)
