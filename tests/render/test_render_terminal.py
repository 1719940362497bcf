"""What a person reads in a terminal."""

from __future__ import annotations

import io
import re

import pytest
import rich
from render_values import ABOUT, EVERY, FEW, KEPT, LONG, MANY, PASSED
from rich.console import Console

from bnfix.render import About, render, to_rich
from bnfix.types import Edit, Refusal, Result


class Ascii(io.StringIO):
    encoding = "ascii"


def drawn(value: object, width: int = 80, *, terminal: bool = True, about: About | None = None, file=None) -> str:
    file = file or io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    render(value, "full", console, about)
    return file.getvalue()


@pytest.mark.parametrize("name", EVERY)
def test_in_80_columns(name: str, snapshot: object) -> None:
    assert drawn(EVERY[name]) == snapshot


def test_a_fold_as_the_command_ends_it(snapshot: object) -> None:
    assert drawn(MANY, about=ABOUT) == snapshot
    assert drawn(FEW, 120, about=ABOUT) == snapshot


def test_ascii_where_the_terminal_knows_nothing_else(snapshot: object) -> None:
    text = drawn(FEW, about=ABOUT, file=Ascii())
    assert text.isascii()
    assert text == snapshot


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("width", [72, 80, 100, 120])
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    """A line to paste may be: a break in it would be pasted too."""
    lines = [line for line in drawn(EVERY[name], width).splitlines() if not line.startswith("  next")]
    assert [line for line in lines if len(line) > width] == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_path_and_no_reason_is_cut(width: int) -> None:
    """Columns are read one by one, because a long path goes on in the next line of its own column."""
    lines = drawn(FEW, width).splitlines()
    rule = next(line for line in lines if set(line.strip()) == {"─", " "})
    columns = [m.span() for m in re.finditer("─+", rule)]
    texts = ["".join(line[a:b] for line in lines).replace(" ", "") for a, b in columns]
    assert any(f"{LONG}.norm" in text for text in texts)
    assert any(f"{LONG}.conv" in text for text in texts)
    for refusal in FEW.refusals:
        assert any(refusal.reason.replace(" ", "") in text for text in texts)


def test_piped_output_is_plain_and_not_wrapped() -> None:
    text = drawn(FEW, 40, terminal=False, about=ABOUT)
    assert "\x1b" not in text
    assert re.search(
        rf"✓ {re.escape(LONG)}\.norm +SyncBatchNorm\(128, eps=0.001\) +folded into {re.escape(LONG)}\.conv", text
    )


def test_colours_only_in_a_terminal_and_never_alone() -> None:
    file = io.StringIO()
    render(FEW, "full", Console(file=file, width=80, force_terminal=True, color_system="standard"))
    assert "\x1b[32m" in file.getvalue()
    plain = drawn(FEW)
    assert re.search(r"^  ✓ bn1 ", plain, re.M)
    assert re.search(r"^  – layer2\.bn ", plain, re.M)
    assert re.search(r"^  ✗ head\.bn@1 ", plain, re.M)


def test_every_refusal_is_shown_alike_ones_together() -> None:
    """Nine norms with one reason are one row that counts them; different reasons are never merged."""
    text = drawn(KEPT)
    assert text.count("its input is a concatenation") == 1
    assert "(9 norms)" in text
    many = Result(None, (), tuple(Refusal(f"m{n}.bn", f"reason {n}") for n in range(40)))
    text = drawn(many)
    assert all(f"m{n}.bn" in text and f"kept: reason {n}\n" in text for n in range(40))


def test_a_run_shows_its_worst_figures() -> None:
    edits = tuple(
        Edit("fold", f"a.{n}.bn", "BatchNorm2d(8)", "", (), (f"a.{n}.conv",), (), n / 100, n) for n in range(40)
    )
    text = drawn(Result(None, edits, (), PASSED))
    rows = re.findall(r"✓ a.*?\((\d+) norms\).*?(\d\.\d\d) +(\S+)$", text, re.M)
    assert sum(int(n) for n, _, _ in rows) == 40
    assert rows[-1][1:] == ("0.39", "39")


def test_a_users_text_is_no_markup() -> None:
    hostile = Refusal("[bold red]x[/]", "[link=http://a]:smile:[/link]")
    assert "[bold red]x[/]" in drawn(Result(None, (), (hostile,)))
    assert ":smile:" in drawn(Result(None, (), (hostile,)))


@pytest.mark.parametrize("format", ["full", "concise", "github", "markdown", "html"])
def test_a_name_from_a_file_gives_the_terminal_no_orders(format: str) -> None:
    """Clearing the screen, setting its title, turning text around: a tensor may be named so."""
    name = "\x1b[2J\x1b]0;owned\x07\u202egnp.\x9b31m\udcff"
    file = io.StringIO()
    value = Result(None, (), (Refusal(name, f"reason {name}"),))
    render(value, format, Console(file=file, width=200, color_system=None), About("bnfix fold", name, (name,)))  # type: ignore[arg-type]
    assert [c for c in file.getvalue() if not c.isprintable() and c != "\n"] == []
    assert "\\x1b[2J" in file.getvalue().replace("\\\\", "\\").replace("\\[", "[")


def test_values_draw_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    rich.print(KEPT)
    text = capsys.readouterr().out
    assert "kept: its input is a" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_verdict_that_is_no_pass_does_not_read_like_one() -> None:
    for name, word in (("parity-failed", "FAILED"), ("parity-nan", "FAILED"), ("parity-inconclusive", "INCONCLUSIVE")):
        verdict = drawn(EVERY[name], 500).splitlines()[-1]
        assert word in drawn(EVERY[name])
        assert not re.search(r"\bpassed|✓|\bwithin\b", verdict)


def test_a_fold_without_comparison_says_so() -> None:
    assert "outputs NOT compared" in drawn(Result(None, FEW.edits, ()), 200)


def test_a_value_without_page_is_an_error() -> None:
    with pytest.raises(TypeError, match="no page for a value of type int"):
        to_rich(3)
