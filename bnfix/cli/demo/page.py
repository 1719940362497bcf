"""The story as a page of its own: nothing fetched, no script, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bnfix.render import About, to_html
from bnfix.render.pages import page_of
from bnfix.render.terminal import MARKS


@dataclass(frozen=True)
class Said:
    """What ``bnfix.watch`` (``verb`` is watch) or a command, typed as ``line``, has reported."""

    verb: str
    line: str
    value: Any
    about: About


@dataclass(frozen=True)
class Score:
    """How good a network is: a share of right ``answers``, its loss in eval(), and how many answers are new."""

    name: str
    accuracy: float
    loss: float | None
    changed: int | None
    answers: list[int]


@dataclass(frozen=True)
class Telling:
    """All that the page tells; ``curve`` holds step, loss in train() and loss in eval()."""

    curve: Sequence[tuple[int, float, float]]
    scores: Sequence[Score]
    said: Sequence[Said]


TITLE = "Fine in train(), lost in eval()"
NAMING = ("watch", "check")
LEAD = (
    "A Siamese network learns on digits: anchors as they are, positives and negatives inverted, one after the other "
    "through one encoder. In training, batch normalization normalizes each forward by itself. In evaluation it has one "
    "set of running statistics for all three, which fits none of them."
)


def document(telling: Telling) -> str:
    """A whole file."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="color-scheme" content="light dark"><title>{escape(TITLE)} · bnfix demo</title>',
        f"<style>\n{style}</style></head>\n<body><main>",
        f'<header><p class="brand">bnfix demo</p><h1>{escape(TITLE)}</h1><p class="lead">{escape(LEAD)}</p></header>',
        _tiles(telling),
        f"<figure>{swoosh(telling.curve)}<figcaption>The loss on the same unseen triplets after every tenth step, with "
        "the same weights, in both modes.</figcaption></figure>",
        _section("Named", "By a guard around the training loop, and from the file it left.", telling, NAMING),
        _section(
            "Repaired, without training",
            "Each call gets a norm of its own, with the same outputs to the bit; then each norm gets the statistics of "
            "what its call sees.",
            telling,
            ("unshare", "recalibrate"),
        ),
        _section(
            "Shipped",
            "The encoder with the norms of the anchors is folded, exported to ONNX, and the file is compared with the "
            "encoder before both.",
            telling,
            ("fold", "export", "verify"),
        ),
        "<section><h2>In short</h2>",
        _scores(telling),
        '<p class="soft">A low loss can also be a cheat, where the batches themselves give the answer away: that case, '
        "the other repairs and three seeds are in <code>examples/siamese_swoosh.py</code>.</p></section>",
        "</main></body>\n</html>\n",
    ]
    return "\n".join(parts)


def _tiles(telling: Telling) -> str:
    _, in_train, in_eval = telling.curve[-1]
    broken, repaired, *_, shipped = telling.scores
    tiles = (
        ("", f"{in_train:.2f}", "loss in train()", "at 1 nothing is learned"),
        ("bad", f"{in_eval:.2f}", "loss in eval()", f"5-NN accuracy {broken.accuracy:.1%}"),
        ("good", f"{repaired.loss or 0:.2f}", "loss in eval(), repaired", f"5-NN accuracy {repaired.accuracy:.1%}"),
        ("good", f"{shipped.changed}", "answers changed", f"of {len(shipped.answers)}, folded and in ONNX Runtime"),
    )
    told = (
        f'<div class="tile {state}"><b>{figure}</b><span>{escape(what)}</span><small>{escape(more)}</small></div>'
        for state, figure, what, more in tiles
    )
    return f'<div class="tiles">{"".join(told)}</div>'


def _section(title: str, lead: str, telling: Telling, verbs: Sequence[str]) -> str:
    cards = [_card(said, verb in NAMING) for verb in verbs for said in telling.said if said.verb == verb]
    return f"<section><h2>{escape(title)}</h2><p>{escape(lead)}</p>{''.join(cards)}</section>"


def _card(said: Said, opened: bool) -> str:
    page = page_of(said.value)
    state = "good" if page.state == "done" else "bad" if page.state == "failed" else ""
    verdict = f'<span class="verdict {state}">{MARKS[page.state]} {escape(page.verdict[0])}</span>'
    prompt = "" if said.verb == "watch" else "$ "
    typed = f'<pre class="typed">{prompt}{escape(said.line)}</pre>'
    return (
        f"<details{' open' if opened else ''}><summary><code>{'bnfix.' if said.verb == 'watch' else 'bnfix '}"
        f"{escape(said.verb)}</code>{verdict}</summary><div>{typed}{to_html(said.value, said.about)}</div></details>"
    )


def _scores(telling: Telling) -> str:
    rows = []
    for score in telling.scores:
        state = "bad" if score is telling.scores[0] else "good"
        loss = "" if score.loss is None else _bar(score.loss, f"{score.loss:.2f}", state)
        changed = "" if score.changed is None else f"{score.changed} of {len(score.answers)}"
        know = _bar(score.accuracy, f"{score.accuracy:.1%}", state)
        rows.append(f"<tr><th>{escape(score.name)}</th><td>{loss}</td><td>{know}</td><td>{changed}</td></tr>")
    titles = ("", "loss in eval()", "accuracy of the 5 nearest neighbours", "answers changed")
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    return f'<div class="wide"><table class="scores"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _bar(share: float, figure: str, state: str) -> str:
    return f'<span class="bar {state}"><i style="width:{100 * min(share, 1):.1f}%"></i></span><span>{figure}</span>'


# ------------------------------------------------------------------------------------- the picture

LEFT, RIGHT, TOP, BOTTOM, WIDE, HIGH = 48, 124, 10, 46, 860, 340


def swoosh(curve: Sequence[tuple[int, float, float]]) -> str:
    """Both losses by step, as SVG in the colours of the page."""
    last = max(curve[-1][0], 1)
    highest = 1.1 * max(1.0, *(max(point[1:]) for point in curve))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / last * (WIDE - LEFT - RIGHT),
            TOP + (1 - y / highest) * (HIGH - TOP - BOTTOM),
        )

    drawn = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        (x, y), (end, _) = at(0, tick), at(last, tick)
        kind = "limit" if tick == 1 else "grid"
        drawn.append(f'<line class="{kind}" x1="{x:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for part in range(5):
        x, y = at(last * part / 4, 0)
        drawn.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{last * part / 4:g}</text>')
    x, y = at(last / 2, 0)
    drawn.append(f'<text x="{x:.1f}" y="{y + 37:.1f}" text-anchor="middle">optimizer step</text>')
    x, y = at(last, 1)
    drawn.append(f'<text class="aside" x="{x + 10:.1f}" y="{y + 4:.1f}">nothing learned</text>')
    for which, mode, kind in ((2, "eval()", "bad"), (1, "train()", "blue")):
        points = [at(point[0], point[which]) for point in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        x, y = points[-1]
        drawn.append(
            f'<polyline class="{kind}" points="{path}"/><circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        )
        drawn.append(f'<text class="{kind}" x="{x + 10:.1f}" y="{y + 5:.1f}">{mode} {curve[-1][which]:.2f}</text>')
    told = f"Loss by step: {curve[-1][1]:.2f} in train(), {curve[-1][2]:.2f} in eval() after {last} steps"
    return f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(told)}">{"".join(drawn)}</svg>'
