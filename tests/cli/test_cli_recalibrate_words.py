"""What ``bnfix recalibrate`` says: its help, its errors in words of the command line, its steps without a terminal."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer

from bnfix.cli import screen
from bnfix.cli.app import build
from bnfix.cli.team import Team
from bnfix.cli.wording import as_options

Output = pytest.CaptureFixture[str]


def test_examples_in_the_help_are_taken() -> None:
    from bnfix.cli.commands.recalibrate import EPILOG

    command: Any = typer.main.get_command(build()).commands["recalibrate"]  # type: ignore[attr-defined]
    lines = [shlex.split(line.strip("`")) for line in EPILOG.splitlines() if line.startswith("`")]
    assert len(lines) >= 4
    for words in lines:
        context = command.make_context("recalibrate", words[words.index("recalibrate") + 1 :])
        assert context.params["data"], words


@pytest.mark.parametrize(
    ("said", "here"),
    [
        ("both:  forward=lambda m, b: [m(v) for v in b[0]]", "both:  --forward 'lambda m, b: [m(v) for v in b[0]]'"),
        ("feed it:  forward=lambda m, b: m(b['x'])", "feed it:  --forward \"lambda m, b: m(b['x'])\""),
        ("include_frozen=True takes it", "--include-frozen takes it"),
        ("max_samples=… or method='population'", "--max-samples … or --method population"),
        ('not measured (certify="full")', "not measured (--certify full)"),
        ("spill_dir=, max_samples= make it exact", "--spill-dir, --max-samples make it exact"),
        ("leave out spill_dir, or set memory_budget", "leave out --spill-dir, or set --memory-budget"),
        ("leave it out:  mask=None", "leave it out:  no --mask"),
        ("shuffle, and train when needed; the method", "shuffle, and train when needed; the method"),
    ],
)  # fmt: skip
def test_arguments_are_named_as_options(said: str, here: str) -> None:
    assert as_options(said) == here


def test_counted_steps_are_few_lines_without_a_terminal(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = screen.Steps()
    for line in ("loading a.pt", "loading b.pt", *(f"norm {i}: layer{i}.bn" for i in range(160)), "writing c.pt"):
        steps(line)
    expected = ["loading a.pt ...", "loading b.pt ...", "norm 0: layer0.bn ...", "writing c.pt ..."]
    assert capsys.readouterr().err.splitlines() == expected
    monkeypatch.setattr(screen, "EVERY", 0.0)
    for i in range(3):
        steps(f"norm {i}: layer{i}.bn")
    assert len(capsys.readouterr().err.splitlines()) == 3
    quiet = screen.Steps(quiet=True)
    quiet("norm 1: bn")
    quiet.keep("method staged")
    assert capsys.readouterr().err == ""


def test_max_samples_are_of_all_processes_together() -> None:
    from bnfix.cli.commands.recalibrate import _share

    def shares(samples: int | None, world: int) -> list[int | None]:
        found = []
        for rank in range(world):
            crew = Team()
            crew.rank, crew.world = rank, world
            found.append(_share(samples, crew))
        return found

    assert shares(10, 4) == [3, 3, 2, 2]
    assert shares(10, 1) == [10]
    assert shares(None, 2) == [None, None]
