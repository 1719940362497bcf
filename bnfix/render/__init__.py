"""Values as people and programs read them: a terminal, JSON, HTML, Markdown, one line a fact, annotations.

Nothing here imports torch, and rich only where something is drawn for a terminal.

    >>> from bnfix.render import to_concise
    >>> from bnfix.types import Refusal, Result
    >>> print(to_concise(Result(None, (), (Refusal("layer1.bn", "conv has 2 users"),))))
    layer1.bn: kept: conv has 2 users
    folded 0 of 1 norm, kept 1
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from bnfix.errors import MissingDependencyError
from bnfix.render import page_html, text
from bnfix.render.json_text import dumped
from bnfix.render.legible import all_legible
from bnfix.render.page import About, Page
from bnfix.render.pages import page_of
from bnfix.types import SCHEMA_VERSION

if TYPE_CHECKING:
    from rich.console import Console

Format = Literal["full", "concise", "json", "github", "markdown", "html"]
FORMATS: tuple[str, ...] = get_args(Format)

__all__ = [
    "FORMATS",
    "About",
    "Format",
    "plot",
    "render",
    "to_concise",
    "to_github",
    "to_html",
    "to_json",
    "to_markdown",
    "to_rich",
    "to_text",
]


def plot(value: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """``value`` as a matplotlib figure, written to ``path`` (png, svg or pdf, by its suffix) if one is given.

    Raises:
        MissingDependencyError: matplotlib is not installed (the extra ``report``).
        TypeError: there is no picture of such a value.
        ValueError: another suffix.
        BnfixError: ``path`` can't be written.
    """
    import importlib

    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "a plot") from error
    from bnfix.render.plots import figure_of, write

    figure = figure_of(value)
    if path is not None:
        write(figure, path)
    return figure


def to_rich(value: Any, about: About | None = None) -> Any:
    """``value`` as something that ``rich.print`` draws; it reads width and encoding from the console."""
    from bnfix.render.terminal import Drawn

    return Drawn(_page(value, about), _about(about))


def to_text(value: Any, about: About | None = None, width: int = 100) -> str:
    """``value`` as plain text, lines of at most ``width`` characters (what is to be pasted stays whole); no colours."""
    from bnfix.render.terminal import draw

    page = _page(value, about)
    if not page.rows and about is None and len(page.lines) == 1:
        return " · ".join(page.verdict)
    return "\n".join(line.plain for line in draw(page, _about(about), width))


def to_html(value: Any, about: About | None = None) -> str:
    """``value`` as one HTML ``<div>``: inline styles, nothing fetched, all text escaped."""
    return page_html.fragment(_page(value, about), _about(about))


def to_json(value: Any, about: About | None = None) -> str:
    """``value.to_dict()`` as JSON with sorted keys, in ASCII; what was asked and written stands under ``run``."""
    return dumped(_document(value, about))


def _document(value: Any, about: About | None) -> dict[str, Any]:
    document: dict[str, Any] = value.to_dict()
    if about is not None:
        document["run"] = {**_run(about), "verdict": " · ".join(_page(value, about).verdict)}
    return document


def _run(about: About) -> dict[str, Any]:
    return {
        "command": about.command,
        "subject": about.subject,
        "written": list(about.written),
        "notes": list(about.notes),
        "next": [{"label": label, "line": line} for label, line in about.next],
    }


def to_concise(value: Any, about: About | None = None) -> str:
    """One line for each norm (or output, or fact), and one for the verdict."""
    return text.concise(_page(value, about), _about(about))


def to_github(value: Any, about: About | None = None) -> str:
    """Annotations of a GitHub workflow for all that was refused or failed, and for the verdict."""
    return text.github(_page(value, about), _about(about))


def to_markdown(value: Any, about: About | None = None) -> str:
    """A heading, the verdict, the table, the notes and the lines to paste."""
    return text.markdown(_page(value, about), _about(about))


def render(value: Any, format: Format = "full", console: Console | None = None, about: About | None = None) -> None:
    """Write ``value`` to ``console`` (standard output by default) in one of :data:`FORMATS`.

    Raises:
        ValueError: there is no such format.
    """
    if format == "json":
        _write(console or _standard(), to_json(value, about))
    else:
        _render(_page(value, about), _about(about), format, console or _standard())


def render_all(
    values: Sequence[Any], format: Format, console: Console, about: Sequence[About], overall: About | None = None
) -> None:
    """Write several values of one kind, or :class:`~bnfix.render.several.Failure` in their place, as one report.

    They are one table, a row each by the subject of its ``about``; as JSON one document, a list under ``values``.
    One value alone, without ``overall``, is written as :func:`render` does.
    """
    from bnfix.render.several import page_of_all

    if len(values) == 1 and overall is None:
        render(values[0], format, console, about[0])
    elif format == "json":
        listed = [_document(value, said) for value, said in zip(values, about, strict=True)]
        run = _run(overall or About()) | {"verdict": " · ".join(page_of_all(values, about).verdict)}
        _write(console, dumped({"schema_version": SCHEMA_VERSION, "type": "list", "values": listed, "run": run}))
    else:
        whole = _about(overall)
        said = replace(whole, subject="") if format == "concise" else whole  # its lines name their files already
        _render(page_of_all(values, about), said, format, console)


def _standard() -> Console:
    from rich.console import Console as RichConsole

    return RichConsole(soft_wrap=True)


def _render(page: Page, about: About, format: Format, console: Console) -> None:
    if format not in FORMATS:
        raise ValueError(f"no output format {format!r}; there are {', '.join(FORMATS)}")
    if format == "full":
        from bnfix.render.terminal import Drawn

        console.print(Drawn(page, about), soft_wrap=True)
    elif format == "html":
        _write(console, _encodable(page_html.document(page, about), console.encoding, "xmlcharrefreplace"))
    else:
        drawn = {"concise": text.concise, "github": text.github, "markdown": text.markdown}[format](page, about)
        _write(console, _encodable(drawn, console.encoding, "ascii"))


def _write(console: Console, written: str) -> None:
    console.file.write(written + "\n")
    console.file.flush()


def _page(value: Any, about: About | None) -> Page:
    page = page_of(value)
    if about is None or about.worded is None:
        return page
    return replace(page, verdict=tuple(map(about.worded, page.verdict)))


def _about(about: About | None) -> About:
    return all_legible(about or About())


def _encodable(written: str, encoding: str, otherwise: str) -> str:
    try:
        written.encode(encoding)
    except UnicodeEncodeError:
        if otherwise == "ascii":
            from bnfix.render.terminal import to_ascii

            return to_ascii(written)
        return written.encode(encoding, otherwise).decode(encoding)
    return written
