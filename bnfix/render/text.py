"""Pages as plain text for other programs: one line a fact, GitHub's annotations, Markdown."""

from __future__ import annotations

from bnfix.render.page import About, Page
from bnfix.render.terminal import MARKS

_LEVELS = {
    "failed": "error", "kept": "warning", "unsure": "warning", "warned": "warning", "told": "notice", "done": "notice",
    "plain": "notice",
}  # fmt: skip


def concise(page: Page, about: About) -> str:
    """Every fact on a line of its own, ``subject: site: what``; the verdict last. Made for ``grep``."""
    lead = f"{about.subject}: " if about.subject else ""
    lines = [f"{lead}{line.site}: {line.text}" for line in page.lines]
    wrote = [f"wrote {path}" for path in about.written]
    return "\n".join([*(" ".join(line.split()) for line in lines), lead + " · ".join((*page.verdict, *wrote))])


def github(page: Page, about: About) -> str:
    """Workflow commands: an annotation for each norm that was kept and each failure, and one for the verdict."""
    title = about.command or "bnfix"
    found = page.annotations or [line for line in page.lines if line.state in ("kept", "failed", "unsure")]
    lines = [_annotation(_LEVELS[line.state], f"{title}: {line.site}", line.text) for line in found]
    subject = f"{about.subject}: " if about.subject else ""
    level = "notice" if page.state == "kept" else _LEVELS[page.state]
    return "\n".join([*lines, _annotation(level, title, subject + " · ".join(page.verdict))])


def markdown(page: Page, about: About) -> str:
    """The page for a pull request, a wiki or a job summary."""
    head = " · ".join(filter(None, (about.command, about.subject))) or page.title
    lines = [
        f"### {_cell(head)}",
        "",
        f"**{_cell(page.verdict[0])}**" + "".join(f" · {_cell(v)}" for v in page.verdict[1:]),
    ]
    if page.rows:
        lines += ["", "| | " + " | ".join(_cell(c.title) for c in page.columns) + " |"]
        lines.append("| --- | " + " | ".join("---:" if c.kind == "number" else "---" for c in page.columns) + " |")
        lines += ["| " + " | ".join([MARKS[row.state], *map(_cell, row.cells)]) + " |" for row in page.rows]
    notes = [*page.details, *page.notes, *about.notes]
    lines += [""] + [f"- {_cell(note)}" for note in notes] if notes else []
    lines += [""] + [f"- wrote `{path}`" for path in about.written] if about.written else []
    if page.next or about.next:
        lines += ["", "```"] + [step for _, step in (*page.next, *about.next)] + ["```"]
    return "\n".join(lines)


def _annotation(level: str, title: str, message: str) -> str:
    escaped = _escape(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={escaped}::{_escape(message)}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _cell(text: str) -> str:
    for sign in "\\|*_`<>[]":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", "<br>")
