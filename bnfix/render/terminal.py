"""Pages in a terminal: one table, one verdict, notes, and what to type next.

Where the output is no terminal nothing is wrapped and nothing coloured. What a colour says, a mark
says too; where the encoding has no such marks, ASCII stands in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnfix.render.page import About, Page, State
from bnfix.render.wrap import shares, wrap

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

MARKS: dict[State, str] = {
    "done": "✓", "kept": "–", "failed": "✗", "unsure": "?", "warned": "!", "told": "i", "plain": "",
}  # fmt: skip
STYLES: dict[State, str] = {
    "done": "green", "kept": "yellow", "failed": "bold red", "unsure": "magenta", "warned": "yellow", "told": "cyan",
    "plain": "",
}  # fmt: skip
_ASCII = str.maketrans(
    {
        "✓": "+",
        "–": "-",
        "✗": "x",
        "…": "...",
        "·": "|",
        "≤": "<=",
        "×": "x",
        "─": "-",
        "½": "1/2",
        "’": "'",
        "σ": "sd",
        "→": "->",
    }
)
GAP = "  "
LABEL = 16


def to_ascii(text: str) -> str:
    """``text`` with the signs that bnfix itself uses replaced; a user's own characters are escaped."""
    return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


class Drawn:
    """A page that rich can print: it looks at the console for width and encoding when it is drawn."""

    def __init__(self, page: Page, about: About) -> None:
        self.page = page
        self.about = about

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        soft = options.no_wrap and options.overflow == "ignore"  # printed with soft_wrap=True: nothing is cropped
        width = None if soft and not console.is_terminal else options.max_width
        for line in draw(self.page, self.about, width):
            if options.encoding.lower().replace("-", "") not in ("utf8", "utf16", "utf32"):
                line.plain = to_ascii(line.plain)
            line.no_wrap, line.overflow = True, "ignore"
            yield line


def draw(page: Page, about: About, width: int | None) -> list[Text]:
    """The page in lines of at most ``width`` characters (None: as long as they get)."""
    from rich.text import Text

    lines = [_head(page, about, width), Text()]
    if page.rows:
        prose = page.columns[-1].kind == "prose"
        lines += [*(_blocks if prose else _table)(page, width), Text()]
    mark = MARKS[page.state]
    verdict = " · ".join(page.verdict)
    lines += _hanging(f"{mark} ", verdict, STYLES[page.state] or "bold", width, bold=len(page.verdict[0]))
    every = ("every one by itself: --output-format concise",) if page.more else ()
    for detail in (*page.details, *every):
        lines += _hanging("  ", detail, "dim", width)
    for note in (*page.notes, *about.notes):
        lines += _hanging("  note: ", note, "", width)
    steps = [*(("wrote", path) for path in about.written), *page.next, *about.next]
    lines += [Text()] if steps else []
    room = max((len(label) for label, _ in steps if len(label) <= LABEL), default=0)
    for label, step in steps:  # never wrapped by us: it is there to be pasted
        style = "bold" if label != "wrote" else ""
        if len(label) > LABEL:  # on a line by itself, so that what is to be pasted begins near the margin
            lines += [Text(f"  {label}:", "dim"), Text.assemble("    ", (step, style))]
        else:
            lines.append(Text.assemble((f"  {label:<{room}}  ", "dim"), (step, style)))
    return lines


def _head(page: Page, about: About, width: int | None) -> Text:
    from rich.text import Text

    said = [about.command, about.subject] if about.command else [page.title]
    return Text("\n").join(_hanging("", " · ".join(filter(None, said)), "bold", width))


def _table(page: Page, width: int | None) -> list[Text]:
    from rich.text import Text

    columns = list(range(len(page.columns)))
    filled = [i for i in columns if any(row.cells[i] not in ("", "–") for row in page.rows)]
    natural = {i: max(len(page.columns[i].title), *(len(r.cells[i]) for r in page.rows)) for i in filled}
    marks = any(MARKS[row.state] for row in page.rows)
    lead = 4 if marks else 2
    if width is not None and lead + sum(natural.values()) + len(GAP) * (len(filled) - 1) > width:
        filled = [i for i in filled if page.columns[i].kind != "extra"]
    widths = [natural[i] for i in filled]
    if width is not None:
        wraps = [page.columns[i].kind != "number" for i in filled]
        widths = shares(widths, wraps, width - lead - len(GAP) * (len(filled) - 1))
    shown = list(zip(filled, widths, strict=True))
    lines = []
    if page.columns[0].title != "what":  # a list of facts needs no heading
        heads = [_set(page, i, page.columns[i].title, w) for i, w in shown]
        for head in (heads, ["─" * w for w in widths]):
            lines.append(Text((" " * lead + GAP.join(head)).rstrip(), "dim"))
    for row in page.rows:
        cells = [wrap(row.cells[i], w) for i, w in shown]
        for n in range(max(map(len, cells))):
            line = Text(f"  {MARKS[row.state] if n == 0 else '':<2}"[:lead], STYLES[row.state])
            parts = [
                Text(_set(page, i, cell[n] if n < len(cell) else "", w), _style(page, i, row.state))
                for (i, w), cell in zip(shown, cells, strict=True)
            ]
            line = Text.assemble(line, Text(GAP).join(parts))
            line.rstrip()
            lines.append(line)
    return lines


def _blocks(page: Page, width: int | None) -> list[Text]:
    """Rows that end in sentences, each under a heading made of its other cells."""
    lines: list[Text] = []
    for row in page.rows:
        *heads, prose = row.cells
        lead = f"  {MARKS[row.state]:<2}"
        if row.state == "done":  # what was done needs no explanation
            heads, prose = [*heads, prose], ""
        lines += _hanging(lead, GAP.join(filter(None, heads)), STYLES[row.state], width, bold=len(heads[0]))
        for paragraph in prose.split("\n"):
            lines += _hanging("      ", paragraph, "", width) if paragraph else []
    return lines


def _set(page: Page, column: int, text: str, width: int) -> str:
    return text.rjust(width) if page.columns[column].kind == "number" else text.ljust(width)


def _style(page: Page, column: int, state: State) -> str:
    kind = page.columns[column].kind
    if column == 0:
        return "dim" if page.columns[0].title == "what" and state == "plain" else ""
    return "dim" if kind in ("extra", "number") else STYLES[state]


def _hanging(lead: str, text: str, style: str, width: int | None, bold: int = 0) -> list[Text]:
    from rich.text import Text

    lines = wrap(text, max(width - len(lead), 20)) if width is not None else text.split("\n")
    drawn = [Text((lead if n == 0 else " " * len(lead)) + line, style) for n, line in enumerate(lines)]
    if bold:
        drawn[0].stylize("bold", 0, len(lead) + bold)
    return drawn
