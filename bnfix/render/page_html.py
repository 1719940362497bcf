"""Pages as HTML: one piece, nothing fetched, everything escaped, readable on light and on dark."""

from __future__ import annotations

import re
from html import escape

from bnfix.render.page import About, Page, State
from bnfix.render.terminal import MARKS

# Mid tones: each stands out against white as well as against a dark notebook.
_COLOURS: dict[State, str] = {
    "done": "#1f9254",
    "kept": "#a8720a",
    "failed": "#de4545",
    "unsure": "#a45bd6",
    "warned": "#a8720a",
    "told": "#2f7fc1",
    "plain": "inherit",
}
_LINE = "1px solid rgba(128,128,128,.35)"
_MONO = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.92em"
_SANS = "font-family:system-ui,-apple-system,'Segoe UI',sans-serif"
_ROOT = f"{_SANS};font-size:14px;line-height:1.45;color:inherit;max-width:70em"
_CELL = f"padding:.25em .7em;border-bottom:{_LINE};vertical-align:baseline;text-align:left"
_NUMBER = (
    f"padding:.25em .7em;border-bottom:{_LINE};vertical-align:baseline;text-align:right;"
    "white-space:nowrap;font-variant-numeric:tabular-nums"
)


def fragment(page: Page, about: About) -> str:
    """A ``<div>`` for a notebook or another page."""
    head = " · ".join(filter(None, (about.command, about.subject))) or page.title
    parts = [f'<div style="{_ROOT}">', f'<div style="opacity:.75;margin:0 0 .2em">{escape(head)}</div>', _verdict(page)]
    if page.rows:
        parts.append(_table(page))
    if page.more:
        parts.append(_every(page))
    notes = [*page.details, *page.notes, *about.notes]
    if notes:
        items = "".join(f"<li>{escape(n)}</li>" for n in notes)
        parts.append(f'<ul style="margin:.6em 0;padding-left:1.3em;opacity:.85">{items}</ul>')
    steps = [*(f"# wrote {p}" for p in about.written), *(step for _, step in (*page.next, *about.next))]
    if steps:
        style = f"{_MONO};border:{_LINE};border-radius:6px;padding:.6em .8em;overflow-x:auto;margin:.6em 0"
        parts.append(f'<pre style="{style}">{escape(chr(10).join(steps))}</pre>')
    return "".join([*parts, "</div>"])


def document(page: Page, about: About) -> str:
    """A whole file, light or dark as the reader's system is."""
    title = escape(" · ".join(filter(None, (about.command or "bnfix", about.subject))))
    return (
        '<!doctype html>\n<html lang="en" style="color-scheme:light dark">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title></head>\n'
        f'<body style="margin:2em auto;padding:0 1em;max-width:70em">\n{fragment(page, about)}\n</body>\n</html>'
    )


def _verdict(page: Page) -> str:
    rest = "".join(f' <span style="opacity:.6">·</span> {_breakable(part)}' for part in page.verdict[1:])
    colour = _COLOURS[page.state]
    mark = f"{MARKS[page.state]} " if MARKS[page.state] else ""
    box = f"margin:0 0 .8em;padding:.5em .8em;border-left:4px solid {colour};background:rgba(128,128,128,.09)"
    return f'<div style="{box}"><strong style="color:{colour}">{mark}{escape(page.verdict[0])}</strong>{rest}</div>'


def _table(page: Page) -> str:
    used = [i for i in range(len(page.columns)) if any(row.cells[i] not in ("", "–") for row in page.rows)]
    heads = "".join(f'<th style="{_place(page, i)};font-weight:600">{escape(page.columns[i].title)}</th>' for i in used)
    head = f'<thead><tr style="background:transparent"><th style="{_CELL}"></th>{heads}</tr></thead>'
    rows = []
    for row in page.rows:
        mark = f"{_CELL};color:{_COLOURS[row.state]};text-align:center;font-weight:700"
        cells = "".join(f'<td style="{_style(page, i)}">{_breakable(row.cells[i])}</td>' for i in used)
        rows.append(f'<tr style="background:transparent"><td style="{mark}">{MARKS[row.state]}</td>{cells}</tr>')
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;color:inherit;margin:0;width:auto">'
        f"{'' if page.columns[0].title == 'what' else head}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _place(page: Page, column: int) -> str:
    return _NUMBER if page.columns[column].kind == "number" else _CELL


def _style(page: Page, column: int) -> str:
    path = page.columns[column].kind == "path" and page.columns[0].title != "what"
    return f"{_place(page, column)};{_MONO}" if path else _place(page, column)


def _breakable(text: str) -> str:
    """Escaped, and free to break after the dots of a long path."""
    text = text.replace("\n", " \n ")
    words = (escape(w) if len(w) < 24 else re.sub(r"(?<=[./_:])(?=\w)", "<wbr>", escape(w)) for w in text.split(" "))
    return " ".join(words).replace(" \n ", "<br>")


def _every(page: Page) -> str:
    lines = "\n".join(f"{MARKS[line.state] or ' '} {line.site}  {line.text}" for line in page.lines)
    return (
        f'<details style="margin:.6em 0"><summary style="cursor:pointer">all {len(page.lines)}, one by one</summary>'
        f'<pre style="{_MONO};overflow-x:auto;background:transparent;color:inherit">{escape(lines)}</pre></details>'
    )
