"""What other programs read: JSON, grep, annotations, Markdown, HTML."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from render_values import ABOUT, EVERY, FEW, MANY, NAN, WEIGHTS
from rich.console import Console

from bnfix.render import FORMATS, About, render, render_all, to_concise, to_github, to_html, to_json, to_markdown
from bnfix.types import Refusal, Result

HOSTILE = Result(
    None, (), (Refusal("<script>alert(1)</script>|`x`", 'a "quoted" & <b>bold</b> reason\nline two, 5 % off'),)
)


def written(value: object, format: str, encoding: str = "utf-8", about: About | None = None) -> str:
    file = io.StringIO() if encoding == "utf-8" else type("File", (io.StringIO,), {"encoding": encoding})()
    render(value, format, Console(file=file), about)
    return file.getvalue()


@pytest.mark.parametrize("name", ["result-few", "parity-failed", "export", "file-evil"])
@pytest.mark.parametrize("format", ["concise", "github", "markdown", "json"])
def test_formats(name: str, format: str, snapshot: object) -> None:
    assert written(EVERY[name], format) == snapshot


@pytest.mark.parametrize("name", EVERY)
def test_json_is_the_value(name: str) -> None:
    assert json.loads(to_json(EVERY[name])) == json.loads(json.dumps(EVERY[name].to_dict()))


def test_json_is_stable_and_ascii() -> None:
    text = to_json(FEW, ABOUT)
    assert text.isascii()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert json.loads(text)["run"]["written"] == ["folded.pt"]
    assert json.loads(to_json(NAN))["outputs"][0]["noise_ratio"] == "nan"


def test_several_values_are_one_json_document() -> None:
    file = io.StringIO()
    render_all([WEIGHTS, WEIGHTS], "json", Console(file=file), [About(), About()])
    document = json.loads(file.getvalue())
    assert document["type"] == "list"
    assert [v["path"] for v in document["values"]] == ["weights.pt", "weights.pt"]
    file = io.StringIO()
    render_all([WEIGHTS], "json", Console(file=file), [About()])
    assert json.loads(file.getvalue())["type"] == "FileInfo"


def test_concise_has_one_line_for_each_norm() -> None:
    lines = to_concise(MANY, About(subject="w.pt")).splitlines()
    assert len(lines) == MANY.norms + 1
    assert lines[0] == "w.pt: bn1: BatchNorm2d(64, eps=1e-05) folded into conv1, gains bias (0.50 ulp, 0.9 x noise)"
    assert to_concise(HOSTILE).count("\n") == 1


def test_github_escapes_and_levels() -> None:
    lines = to_github(HOSTILE).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("::warning title=bnfix%3A <script>")
    assert lines[0].endswith("reason%0Aline two, 5 %25 off")
    assert [line.split()[0] for line in to_github(FEW).splitlines()] == [
        "::warning",
        "::warning",
        "::error",
        "::notice",
    ]


def test_markdown_cells_keep_to_themselves() -> None:
    row = next(line for line in to_markdown(HOSTILE).splitlines() if "script" in line)
    assert row.replace("\\|", "").count("|") == 7
    assert "<script>" not in row.replace("\\<", "")


class Checked(HTMLParser):
    """Fails on unbalanced tags; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "wbr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", EVERY)
def test_html_is_whole_and_fetches_nothing(name: str) -> None:
    page = Checked(written(EVERY[name], "html", about=ABOUT))
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "style", "object"})
    assert page.attributes <= {"style", "lang", "charset", "name", "content"}
    assert "url(" not in written(EVERY[name], "html")
    assert "timm:resnet50" in page.text


def test_html_escapes_what_a_user_named() -> None:
    page = Checked(to_html(HOSTILE, About("bnfix fold", "<img src=x onerror=alert(1)>.pt")))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "<script>alert(1)</script>|`x`" in page.text


def test_html_holds_every_norm_though_the_table_runs_them_together() -> None:
    text = Checked(to_html(MANY)).text
    assert all(f"{e.site}  {e.before}" in text for e in MANY.edits)
    assert MANY._repr_html_() == to_html(MANY)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_any_encoding_can_take_it(format: str, encoding: str) -> None:
    value = Result(None, FEW.edits, (Refusal("блок.bn", "свёртка × 2 …"),), FEW.parity)
    assert written(value, format, encoding).encode(encoding)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="no output format 'xml'"):
        render(FEW, "xml")  # type: ignore[arg-type]


def test_importing_render_is_cheap() -> None:
    code = "import sys, bnfix.render; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
