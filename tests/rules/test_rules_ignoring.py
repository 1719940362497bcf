"""What a user has chosen: rules, and places where a rule has nothing to say."""

from __future__ import annotations

import math

import pytest
import torch
from rule_fakes import FAKES
from torch import nn

import bnfix
from bnfix.rules import Selection, judge, judging, near_codes
from bnfix.types import Diagnosis


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "all_rules", lambda: FAKES)


class Net(nn.Module):
    """Three norms with NaN, one of them healthy in all else."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
        self.head = nn.BatchNorm2d(2, momentum=0.99)
        for norm in (*self.backbone, self.head):
            norm.running_var.fill_(math.nan)


def sites(diagnosis: Diagnosis, code: str) -> list[tuple[str, ...]]:
    return [f.sites for f in diagnosis.by_code(code)]


def test_everything_by_default_but_what_is_optional() -> None:
    found = bnfix.check(Net())
    assert [f.code for f in found.findings] == ["BN901", "BN902"]
    assert found.checked == ("BN901", "BN902", "BN904")
    assert [s.code for s in found.skipped] == ["BN903"]
    assert [f.code for f in bnfix.check(Net(), select="BN905").findings] == ["BN905"]


def test_ignore_goes_before_select() -> None:
    found = bnfix.check(Net(), select=["BN9"], ignore="BN901, BN905")
    assert [f.code for f in found.findings] == ["BN902"]
    assert found.checked == ("BN902", "BN904")


def test_a_part_of_a_finding_is_ignored_where_the_user_said_so() -> None:
    found = bnfix.check(Net(), per_layer_ignores={"backbone.*": ["BN901"]})
    (left,) = found.by_code("BN901")
    assert left.sites == ("head",)
    assert left.fix is not None
    assert left.fix.sites == ("head",)
    assert left.message == "3 norms hold NaN (2 of the 3 sites left out)"
    (gone,) = found.ignored
    assert gone.sites == ("backbone.0", "backbone.1")
    assert gone.fix is not None
    assert gone.fix.sites == ("backbone.0", "backbone.1")


def test_a_whole_finding_is_ignored_as_it_is() -> None:
    found = bnfix.check(Net(), per_layer_ignores={"*": "BN90"})
    assert found.clean
    assert [f.message for f in found.ignored] == ["3 norms hold NaN", "momentum is 0.99"]


def test_a_module_says_itself_what_it_ignores() -> None:
    model = Net()
    model.head.bnfix_ignore = {"BN902"}
    model.backbone[1].bnfix_ignore = "BN901"
    found = bnfix.check(model)
    assert sites(found, "BN901") == [("backbone.0", "head")]
    assert sites(found, "BN902") == []
    assert sorted((f.code, f.sites) for f in found.ignored) == [("BN901", ("backbone.1",)), ("BN902", ("head",))]


def test_a_layer_is_ignored_under_any_of_its_names() -> None:
    model = Net()
    model.alias = model.head  # reported as ``head``
    found = bnfix.check(model, per_layer_ignores={"al*": ["BN902"]})
    assert sites(found, "BN902") == []
    assert [f.sites for f in found.ignored] == [("head",)]


def test_the_model_itself_may_be_the_layer() -> None:
    norm = nn.BatchNorm2d(2, momentum=0.99)
    assert bnfix.check(norm, per_layer_ignores={"(root)": ["BN902"]}).clean
    norm.bnfix_ignore = {"BN902"}
    assert bnfix.check(norm).clean


def test_a_pattern_is_one_of_whole_paths_with_their_case() -> None:
    for pattern in ("backbone", "HEAD", "hea"):
        assert sites(bnfix.check(Net(), per_layer_ignores={pattern: "BN9"}), "BN901") == [
            ("backbone.0", "backbone.1", "head")
        ]
    assert sites(bnfix.check(Net(), per_layer_ignores={"h?ad": "BN901"}), "BN901") == [("backbone.0", "backbone.1")]


def test_call_sites_are_those_of_their_module() -> None:
    from bnfix.types import Evidence, Finding

    finding = Finding("BN901", "fake", "error", "two calls differ", ("a.bn", "a.bn@1", "b.bn"))
    chosen = Selection(by_site={"a.*": ("BN901",)})
    kept, ignored = judging._sifted([finding], chosen, Evidence())
    assert [f.sites for f in kept] == [("b.bn",)]
    assert [f.sites for f in ignored] == [("a.bn", "a.bn@1")]


def test_thresholds_are_the_users_own() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.5))
    assert bnfix.check(model).clean
    assert [f.code for f in bnfix.check(model, thresholds={"BN902": {"most": 0.5}}).findings] == ["BN902"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"select": "BN99"}, "select: there is no rule 'BN99'"),
        ({"ignore": ["fake-nam"]}, r"near that: BN901 fake-nan"),
        ({"per_layer_ignores": {"head": "XX"}}, "per_layer_ignores 'head': there is no rule 'XX'"),
        ({"thresholds": {"BN902": {"mots": 1}}}, "no threshold 'mots'\n.*did you mean most"),
        ({"thresholds": {"BN901": {"most": 1}}}, "it has none"),
        ({"thresholds": {"BN90": {"most": 1}}}, "no whole code"),
        ({"thresholds": {"BN902": {"most": "high"}}}, "is a number, not 'high'"),
        ({"thresholds": {"BN902": {"most": True}}}, "is a number, not True"),
        ({"role": "test"}, '"train" or "val"'),
    ],
)
def test_a_wrong_wish_is_named_with_what_there_is(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bnfix.check(Net(), **wrong)  # type: ignore[arg-type]


def test_near_codes_are_no_wild_guess() -> None:
    assert near_codes("BN9O1")[0] == "BN901 fake-nan"
    assert near_codes("momentum") == ("BN902 fake-momentum",)
    assert near_codes("qqq") == ()


def test_judging_is_the_same_twice() -> None:
    from bnfix import evidence

    gathered = evidence.of_model(Net())
    assert judge(gathered) == judge(gathered)


def test_checking_leaves_the_model_as_it_was() -> None:
    model = Net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [dict(vars(m)) for m in model.modules()]
    state = torch.get_rng_state()
    bnfix.check(model, per_layer_ignores={"*": "BN901"})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) or v.isnan().all() for k, v in model.state_dict().items())
    assert [set(vars(m)) for m in model.modules()] == [set(a) for a in attributes]
    assert all(m.training for m in model.modules())
