"""What the demo tells: trained, named, repaired, shipped; on the screen, and as a page at the end."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfix.cli import run
from bnfix.cli.demo import NET
from bnfix.cli.demo.chart import Curve, chart
from bnfix.cli.demo.page import Said, Score, Telling, document
from bnfix.cli.door import DONE, FAILED, leave_quietly
from bnfix.cli.options import OutputFormat
from bnfix.cli.screen import output, overheard, report, working
from bnfix.cli.written import untold
from bnfix.errors import BnfixError
from bnfix.files import atomic_path
from bnfix.render import About
from bnfix.render.terminal import to_ascii

if TYPE_CHECKING:
    from rich.text import Text

STEPS = 600
WATCHED = "with bnfix.watch(model) as w:\n    train(model)\nprint(w.report())"
BROKEN, REPAIRED, FOLDED, DEPLOYED = "as trained", "un-shared, recalibrated", "folded", "in ONNX Runtime"


@dataclass
class Story:
    """One telling, into ``folder``."""

    folder: str
    said: list[Said] = field(default_factory=list)
    """What watch and the commands have said so far."""
    scores: list[Score] = field(default_factory=list)

    def tell(self) -> int:
        """All of it; the exit code of the first command that did not end as it should, or 0."""
        began = time.monotonic()
        self._say("A Siamese network that is fine in train() and lost in eval()\n", "bold")
        self._say(
            "1  Train it on digits: anchors as they are, positives and negatives inverted, in three forwards\n", "bold"
        )
        with working() as steps:
            steps("importing torch")
            net, curve, found = self._train(steps)
        self._draw(curve)
        self._say("2  What was wrong with the loop? bnfix.watch was around it\n", "bold")
        for line in WATCHED.splitlines():
            self._say(f"{'...' if line.startswith(' ') else '>>>'} {line}")
        with overheard() as heard:
            report([found], OutputFormat.full, [About("bnfix.watch", NET)])
        self.said += [Said("watch", WATCHED, *heard[0])]
        self._say("")
        code = self._repair(net) or self._ship(net)
        if code:
            return code
        self._say("In short\n", "bold")
        self._say(f"  {'':<25}{'eval loss':>9}   accuracy of the 5 nearest neighbours")
        for score in self.scores:
            loss = "" if score.loss is None else f"{score.loss:.2f}"
            kept = "" if score.changed is None else f", {score.changed} of {len(net.labels())} answers changed"
            self._say(f"  {score.name:<25}{loss:>9}   {100 * score.accuracy:.2f} %{kept}")
        page = self._path("report.html")
        with atomic_path(page) as beside:
            Path(beside).write_text(document(Telling(curve, self.scores, self.said)), encoding="utf-8")
        self._say("\nA low loss can also be a cheat: examples/siamese_swoosh.py has that case and other repairs.")
        self._say(f"{time.monotonic() - began:.0f} s in all. Every command above can be pasted.")
        self._say(f"The story as a page, with the picture: {page}")
        return DONE

    def _train(self, steps: Any) -> tuple[Any, list[tuple[int, float, float]], Any]:
        """The module of the network, the curve, and what watch found."""
        import torch

        import bnfix

        net = _load_module(Path(self._path(NET)))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a network is slower on more
        try:
            torch.manual_seed(0)
            model = net.Siamese()
            with bnfix.watch(model) as w:
                curve = net.train(model, STEPS, steps)
        finally:
            torch.set_num_threads(threads)
        torch.save(model.state_dict(), self._path("siamese.pt"))
        self._score(BROKEN, net, net.anchor_encoder(model), net.eval_loss(model))
        return net, curve, w.report()

    def _draw(self, curve: Sequence[tuple[int, float, float]]) -> None:
        step, in_train, in_eval = curve[-1]
        lines = chart(
            [
                Curve(f"eval()  {in_eval:.2f}", [(x, y) for x, _, y in curve], "red", "#"),
                Curve(f"train() {in_train:.2f}", [(x, y) for x, y, _ in curve], "blue", "."),
            ],
            ticks=(0, 0.5, 1),
            unit="steps",
            dots=_draws_all(),
        )
        for line in lines:
            _print(line)
        self._say(
            "\n   The loss of the same weights on the same unseen triplets; at 1 nothing is learned. In train() each"
        )
        self._say("   forward is normalized by itself, in eval() by one set of running statistics for all three.")
        self._say(f"   Saved after {step} steps as {self._path('siamese.pt')}\n")

    def _repair(self, net: Any) -> int:
        import bnfix

        arch = ["--arch", f"{self._path(NET)}:Siamese", "--data", f"{self._path(NET)}:triplets"]
        trained, apart, repaired = (self._path(f"{name}.pt") for name in ("siamese", "unshared", "repaired"))
        title = "4  Repair it, without training: a norm for each call"
        code = (
            self._command("3  What is wrong with the file?", ["check", trained, *arch], FAILED)
            or self._command(title, ["unshare", trained, *arch, "-o", apart])
            or self._command("   ... with the statistics of its call", ["recalibrate", apart, *arch, "-o", repaired])
        )
        if code:
            return code
        with working():
            import torch

            model = bnfix.load(repaired, arch=arch[1])
            branch = net.anchor_encoder(model)
            torch.save(branch.state_dict(), self._path("encoder.pt"))
            self._score(REPAIRED, net, branch, net.eval_loss(model))
        return DONE

    def _ship(self, net: Any) -> int:
        import bnfix

        arch = ["--arch", f"{self._path(NET)}:Encoder", "--data", f"{self._path(NET)}:images"]
        encoder, folded, onnx = (self._path(f"encoder{name}") for name in (".pt", "-folded.pt", ".onnx"))
        title = f"5  Ship it: {encoder} is the encoder with the norms of the anchors"
        code = (
            self._command(title, ["fold", encoder, *arch, "-o", folded])
            or self._command("   ... as ONNX", ["export", folded, *arch, "-o", onnx])
            or self._command("   ... and the file compared with the encoder", ["verify", encoder, onnx, *arch])
        )
        if code:
            return code
        with working():
            self._score(FOLDED, net, bnfix.load(folded, arch=arch[1]).eval())
            self._score(DEPLOYED, net, _onnx(onnx))
        return DONE

    def _command(self, title: str, argv: list[str], expected: int = DONE) -> int:
        """Show a command and run it; 0 if it ended as ``expected``."""
        line = shlex.join(["bnfix", *argv])
        self._say(f"{title}\n", "bold")
        self._say(f"$ {line}")
        with overheard() as heard, untold():
            code = run(argv)
        self.said += [Said(argv[0], line, value, about) for value, about in heard]
        if expected != DONE and code == expected:
            self._say(f"  exit code {code}: a pipeline would stop here")
        self._say("")
        return DONE if code == expected else code or FAILED

    def _score(self, name: str, net: Any, embed: Any, loss: float | None = None) -> None:
        """How good ``embed`` is, and how many answers are others than those of the repaired encoder."""
        answers, truth = net.neighbours(embed), net.labels()
        right = sum(a == t for a, t in zip(answers, truth, strict=True)) / len(truth)
        before = next((s.answers for s in self.scores if s.name == REPAIRED), None)
        changed = None if before is None else sum(a != b for a, b in zip(answers, before, strict=True))
        self.scores.append(Score(name, right, loss, changed, answers))

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _say(self, text: str, style: str = "") -> None:
        from rich.text import Text

        _print(Text(text if _draws_all() else to_ascii(text), style))


def _print(text: Text) -> None:
    """A line as it is, in its colours where there is a terminal."""
    try:
        output().print(text, soft_wrap=True, highlight=False)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        leave_quietly()
        raise BnfixError(f"the story can't be written: {error.strerror}") from error


def _draws_all() -> bool:
    """Whether standard output takes more than ASCII."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def _load_module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("siamese_net", file)
    if spec is None or spec.loader is None:
        raise BnfixError(f"{file} can't be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _onnx(path: str) -> Any:
    """The ONNX file as a function of images."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
