"""``bnfix check`` as a person uses it: what is read, what is told, how it ends. With rules of the tests' own."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rule_fakes import FAKES
from torch import nn

import bnfix
from bnfix.cli import run
from bnfix.rules import judging
from bnfix.types import Evidence, Finding

Output = pytest.CaptureFixture[str]
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum)
        self.head = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)))

def loader():
    torch.manual_seed(0)
    return [(torch.randn(8, 3, 8, 8), torch.zeros(8)) for _ in range(4)]
"""
ARCH = ["--arch", "a_net.py:Net"]
DATA = ["--data", "a_net.py:loader"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a class, healthy weights ``ok.pt``, weights ``nan.pt`` with NaN; the test runs in it."""
    monkeypatch.setattr(judging, "all_rules", lambda: FAKES)
    monkeypatch.setattr("bnfix.rules.all_rules", lambda: FAKES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "a_net", raising=False)
    Path("a_net.py").write_text(NET)
    import a_net

    torch.manual_seed(0)
    model = a_net.Net().eval()
    for norm in (model.bn, model.head):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    torch.save(model.state_dict(), "ok.pt")
    model.bn.running_var[1] = float("nan")
    torch.save(model.state_dict(), "nan.pt")
    return tmp_path


def report(capsys: Output) -> str:
    return capsys.readouterr().out


def test_a_healthy_file_is_clean_and_the_verdict_counts_what_was_not_checked(here: Path, capsys: Output) -> None:
    before = Path("ok.pt").read_bytes()
    assert run(["check", "ok.pt", *ARCH]) == 0
    out, err = capsys.readouterr()
    assert "✓ no error, no warning · 2 norms, 3 rules checked · NOT checked: 1 rule" in out
    assert "not checked: BN903: needs --data" in out
    assert "data=" not in out
    assert err.splitlines()[0] == "loading ok.pt ..."
    assert Path("ok.pt").read_bytes() == before
    assert sorted(p.name for p in Path().iterdir() if p.is_file()) == ["a_net.py", "nan.pt", "ok.pt"]


def test_a_finding_says_where_what_and_what_to_type(here: Path, capsys: Output) -> None:
    assert run(["check", "nan.pt", *ARCH]) == 1
    out = report(capsys)
    assert "✗ BN901 fake-nan  bn\n      1 norms hold NaN\n" in out
    assert "✗ 1 error · 2 norms" in out
    line = next(x for x in out.splitlines() if x.strip().startswith("fix BN901"))
    assert (
        line.split("  ", 2)[-1]
        .strip()
        .endswith("bnfix recalibrate nan.pt --arch a_net.py:Net --data train_images/ -o nan-recalibrated.pt")
    )
    assert "why        bnfix explain BN901" in out


def test_the_line_to_type_works_as_it_stands(here: Path, capsys: Output) -> None:
    assert run(["check", "nan.pt", *ARCH, *DATA, "--select", "BN901"]) == 1
    line = next(x for x in report(capsys).splitlines() if "bnfix recalibrate" in x)
    assert run(shlex.split(line[line.index("bnfix ") :])[1:]) == 0
    capsys.readouterr()
    assert run(["check", "nan-recalibrated.pt", *ARCH]) == 0


def test_the_input_is_no_matter_of_a_recalibration(here: Path, capsys: Output) -> None:
    run(["check", "nan.pt", *ARCH, "--input", "2x3x8x8"])
    line = next(x for x in report(capsys).splitlines() if "bnfix recalibrate" in x)
    assert "--input" not in line


def test_weights_without_an_architecture_are_judged_by_their_values(here: Path, capsys: Output) -> None:
    assert run(["check", "nan.pt"]) == 1
    out, err = capsys.readouterr()
    assert "BN901 fake-nan  bn" in out
    assert "note: values alone were judged: with --arch more can be said of this file" in out
    assert err.splitlines() == ["reading nan.pt ..."]
    assert "bnfix recalibrate nan.pt --arch a_net.py:Net" in out, "the class that lies beside it is proposed"


@pytest.mark.parametrize("more", [["--input", "1x3x8x8"], DATA, ["--fix", "-o", "f.pt"]])
def test_what_needs_the_model_asks_for_the_architecture(here: Path, capsys: Output, more: list[str]) -> None:
    assert run(["check", "nan.pt", *more]) == 2
    err = capsys.readouterr().err
    assert "of which architecture?" in err
    assert "--arch a_net.py:Net" in err


@pytest.mark.parametrize("kind", ["pickled", "program", "scripted", "spec", "safetensors", "lightning"])
def test_every_form_of_a_model(here: Path, capsys: Output, kind: str) -> None:
    import a_net
    from safetensors.torch import save_file

    model, x = a_net.Net(momentum=0.95).eval(), torch.randn(2, 3, 8, 8)
    argv = {
        "pickled": ["m.pt", "--trust"],
        "program": ["m.pt2"],
        "scripted": ["m.ts", "--trust", "--input", "2x3x8x8"],
        "spec": ["a_net.py:Net", "--arch-kw", "momentum=0.95"],
        "safetensors": ["m.safetensors", *ARCH, "--arch-kw", "momentum=0.95"],
        "lightning": ["m.ckpt", *ARCH, "--arch-kw", "momentum=0.95"],
    }[kind]
    if kind == "pickled":
        torch.save(model, "m.pt")
    elif kind == "program":
        torch.export.save(torch.export.export(model, (x,)), "m.pt2")
    elif kind == "scripted":
        torch.jit.script(model).save("m.ts")
    elif kind == "safetensors":
        save_file(model.state_dict(), "m.safetensors")
    elif kind == "lightning":
        state = {f"model.{k}": v for k, v in model.state_dict().items()}
        torch.save({"state_dict": state, "pytorch-lightning_version": "2.2", "epoch": 1}, "m.ckpt")
    assert run(["check", *argv, "--output-format", "concise"]) == 0
    out = report(capsys)
    assert "2 norms" in out.splitlines()[-1]
    if kind not in ("program", "scripted"):  # these hold no momentum any more
        assert re.search(r"bn: BN902 warning fake-momentum: momentum is 0\.95", out)


def test_torchscript_that_is_not_converted_is_judged_by_its_values(here: Path, capsys: Output) -> None:
    import a_net

    model = a_net.Net().eval()
    model.bn.running_var[0] = float("nan")
    torch.jit.trace(model, torch.randn(2, 3, 8, 8)).save("m.ts")
    assert run(["check", "m.ts", "--trust"]) == 1
    out = report(capsys)
    assert "BN901 fake-nan  bn" in out
    assert "note: values alone were judged: the graph of TorchScript takes --input\n" in out


def test_a_pickled_module_needs_trust(here: Path, capsys: Output) -> None:
    import a_net

    torch.save(a_net.Net(), "m.pt")
    assert run(["check", "m.pt"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "if you trust it   bnfix check m.pt --trust" in err


def test_weights_beside_objects_need_trust_and_need_no_architecture(here: Path, capsys: Output) -> None:
    import argparse

    torch.save({"model": torch.load("nan.pt", weights_only=True), "args": argparse.Namespace(lr=0.1)}, "ck.pt")
    assert run(["check", "ck.pt"]) == 2
    assert "if you trust it   bnfix check ck.pt --trust" in capsys.readouterr().err
    assert run(["check", "ck.pt", "--trust"]) == 1
    assert "BN901 fake-nan  bn" in report(capsys)


def test_a_file_that_would_run_system_code_is_never_loaded(here: Path, capsys: Output) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch owned",)

    torch.save({"w": Evil()}, "evil.pt")
    for argv in (["evil.pt"], ["evil.pt", "--trust"], ["ok.pt", "--against", "evil.pt", "--trust"]):
        assert run(["check", *argv]) == 2
        assert "loading it would run it" in capsys.readouterr().err
    assert not Path("owned").exists()


def test_an_average_beside_what_it_is_of(here: Path, capsys: Output) -> None:
    """``--against`` reaches the rules: the reference's norms, by the names of the model."""
    seen = []

    class Pair(FAKES[0].__class__):  # type: ignore[misc, name-defined]
        code, name, needs = "BN906", "fake-pair", ("norms", "against")

        def check(self, evidence: Evidence) -> Iterator[Finding]:
            seen.append((evidence.weights_moved, [n.path for n in evidence.against or ()]))
            yield from ()

    judging.all_rules = lambda: (Pair(),)  # type: ignore[assignment]
    assert run(["check", "ok.pt", "--against", "nan.pt"]) == 0
    assert run(["check", "ok.pt", *ARCH, "--against", "nan.pt"]) == 0
    assert run(["check", "a_net.py:Net", "--against", "nan.pt"]) == 0
    assert seen == [(False, ["bn", "head"]), (False, ["bn", "head"]), (True, ["bn", "head"])]


def test_several_files_are_one_table_and_none_stops_the_others(here: Path, capsys: Output) -> None:
    assert run(["check", "ok.pt", "nan.pt", "gone.pt", *ARCH]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"✓ ok\.pt +no error, no warning", out)
    assert re.search(r"✗ nan\.pt +1 error +BN901 fake-nan", out)
    assert re.search(r"✗ gone\.pt +error: there is no file gone\.pt", out)
    assert "nan.pt: BN901 fake-nan at bn: 1 norms hold NaN" in out
    assert "error: there is no file gone.pt" in err
    assert run(["check", "ok.pt", "nan.pt", *ARCH]) == 1
    assert run(["check", "ok.pt", "ok.pt", *ARCH]) == 0


def test_json_is_one_document_with_its_schema(here: Path, capsys: Output) -> None:
    assert run(["check", "nan.pt", *ARCH, "--output-format", "json"]) == 1
    document = json.loads(report(capsys))
    assert (document["type"], document["schema_version"]) == ("Diagnosis", 1)
    (finding,) = document["findings"]
    assert finding["fix"]["safety"] == "needs data"
    assert finding["fix"]["line"].startswith("bnfix recalibrate nan.pt --arch a_net.py:Net")
    assert document["run"]["subject"] == "nan.pt"
    assert run(["check", "nan.pt", "ok.pt", *ARCH, "--output-format", "json"]) == 1
    several = json.loads(report(capsys))
    assert [v["run"]["subject"] for v in several["values"]] == ["nan.pt", "ok.pt"]


@pytest.mark.parametrize("format", ["full", "concise", "github", "markdown", "html", "json"])
def test_every_format_is_whole_and_alone_on_standard_output(here: Path, capsys: Output, format: str) -> None:
    assert run(["check", "nan.pt", *ARCH, "--output-format", format]) == 1
    out, err = capsys.readouterr()
    assert "BN901" in out
    assert "loading" not in out
    assert "loading nan.pt" in err


# ------------------------------------------------------------------------------------------ how it ends


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["nan.pt"], 1),
        (["nan.pt", "--exit-zero"], 0),
        (["nan.pt", "--select", "BN902"], 0),
        (["nan.pt", "--ignore", "BN901"], 0),
        (["a_net.py:Net", "--arch-kw", "momentum=0.99"], 0),
        (["a_net.py:Net", "--arch-kw", "momentum=0.99", "--fail-on", "warning"], 1),
        (["ok.pt", "--select", "BN905"], 0),
        (["ok.pt", "--select", "BN905", "--fail-on", "info"], 1),
        (["ok.pt", "--fail-on", "info"], 0),
        (["ok.pt", "--require", "BN903"], 1),
        (["ok.pt", "--require", "BN901,BN902"], 0),
        (["ok.pt", "--require", "BN9"], 1),
        (["ok.pt", "--require", "BN903", "--exit-zero"], 0),
        (["ok.pt", "--require", "BN905"], 1),
        (["ok.pt", "--require", "BN901", "--ignore", "BN901"], 1),
    ],
)
def test_exit_codes(here: Path, argv: list[str], code: int) -> None:
    arch = [] if ":" in argv[0] else ARCH
    assert run(["check", *argv, *arch]) == code


def test_what_was_required_and_not_checked_is_named(here: Path, capsys: Output) -> None:
    assert run(["check", "ok.pt", *ARCH, "--require", "BN903,BN905"]) == 1
    out = report(capsys)
    assert "note: required, and NOT checked: BN903: needs --data" in out
    assert "note: required, and NOT checked: BN905: not selected" in out
    assert run(["check", "ok.pt", *ARCH, *DATA, "--require", "BN903"]) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ok.pt", "--select", "BN9O1"], ["--select: there is no rule 'BN9O1'", "near that: BN901 fake-nan"]),
        (["ok.pt", "--ignore", "momentum"], ["there is no rule 'MOMENTUM'", "near that: BN902 fake-momentum"]),
        (["ok.pt", "--require", "XX"], ["--require: there is no rule 'XX'", "all of them:   bnfix explain"]),
        (["ok.pt", "-o", "x.pt"], ["-o and --in-place are for what --fix writes", "bnfix check ok.pt -o x.pt --fix"]),
        (["ok.pt", "--fix"], ["where should the fixed model go?", "-o fixed.pt"]),
        (["ok.pt", "--data", "random:3x8x8"], ["--data random: gives noise", "--data loader.py:make"]),
        (["ok.pt", "--data", "gone.npy"], ["there is no file gone.npy", "--data loader.py:make"]),
        (["ok.pt", "--val-data", "a_net.py:loader"], ["--val-data is compared with --data", "--data"]),
        (["ok.pt", "--input", "gone.npz"], ["--input: there is no file gone.npz", "--input 1x3x224x224"]),
        (["ok.pt", "--against", "gone.pt"], ["there is no file gone.pt", ""]),
        (["ok.pt", "--baseline", "gone.json"], ["the baseline gone.json can't be read", "write one:"]),
        (["gone.pt"], ["there is no file gone.pt", ""]),
    ],
)
def test_wrong_use_is_one_line_and_what_to_do(here: Path, capsys: Output, argv: list[str], said: list[str]) -> None:
    assert run(["check", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert lines[0].startswith("error: ")
    assert said[0] in lines[0]
    assert said[1] in err


def test_codes_may_be_listed_with_commas_or_repeated_in_any_case(here: Path, capsys: Output) -> None:
    argv = ["check", "nan.pt", *ARCH, "--select", "bn902, BN904", "--select", "BN905", "--output-format", "json"]
    assert run(argv) == 0
    assert json.loads(report(capsys))["checked"] == ["BN902", "BN904", "BN905"]


def test_a_baseline_takes_out_what_was_known_and_counts_it(here: Path, capsys: Output) -> None:
    run(["check", "nan.pt", "ok.pt", *ARCH, "--output-format", "json"])
    Path("report.json").write_text(report(capsys))
    assert run(["check", "nan.pt", *ARCH, "--baseline", "report.json"]) == 0
    out = report(capsys)
    assert "note: 1 finding known from report.json, not told again" in out
    assert "1 ignored" in out
    Path("other.pt").write_bytes(Path("nan.pt").read_bytes())
    assert run(["check", "other.pt", *ARCH, "--baseline", "report.json"]) == 1, "of that file nothing was known"
    capsys.readouterr()
    run(["check", "nan.pt", *ARCH, "--output-format", "json"])
    Path("one.json").write_text(report(capsys))
    assert run(["check", "other.pt", *ARCH, "--baseline", "one.json"]) == 0, "a report on one model is for any"


def test_the_project_says_what_it_wants_and_options_go_before(here: Path, capsys: Output) -> None:
    Path("pyproject.toml").write_text(
        '[tool.bnfix]\nignore = ["BN901"]\n[tool.bnfix.per-layer-ignores]\n"he*" = ["BN902"]\n'
        "[tool.bnfix.thresholds.BN902]\nmost = 0.05\n"
    )
    os.mkdir("in")
    assert run(["check", "nan.pt", *ARCH, "--output-format", "json"]) == 0
    document = json.loads(report(capsys))
    assert [(f["code"], f["sites"]) for f in document["findings"]] == [("BN902", ["bn"])]
    assert [(f["code"], f["sites"]) for f in document["ignored"]] == [("BN902", ["head"])]
    assert document["run"]["notes"] == ["rules and thresholds as pyproject.toml says"]
    assert run(["check", "nan.pt", *ARCH, "--select", "BN901"]) == 1
    assert run(["check", "nan.pt", *ARCH, "--ignore", "BN902", "--fail-on", "info"]) == 0
    Path("pyproject.toml").write_text("[tool.bnfix]\nignored = []\n")
    capsys.readouterr()
    assert run(["check", "nan.pt", *ARCH]) == 2
    err = capsys.readouterr().err
    assert "there is no key 'ignored'" in err
    assert "did you mean ignore?" in err


def test_help_and_wrong_options_import_no_torch(here: Path) -> None:
    import subprocess
    import sys

    env = {**os.environ, "PYTHONPATH": str(Path(bnfix.__file__).parents[1])}
    for argv in (["-h"], ["ok.pt", "--select", "XX"], ["ok.pt", "--fix"], ["no.pt"]):
        argv = ["check", *argv]
        code = f"import sys; from bnfix.cli import run; run({argv!r}); print('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stderr.splitlines()[-1] == "False", argv


def test_a_loader_that_raises_is_named(here: Path, capsys: Output) -> None:
    Path("bad.py").write_text("def loader():\n    yield 1 / 0\n")
    assert run(["check", "ok.pt", *ARCH, "--data", "bad.py:loader"]) == 2
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err
