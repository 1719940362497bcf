"""``bnfix demo``: the story it tells, the commands it shows, the page it leaves, and what it leaves alone."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import bnfix
from bnfix.cli import run
from bnfix.cli.demo import _prepare
from bnfix.cli.demo.chart import HEIGHT, WIDTH, Curve, chart
from bnfix.cli.demo.page import swoosh

Output = pytest.CaptureFixture[str]
FAILS = {"check"}  # errors are there to be found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which the demo ran, and what it said."""
    folder, before = tmp_path_factory.mktemp("demo"), os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert run(["demo"]) == 0
    finally:
        os.chdir(before)
    return folder, out.getvalue()


def test_the_network_is_lost_named_and_repaired(told: Any) -> None:
    """Seeds 0 to 2 gave 0.78 to 0.84 and 75 to 82 % as trained, 0.04 to 0.06 and 97 to 98 % repaired."""
    _, out = told
    in_eval, in_train = (float(re.findall(rf"{m}\(\) +(\d\.\d+)$", out, re.M)[0]) for m in ("eval", "train"))
    losses = {m[0]: float(m[1]) for m in re.findall(r"^  (as trained|un-shared, recalibrated) +(\d\.\d+) ", out, re.M)}
    assert in_train < 0.15 < 0.5 < in_eval
    assert losses["as trained"] == in_eval  # the curve ends in the model that is repaired
    assert losses["un-shared, recalibrated"] < 0.15
    lost, repaired, folded, deployed = (float(a) for a in re.findall(r"   (\d+\.\d+) %", out))
    assert lost + 10 < repaired
    assert 93 < repaired == folded == deployed
    assert out.count(", 0 of 597 answers changed") == 2


def test_watch_and_check_name_the_fault_in_their_own_words(told: Any) -> None:
    folder, out = told
    watched, checked = out.split("bnfix.watch · siamese_net.py")[1].split("bnfix check · bnfix-demo/siamese.pt")
    for said in (watched, checked):
        assert "✗ BN303 call-sites-differ" in said
        assert re.search(r"✗ \d errors?, .* · 4 norms", said)
    line = int(re.findall(r"bnfix-demo/siamese_net.py:(\d+)", watched)[0])
    source = (folder / "bnfix-demo" / "siamese_net.py").read_text(encoding="utf-8").splitlines()
    assert source[line - 1].strip().startswith("return self.net(anchor), self.net(positive)")
    assert "un-shared 4 of 4 shared norms · outputs in evaluation mode identical to the bit" in checked
    assert "recalibrated 12 of 12 norms on 1,280 samples" in checked
    assert "folded 3 of 4 norms, kept 1" in checked


def test_every_command_that_it_shows_can_be_pasted(told: Any, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = told
    monkeypatch.chdir(folder)
    shown = [shlex.split(line[2:]) for line in out.splitlines() if line.startswith("$ ")]
    assert [words[1] for words in shown] == ["check", "unshare", "recalibrate", "fold", "export", "verify"]
    for words in shown:
        assert run(words[1:]) == (1 if words[1] in FAILS else 0)
    arch = ["--arch", "bnfix-demo/siamese_net.py:Siamese", "--data", "bnfix-demo/siamese_net.py:triplets"]
    capsys.readouterr()
    run(["check", "bnfix-demo/repaired.pt", *arch, "--output-format", "json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert not [f for f in found if f["code"] in ("BN303", "BN204")]  # what was named is gone
    assert _prepare(Path("bnfix-demo")) is False  # its own folder may be used again, and is not taken away


def test_the_repaired_file_holds_what_was_measured(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the story, computed here from the file alone."""
    folder, out = told
    monkeypatch.chdir(folder / "bnfix-demo")
    monkeypatch.syspath_prepend(str(folder / "bnfix-demo"))
    monkeypatch.delitem(__import__("sys").modules, "siamese_net", raising=False)
    import siamese_net as net

    anchors, positives, negatives = net.Digits().triplets(1000, unseen=True)
    assert float((anchors.mean() + positives.mean()).detach()) == pytest.approx(1, abs=0.05)  # inverted
    model = bnfix.load("repaired.pt", arch="siamese_net.py:Siamese").eval()
    with torch.no_grad():
        a, p, n = (torch.nn.functional.normalize(v, dim=1) for v in model(anchors, positives, negatives))
    # distances with the eps of F.triplet_margin_loss
    value = ((a - p + 1e-6).norm(dim=1) - (a - n + 1e-6).norm(dim=1) + 1).clamp(min=0).mean().item()
    assert f"{'un-shared, recalibrated':<25}{value:>9.2f}" in out


class Tags(HTMLParser):
    """All tags and attributes, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(told: Any) -> None:
    folder, out = told
    text = (folder / "bnfix-demo" / "report.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == []
    assert not [t for t, a in tags.seen if t in ("script", "link", "img", "iframe") or "src" in a or "href" in a]
    assert "url(" not in text
    assert sum(t == "polyline" for t, _ in tags.seen) == 2
    for line in (x for x in out.splitlines() if x.startswith("$ ")):
        assert line in text.replace("&#x27;", "'").replace("&quot;", '"')
    for code in ("BN303", "BN102", "BN204"):
        assert code in text
    assert text.count("<details open>") == 2  # what names the fault; how it was repaired unfolds


def test_the_picture_is_drawn_to_scale() -> None:
    curve = [(0, 1.0, 1.0), (10, 0.5, 0.9), (20, 0.0, 1.0)]
    lines = re.findall(r'points="([^"]+)"', swoosh(curve))
    (in_eval, in_train) = ([tuple(map(float, p.split(","))) for p in line.split()] for line in lines)
    assert in_eval[0] == in_train[0]
    assert in_train[1][0] - in_train[0][0] == pytest.approx(in_train[2][0] - in_train[1][0], abs=0.11)  # .1 is written
    assert in_train[1][1] - in_train[0][1] == pytest.approx(5 * (in_eval[1][1] - in_eval[0][1]), abs=0.6)
    assert in_eval[2][1] == in_eval[0][1] < in_train[2][1]  # 0 is below 1


@pytest.mark.parametrize("dots", [True, False])
def test_the_chart_is_drawn_to_scale(dots: bool) -> None:
    falling = Curve("falls", [(0, 1.0), (100, 0.0)], "blue", ".")
    level = Curve("stays", [(0, 1.1), (100, 1.1)], "red", "#")
    lines = [line.plain for line in chart([level, falling], ticks=(0, 0.5, 1), unit="steps", dots=dots)]
    assert len(lines) == HEIGHT + 2
    assert lines[0].endswith(" stays")
    assert lines[HEIGHT - 1].endswith(" falls")
    assert lines[HEIGHT - 1].startswith("     0 ")
    assert max(map(len, lines)) == 8 + WIDTH + len(" stays")
    screen = [line[8 : 8 + WIDTH].ljust(WIDTH) for line in lines[:HEIGHT]]
    assert screen[0].strip() == screen[0]  # a level line fills its row
    places = [max(i for i, c in enumerate(row) if c != " ") for row in screen[1:]]
    assert places == sorted(places)  # a falling line goes to the right
    half = next(i for i, line in enumerate(lines) if line.startswith("   0.5 "))
    assert abs(places[half - 1] - WIDTH / 2) < WIDTH / HEIGHT  # and passes the middle half-way
    assert all(ord(c) < 128 for line in lines for c in line) is not dots


def test_a_spike_is_drawn_whole() -> None:
    """Steep parts are lines, not dots far from one another; and what is above the screen is cut off at its edge."""
    spike = Curve("x", [(0, 0.0), (50, 9.0), (51, 0.0), (100, 0.0)], "red", "#")
    lines = [line.plain[8:] for line in chart([spike], ticks=(0, 1), unit="steps", dots=False)[:HEIGHT]]
    assert all("#" in line for line in lines)


def test_without_utf8_it_is_told_in_ascii(capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from bnfix.cli.demo.story import Story

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        Story(str(tmp_path))._draw([(0, 1.0, 1.0), (10, 0.1, 0.9)])
    out.flush()
    text = out.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "eval()  0.90" in text
    assert "+---" in text


def test_it_touches_no_folder_that_it_did_not_make(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bnfix-demo").mkdir()
    Path("bnfix-demo/thesis.txt").write_text("mine")
    assert run(["demo"]) == 2
    assert "the demo did not make it" in capsys.readouterr().err
    assert os.listdir("bnfix-demo") == ["thesis.txt"]


def test_it_names_the_extra_that_it_needs(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "sklearn" else found(name, *a))
    assert run(["demo"]) == 2
    assert capsys.readouterr().err == "error: bnfix demo needs scikit-learn\n  pip install 'bnfix[demo]'\n"
    assert os.listdir() == []


@pytest.mark.parametrize("where", ["torch.save", "bnfix.api.unshare"])
def test_an_interrupt_leaves_nothing(
    where: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step of the demo's own, and in a command that it plays."""
    monkeypatch.chdir(tmp_path)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    monkeypatch.setattr(where, interrupted)
    monkeypatch.setattr("bnfix.cli.demo.story.STEPS", 100)
    assert run(["demo"]) == 130
    assert os.listdir() == []
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("error", "code", "said"), [(errno.EPIPE, 141, ""), (errno.ENOSPC, 2, "No space left")])
def test_a_standard_output_that_takes_nothing(
    error: int, code: int, said: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader left (``| head``), or the disk is full: said in a line, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(error, os.strerror(error))  # of the class that belongs to the number

    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Closed())
        assert run(["demo"]) == code
    assert os.listdir() == []
    err = capsys.readouterr().err
    assert said in err
    assert "defect" not in err
