"""Several models in one call: one table, one JSON document, the worst exit code, nobody stops the others."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_fakes import REFUSAL, FakeApi, parity

import bnfix
from bnfix.cli import run
from bnfix.errors import LoadError, PassError
from bnfix.types import Result

Output = pytest.CaptureFixture[str]
ROOT = Path(bnfix.__file__).parents[1]
ARCH = ["--arch", "shop_net.py:ShopNet", "--input", "2x3x24x24"]
AB = ["a.pt", "b.pt", "--arch", "x:y"]


@pytest.fixture
def two(api: FakeApi) -> FakeApi:
    """The verbs replaced, in a folder with ``a.pt`` and ``b.pt``."""
    for name in ("a.pt", "b.pt"):
        Path(name).write_bytes(name.encode())
    return api


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three sets of weights, a file that is cut and a pickled module; the test runs in it."""
    shutil.copy(ROOT / "examples" / "shop_net.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import shop_net

    state = shop_net.trained().state_dict()
    for name, factor in (("a.pt", 1.0), ("b.pt", 1.1), ("c.pt", 0.9)):
        torch.save({k: v * factor if v.is_floating_point() else v for k, v in state.items()}, name)
    Path("cut.pt").write_bytes(Path("a.pt").read_bytes()[:3000])
    return tmp_path


def folded(path: str, weights: str) -> float:
    """How far the folded file is from the float64 model of its weights, relative to the largest output."""
    import shop_net

    model = bnfix.load(path, arch="shop_net.py:ShopNet")
    original = bnfix.load(weights, arch="shop_net.py:ShopNet").double()
    x = shop_net.batches()[0]
    with torch.no_grad():
        expected = original(x.double())
        return float((model(x).double() - expected).abs().max() / expected.abs().max())


def test_each_goes_into_the_folder_and_one_that_fails_stops_nobody(shop: Path, capsys: Output) -> None:
    before = {name: Path(name).read_bytes() for name in ("a.pt", "b.pt", "cut.pt", "c.pt")}
    assert run(["fold", "a.pt", "cut.pt", "b.pt", "gone.pt", "c.pt", *ARCH, "-o", "out/"]) == 2
    out, err = capsys.readouterr()
    assert sorted(os.listdir("out")) == ["a.pt", "b.pt", "c.pt"]
    for name in ("a.pt", "b.pt", "c.pt"):  # each its own weights: those of another are off by 1e-2 and more
        assert folded(f"out/{name}", name) < 1e-5
    assert folded("out/a.pt", "b.pt") > 1e-2
    assert {name: Path(name).read_bytes() for name in before} == before
    rows = [line.split() for line in out.splitlines() if re.match(r"  [✓✗–] ", line)]
    assert [row[:2] for row in rows] == [["✓", "a.pt"], ["✗", "cut.pt"], ["✓", "b.pt"], ["✗", "gone.pt"], ["✓", "c.pt"]]
    assert rows[0][2:9] == ["folded", "3", "of", "4", "norms,", "kept", "1"]
    assert [row[-1] for row in rows if row[0] == "✓"] == ["out/a.pt", "out/b.pt", "out/c.pt"]
    assert "damaged zip archive" in " ".join(rows[1])
    assert "there is no file gone.pt" in " ".join(rows[3])
    assert "✗ folded 9 of 12 norms in 3 files, kept 3 · outputs within " in out
    assert "2 of 5 files failed: cut.pt, gone.pt" in out
    assert out.count("kept mix: ") == 1  # the same of all: said once
    # the errors with their next steps, as they came, and each step with its file
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: cut.pt is a damaged zip archive: it ends before its table of contents",
        "error: there is no file gone.pt",
    ]
    assert {"1/5 a.pt: loading ...", "3/5 b.pt: writing out/b.pt ...", "5/5 c.pt: loading ..."} <= set(err.splitlines())
    load = next(line for line in out.splitlines() if "load the first" in line).split("first", 1)[1].strip()
    names: dict[str, torch.nn.Module] = {}
    exec(load, names)
    assert names["model"].training is False


def test_one_json_document(shop: Path, capsys: Output) -> None:
    assert run(["fold", "a.pt", "cut.pt", "b.pt", *ARCH, "-o", "out", "--output-format", "json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["type"]) == (1, "list")
    values = document["values"]
    assert [v["type"] for v in values] == ["Result", "Failure", "Result"]
    assert [len(v["edits"]) for v in values if "edits" in v] == [3, 3]
    assert [v["run"]["subject"] for v in values] == ["a.pt", "cut.pt", "b.pt"]
    assert [v["run"]["written"] for v in values] == [["out/a.pt"], [], ["out/b.pt"]]
    assert values[0]["parity"]["passed"] is True
    assert (values[1]["path"], values[1]["hint"]) == ("cut.pt", "copy or download it again")
    assert values[1]["message"].startswith("cut.pt is a damaged zip archive")
    assert document["run"]["verdict"].endswith("1 of 3 files failed: cut.pt")


def test_concise_lines_begin_with_the_file(shop: Path, capsys: Output) -> None:
    assert run(["fold", "a.pt", "b.pt", *ARCH, "--dry-run", "--output-format", "concise"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["a.pt"] * 5 + ["b.pt"] * 5
    assert lines[-1].startswith("would fold 6 of 8 norms in 2 files")


def test_models_named_by_code_go_under_their_names(shop: Path) -> None:
    code = "shop_net.py:trained"
    assert run(["fold", code, "a.pt", *ARCH, "-o", "out/"]) == 2  # --arch is of no use to a model that is named
    assert sorted(os.listdir("out")) == ["a.pt"]
    assert run(["fold", code, "shop_net.py:ShopNet", "--input", "2x3x24x24", "-o", "out/"]) == 0
    assert sorted(os.listdir("out")) == ["ShopNet.pt", "a.pt", "trained.pt"]


# ------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(("bad", "code"), [((), 0), (("b.pt",), 2), (("a.pt", "b.pt"), 2)])
def test_the_worst_exit_code(
    two: FakeApi, monkeypatch: pytest.MonkeyPatch, bad: tuple[str, ...], code: int, capsys: Output
) -> None:
    opened = two.open_model

    def open_model(path: str, **kwargs: object) -> object:
        if path in bad:
            raise LoadError(f"{path} is broken", hint="mend it")
        return opened(path, **kwargs)

    monkeypatch.setattr(two, "open_model", open_model)
    assert run(["fold", *AB, "-o", "out/"]) == code
    assert os.path.isdir("out") == (len(bad) < 2)  # made with the first file that goes there
    assert capsys.readouterr().err.count("  mend it") == len(bad)


def test_require_all_is_asked_of_each(two: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    whole, kept = two.fold_result, replace(two.fold_result, refusals=(REFUSAL,))
    monkeypatch.setattr(two, "fold", lambda model, *a, **kw: kept if "a.pt" in model.name else whole)
    assert run(["fold", *AB, "-o", "out/", "--require-all"]) == 1
    out = capsys.readouterr().out
    assert os.listdir("out") == ["b.pt"]
    assert re.search(r"✗ a.pt +folded 1 of 2 norms, kept 1 · NOT written", out)
    assert "1 of 2 files NOT written: a.pt" in out
    assert "a.pt: kept head.bn: conv has 2 users" in out
    assert "note: a.pt: nothing was written" in out
    assert run(["fold", *AB, "-o", "out/"]) == 0
    assert sorted(os.listdir("out")) == ["a.pt", "b.pt"]


def test_a_proof_that_fails_for_one_writes_the_other(
    two: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    wrong = replace(two.fold_result, parity=parity("failed"))
    right = two.fold_result
    monkeypatch.setattr(two, "fold", lambda model, *a, **kw: wrong if "a.pt" in model.name else right)
    assert run(["fold", *AB, "-o", "out/"]) == 1
    assert os.listdir("out") == ["b.pt"]
    out = capsys.readouterr().out
    assert re.search(r"✗ a.pt +folded 1 of 1 norm · FAILED: output is 1.3 × .* · NOT written", out)
    assert "outputs within" not in out.split("✗ folded")[1]


def test_dry_run_of_several(two: FakeApi, capsys: Output) -> None:
    two.fold_result = Result(None, two.fold_result.edits, (), dry_run=True)
    assert run(["fold", *AB, "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "would fold 2 of 2 norms in 2 files" in out
    assert sorted(os.listdir()) == ["a.pt", "b.pt", "w.pt"]
    line = next(x.split("next")[1] for x in out.splitlines() if x.strip().startswith("next"))
    assert shlex.split(line) == ["bnfix", "fold", *AB, "-o", "folded/"]
    two.fold_result = Result(None, (), (REFUSAL,), dry_run=True)
    assert run(["fold", *AB, "--dry-run"]) == 0


def test_a_defect_in_one_is_told_and_the_others_go_on(
    two: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    opened = two.open_model

    def open_model(path: str, **kwargs: object) -> object:
        if path == "a.pt":
            raise ZeroDivisionError("division by zero")
        return opened(path, **kwargs)

    monkeypatch.setattr(two, "open_model", open_model)
    assert run(["fold", *AB, "-o", "out/"]) == 2
    out, err = capsys.readouterr()
    assert "error: a.pt: ZeroDivisionError: division by zero\n  this is a defect of bnfix" in err
    assert os.listdir("out") == ["b.pt"]
    assert "✗ a.pt" in out


def test_ctrl_c_ends_all_of_them(two: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(two, "fold", interrupted)
    assert run(["fold", *AB, "-o", "out/"]) == 130
    assert capsys.readouterr().out == ""
    assert not os.path.exists("out")


# ------------------------------------------------------------------------------- where they go


def test_in_place_writes_over_each(two: FakeApi) -> None:
    assert run(["fold", *AB, "--in-place"]) == 0
    assert [Path(name).read_bytes() for name in ("a.pt", "b.pt")] == [b"folded", b"folded"]


def test_one_model_may_go_into_a_folder_too(two: FakeApi, capsys: Output) -> None:
    """So that ``bnfix fold *.pt -o out/`` does the same however many files there are."""
    assert run(["fold", "a.pt", "--arch", "x:y", "-o", "out/"]) == 0
    assert os.listdir("out") == ["a.pt"]
    assert 'bnfix.load("out/a.pt"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*AB], "where should the 2 folded models go?\n  -o folded/      a folder"),
        ([*AB, "-o", "one.pt"], "-o one.pt is one file, and there are 2 models\n  -o folder/"),
        ([*AB, "-o", "w.pt"], "-o w.pt is one file, and there are 2 models"),
        ([*AB, "-o", "."], "a.pt is the input"),
        ([*AB, "-o", "no/such/folder/"], "mkdir -p"),
        (["a.pt", "sub/a.pt", "--arch", "x:y", "-o", "out/"], "a.pt and sub/a.pt would both be written to out/a.pt"),
        ([*AB, "-o", "out/", "--in-place"], "exclude each other"),
        ([*AB, "-o", "out/", "--input", "gone.npz"], "there is no file gone.npz"),
        ([*AB, "-o", "out/", "--arch-kw", "3"], "--arch-kw: "),
    ],
)
def test_what_is_wrong_with_the_call_is_known_before_any_work(
    two: FakeApi, capsys: Output, argv: list[str], said: str
) -> None:
    Path("sub").mkdir()
    Path("sub/a.pt").write_bytes(b"other")
    assert run(["fold", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert two.calls == []
    assert not os.path.exists("out")


def test_another_input_is_not_overwritten_through_a_link(two: FakeApi, capsys: Output) -> None:
    Path("out").mkdir()
    os.symlink("../b.pt", "out/a.pt")
    assert run(["fold", *AB, "-o", "out/"]) == 2
    assert "is the input" in capsys.readouterr().err
    assert Path("b.pt").read_bytes() == b"b.pt"


def test_the_forward_that_fails_on_one_is_named_with_it(two: FakeApi, capsys: Output) -> None:
    two.fails["fold"] = PassError("the model's forward failed on 1x3", hint="give another")
    assert run(["fold", *AB, "-o", "out/"]) == 2
    err = capsys.readouterr().err
    assert "error: a.pt: the model's forward failed on 1x3\n  give another\n" in err
    assert "error: b.pt: the model's forward failed on 1x3\n  give another\n" in err


# ------------------------------------------------------------------------------- info


def test_info_of_several_is_one_table(shop: Path, capsys: Output) -> None:
    import shop_net

    torch.save(shop_net.trained(), "whole.pt")
    assert run(["info", "a.pt", "cut.pt", "gone.pt", "whole.pt"]) == 2
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if re.match(r"  [✓✗–] ", line)]
    assert [row[:2] for row in rows] == [["✓", "a.pt"], ["–", "cut.pt"], ["✗", "gone.pt"], ["✓", "whole.pt"]]
    assert rows[0][-5:] == ["26", "4", "can", "be", "loaded"]
    assert "2 files can be loaded, 1 can't · 1 of 4 files failed: gone.pt" in out
    assert err == "error: there is no file gone.pt\n"
    assert run(["info", "a.pt", "cut.pt"]) == 1
    assert run(["info", "a.pt", "b.pt"]) == 0
    capsys.readouterr()
    assert run(["info", "gone.pt", "a.pt", "--output-format", "json"]) == 2
    values = json.loads(capsys.readouterr().out)["values"]
    assert [v["type"] for v in values] == ["Failure", "FileInfo"]


def test_what_is_dangerous_is_said_in_the_table(shop: Path, capsys: Output) -> None:
    Path("evil.pt").write_bytes(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    assert run(["info", "a.pt", "evil.pt"]) == 1
    out = capsys.readouterr().out
    assert "1 must not be loaded" in out
    assert "evil.pt: DANGEROUS posix.system" in out
