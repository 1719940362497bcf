"""``[tool.bnfix]``: found here or above, read as it stands, and every slip named."""

from __future__ import annotations

from pathlib import Path

import pytest
from rule_fakes import FAKES

from bnfix.errors import BnfixError
from bnfix.rules import Config, judging, read_config

WHOLE = """
[project]
name = "x"

[tool.bnfix]
select = ["BN9"]
ignore = ["BN904"]

[tool.bnfix.per-layer-ignores]
"backbone.*" = ["BN901", "BN902"]

[tool.bnfix.thresholds.BN902]
most = 1
"""


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "all_rules", lambda: FAKES)


def put(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return folder


def test_the_whole_table(tmp_path: Path) -> None:
    config = read_config(put(tmp_path, WHOLE))
    assert config.select == ("BN9",)
    assert config.ignore == ("BN904",)
    assert config.per_layer_ignores == {"backbone.*": ("BN901", "BN902")}
    assert config.thresholds == {"BN902": {"most": 1.0}}
    assert config.source == str(tmp_path.resolve() / "pyproject.toml")


def test_the_nearest_file_with_a_table_counts(tmp_path: Path) -> None:
    put(tmp_path, WHOLE)
    inner = put(tmp_path / "a" / "b", '[tool.ruff]\nline-length = 100\n[tool.other]\nx = "bnfix"\n')
    assert read_config(inner).ignore == ("BN904",)
    put(tmp_path / "a", '[tool.bnfix]\nignore = ["BN901"]\n')
    assert read_config(inner) == Config(ignore=("BN901",), source=str((tmp_path / "a").resolve() / "pyproject.toml"))


def test_no_table_is_no_wish(tmp_path: Path) -> None:
    assert read_config(put(tmp_path, "[project]\nname = 'x'\n")) == Config()


def test_a_broken_file_of_somebody_else_is_no_matter_of_ours(tmp_path: Path) -> None:
    put(tmp_path, "[tool.bnfix]\nselect = ['BN901']\n")
    inner = put(tmp_path / "in", "this is = = no toml")
    assert read_config(inner).select == ("BN901",)
    put(tmp_path / "in", "[tool.bnfix\nselect = 3")
    with pytest.raises(BnfixError, match="is no TOML"):
        read_config(inner)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("selct = []", "there is no key 'selct'\n.*did you mean select\\?\n.*keys: select, ignore, per-layer-ignores"),
        ("per_layer_ignores = {}", "did you mean per-layer-ignores"),
        ("select = 'BN901'", "select is a list of codes, not 'BN901'"),
        ("ignore = [1]", "ignore is a list of codes"),
        ("ignore = ['BN999']", "ignore: there is no rule 'BN999'"),
        ("per-layer-ignores = ['BN901']", "per-layer-ignores is a table"),
        ("[tool.bnfix.per-layer-ignores]\n'a.*' = ['BNX']", "per-layer-ignores 'a\\.\\*': there is no rule 'BNX'"),
        ("[tool.bnfix.per-layer-ignores]\n'a.*' = 'BN901'", "per-layer-ignores 'a\\.\\*' is a list of codes"),
        ("[tool.bnfix.thresholds]\nBN902 = 3", "thresholds of BN902 are names with numbers"),
        ("[tool.bnfix.thresholds.BN902]\nmosst = 3", "has no threshold 'mosst'\n.*did you mean most\\?\n.*most = 0.9"),
        ("[tool.bnfix.thresholds.BN902]\nmost = 'much'", "is a number, not 'much'"),
        ("[tool.bnfix.thresholds.BN902]\nmost = nan", "is a number, not nan"),
        ("[tool.bnfix.thresholds.BN777]\nmost = 3", "there is no rule 'BN777'"),
    ],
)
def test_a_slip_is_named_with_what_there_is(tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(BnfixError, match=said) as error:
        read_config(put(tmp_path, f"[tool.bnfix]\n{table}\n"))
    assert str(tmp_path) in error.value.message


def test_a_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BnfixError, match=r"tool\.bnfix is a table, not 3"):
        read_config(put(tmp_path, "[tool]\nbnfix = 3\n"))


def test_what_is_asked_on_the_spot_goes_before() -> None:
    config = Config(select=("BN1",), ignore=("BN104", "BN2"))
    assert config.before((), ()) == (("BN1",), ("BN104", "BN2"))
    assert config.before(("BN3",), ()) == (("BN3",), ("BN104", "BN2"))
    assert config.before((), ("BN301",)) == (("BN1",), ("BN104", "BN2", "BN301"))
    assert config.before(("BN1",), ()) == (("BN1",), ("BN104", "BN2")), "a family does not bring back what is ignored"
    assert config.before(("BN104",), ()) == (("BN104",), ("BN2",)), "naming a rule does"
    assert config.before(("BN204",), ("BN204",)) == (("BN204",), ("BN104", "BN204"))
