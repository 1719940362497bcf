"""The house stands as it was drawn: floors, lazy doors, no file that nobody can read in one go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bnfix

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "bnfix").rglob("*.py"))


def test_imports_go_down_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_every_exported_name_resolves() -> None:
    assert sorted(bnfix.__all__) == bnfix.__all__
    for name in bnfix.__all__:
        assert getattr(bnfix, name) is not None


@pytest.mark.parametrize("statement", ["import bnfix", "import bnfix.types, bnfix.errors, bnfix.registry, bnfix.render",
                                       "import bnfix.formats; bnfix.formats.sniff"])  # fmt: skip
def test_cheap_imports_do_not_import_torch(statement: str) -> None:
    code = f"import sys; {statement}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.splitlines()}
    allowed = {"bnfix", "tests", "examples", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert {t for t in top if not t.startswith(".")} <= allowed
