"""The demo: a Siamese network is lost in eval(), found, repaired and shipped; what it shows is what it runs."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from bnfix.cli.door import INTERRUPTED, TERMINATED, UsageError
from bnfix.errors import BnfixError, MissingDependencyError

MARKER = ".made-by-bnfix-demo"
NET = "siamese_net.py"
NEEDS = {"sklearn": "scikit-learn", "onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}


def play(folder: str) -> int:
    """Run the demo in ``folder``; the exit code of the first step that did not go well, or 0.

    Raises:
        MissingDependencyError: a package of the extra ``demo`` is absent.
        UsageError: ``folder`` holds something that is not the demo's.
    """
    for module, package in NEEDS.items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(package, "demo", "bnfix demo")
    fresh = _prepare(Path(folder))
    left = True  # until it is told that the end was another
    try:
        from bnfix.cli.demo.story import Story

        code = Story(folder).tell()
        left = code in (INTERRUPTED, TERMINATED)
        return code
    finally:
        if left and fresh:  # made a moment ago, by us: an interrupted demo leaves nothing
            shutil.rmtree(folder, ignore_errors=True)


def _prepare(folder: Path) -> bool:
    """Make ``folder`` ours; whether it was not there before."""
    if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is there already, and the demo did not make it", hint="bnfix demo --dir another-folder"
        )
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
        source = Path(__file__).with_name(NET).read_text(encoding="utf-8")
        (folder / NET).write_text(source, encoding="utf-8")
    except OSError as error:
        raise BnfixError(f"{folder} can't be written: {error.strerror}") from error
    return fresh
