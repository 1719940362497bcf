"""The demo: train, fold, export, verify, recalibrate; every command it shows is the command that it runs."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.cli.door import UsageError
from bnfix.errors import BnfixError, MissingDependencyError

if TYPE_CHECKING:
    from torch import nn

MARKER = ".made-by-bnfix-demo"
EPOCHS = 8
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
    try:
        return _steps(folder)
    except BaseException:
        if fresh:  # made a moment ago, by us: an interrupted demo leaves nothing
            shutil.rmtree(folder, ignore_errors=True)
        raise


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
        source = Path(__file__).with_name("digits_net.py").read_text(encoding="utf-8")
        (folder / "digits_net.py").write_text(source, encoding="utf-8")
    except OSError as error:
        raise BnfixError(f"{folder} can't be written: {error.strerror}") from error
    return fresh


def _steps(folder: str) -> int:
    from bnfix.cli import run
    from bnfix.cli.screen import working

    def path(name: str) -> str:
        return os.path.join(folder, name)

    began = time.monotonic()
    _say("1  A model with batch normalization, trained on 1437 handwritten digits")
    with working() as steps:
        steps("importing torch")
        import torch

        torch.set_num_threads(1)
        net = _load_module(Path(path("digits_net.py")))
        model = net.train(EPOCHS, steps)
        torch.save(model.state_dict(), path("digits.pt"))
        before = net.predictions(model)
    truth = net.labels()
    _say(f"   test accuracy {_accuracy(before, truth)} on {len(truth)} digits it never saw")
    _say(f"   saved as {path('digits.pt')}\n")

    arch = ["--arch", f"{path('digits_net.py')}:DigitsNet"]
    data = ["--data", f"{path('digits_net.py')}:batches"]
    commands = (
        ("2  What is this file? (read without torch, nothing unpickled)", ["info", path("digits.pt")]),
        ("3  Fold", ["fold", path("digits.pt"), *arch, *data, "-o", path("digits-folded.pt")]),
        ("4  Export", ["export", path("digits-folded.pt"), *arch, *data, "-o", path("digits-folded.onnx")]),
        (
            "5  Verify: does the ONNX file still compute what the trained model does?",
            ["verify", path("digits.pt"), path("digits-folded.onnx"), *arch, *data],
        ),
        (
            "6  Another scanner gives pale images: recalibrate on some of them, no labels needed",
            ["recalibrate", path("digits.pt"), *arch, "--data", f"{path('digits_net.py')}:pale_batches", "-o",
             path("digits-pale.pt")],
        ),
    )  # fmt: skip
    for title, argv in commands:
        _say(f"{title}\n\n$ {shlex.join(['bnfix', *argv])}")
        code = run(argv)
        _say("")
        if code:
            return code
    with working():
        import bnfix

        folded: nn.Module = bnfix.load(path("digits-folded.pt"), arch=arch[1])
        after = net.predictions(folded.eval())
        deployed = _run_onnx(path("digits-folded.onnx"), net.images().numpy())
        pale = net.pale(net.images())
        lost = net.predictions(model, pale)
        found = net.predictions(bnfix.load(path("digits-pale.pt"), arch=arch[1]), pale)
    changed = [sum(a != b for a, b in zip(before, other, strict=True)) for other in (after, deployed)]
    _say(f"The {len(truth)} test digits, in short:\n")
    _say(f"  as trained       accuracy {_accuracy(before, truth)}")
    _say(f"  folded           accuracy {_accuracy(after, truth)}, {changed[0]} predictions changed")
    _say(f"  in ONNX Runtime  accuracy {_accuracy(deployed, truth)}, {changed[1]} predictions changed")
    _say(f"  pale images      accuracy {_accuracy(lost, truth)} as trained, {_accuracy(found, truth)} recalibrated\n")
    _say(f"{time.monotonic() - began:.0f} s in all. The files stay in {folder}; every command above can be pasted.")
    return 0


def _load_module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("bnfix_demo_digits_net", file)
    if spec is None or spec.loader is None:
        raise BnfixError(f"{file} can't be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run_onnx(path: str, images: Any) -> list[int]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    scores = session.run(None, {session.get_inputs()[0].name: images})[0]
    return [int(i) for i in scores.argmax(axis=1)]


def _accuracy(predicted: list[int], truth: list[int]) -> str:
    right = sum(p == t for p, t in zip(predicted, truth, strict=True))
    return f"{100 * right / len(truth):.2f} %"


def _say(text: str) -> None:
    print(text, flush=True, file=sys.stdout)
