"""The laws of every rule there is: it finds its bad example, leaves the good one alone, and its fix heals."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfix
from bnfix.graph import mend
from bnfix.graph.mending import VERBS
from bnfix.rules import Case, Rule, all_rules, rule_of
from bnfix.running import as_call
from bnfix.types import Diagnosis, Fix, Safety

RULES = all_rules()
ROOT = Path(__file__).resolve().parents[2]
HEADINGS = ["## What it does", "## Why is this bad", "## Example", "## Fix"]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda r: r.code)


def diagnosis(case: Case, **more: Any) -> Diagnosis:
    """What bnfix says of an example."""
    if case.loop is not None:
        report = case.loop(bnfix.watch)  # type: ignore[attr-defined]
        assert isinstance(report, Diagnosis)
        return report
    options: dict[str, Any] = {"against": case.against} if case.against is not None else {}
    if case.data is not None:
        options |= {"data": case.data, "role": case.role}
    return bnfix.check(case.model, case.example, **options, **(case.options or {}), **more)


def test_there_are_rules_and_none_shares_a_code_or_a_name() -> None:
    assert len(RULES) >= 20
    assert len({r.code for r in RULES}) == len(RULES) == len({r.name for r in RULES})
    assert all(rule_of(r.name) is r and rule_of(r.code.lower()) is r for r in RULES)


def test_rules_are_found_without_torch() -> None:
    code = (
        "import sys; from bnfix.rules import all_rules; assert len(all_rules()) > 20; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules and 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@every_rule
def test_the_docstring_is_a_page(rule: Rule) -> None:
    text = rule.__doc__ or ""
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0].endswith(".")
    assert [line for line in lines if line.startswith("## ")] == HEADINGS
    assert "```python" in lines
    assert max(map(len, text.splitlines())) <= 120
    code = text.split("```python")[1].split("```")[0]
    assert len(code.strip().splitlines()) >= 1


@every_rule
def test_the_bad_example_is_found(rule: Rule) -> None:
    said = diagnosis(rule.bad(), select=(rule.code,)) if rule.optional else diagnosis(rule.bad())
    mine = said.by_code(rule.code)
    assert mine, said
    for finding in mine:
        assert finding.name == rule.name
        assert finding.message
        assert "\n" not in finding.message


@every_rule
def test_the_good_example_is_clean(rule: Rule) -> None:
    said = diagnosis(rule.good())
    assert said.clean, said
    asked = diagnosis(rule.good(), select=(rule.code,)) if rule.optional else said
    assert not asked.by_code(rule.code), asked
    assert rule.code in asked.checked, asked.skipped


@every_rule
def test_looking_leaves_the_model_as_it_was(rule: Rule) -> None:
    case = rule.bad()
    if not isinstance(case.model, nn.Module):
        pytest.skip("its example is no module")
    before = copy.deepcopy(case.model.state_dict(keep_vars=False))
    attributes = {path: dict(vars(m)) for path, m in case.model.named_modules()}
    random = torch.get_rng_state()
    diagnosis(case, select=(rule.code,))
    assert torch.equal(torch.get_rng_state(), random)
    after = case.model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key].view(-1).nan_to_num(7.0), value.view(-1).nan_to_num(7.0)), key
    for path, module in case.model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
        assert all(vars(module)[k] is v or vars(module)[k] == v for k, v in attributes[path].items() if k[0] != "_")


def heal(model: nn.Module, fix: Fix, case: Case) -> nn.Module | None:
    """``model`` with ``fix`` applied by bnfix; None where only the user, or new training, can do it."""
    if fix.verb in VERBS:
        mend(model, fix)
        if fix.verb == "reset":
            bnfix.recalibrate(model, batches(case))
        return model
    verb = getattr(bnfix, fix.verb, None)
    if fix.verb == "code" or fix.safety is Safety.NEEDS_TRAINING or verb is None:
        return None
    if fix.verb == "recalibrate":
        told = {k: v for k, v in (case.options or {}).items() if k in ("mask", "forward")}  # how the data is read
        verb(model, batches(case), **told)
        return model
    model.eval()
    given = case.example if case.example is not None else next(iter(batches(case)))
    healed = verb(model, given, **{k: v for k, v in (case.options or {}).items() if k == "forward"})
    assert isinstance(healed.model, nn.Module)
    return healed.model if healed.edits else None  # calls that the training code makes are its own to change


def batches(case: Case) -> list[Any]:
    """Data to repair with: the example's own, or batches like its input."""
    if case.data is not None:
        return list(case.data)
    generator = torch.Generator().manual_seed(1)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 3

    (one,) = as_call(case.example).args
    return [like(one) for _ in range(8)]


@every_rule
def test_its_fix_removes_the_finding(rule: Rule) -> None:
    case = rule.bad()
    if not isinstance(case.model, nn.Module):
        pytest.skip("its example is no module")
    fixes = [f.fix for f in diagnosis(case, select=(rule.code,)).by_code(rule.code) if f.fix is not None]
    model: nn.Module = case.model
    healed = [heal(model, fix, case) for fix in fixes]
    if not healed or healed[-1] is None:
        pytest.skip("not a fix that bnfix can apply")
    case.model = healed[-1]
    after = diagnosis(case, select=(rule.code,))
    assert not after.by_code(rule.code), after
    assert rule.code in after.checked
    assert all(isinstance(f, Fix) and f.safety in Safety for f in fixes)


@every_rule
def test_exact_fixes_change_no_output_in_evaluation(rule: Rule) -> None:
    case = rule.bad()
    if not isinstance(case.model, nn.Module) or rule.code == "BN208":  # there only what is broken changes
        pytest.skip("no module, or the fix changes what is broken")
    found = diagnosis(case, select=(rule.code,)).by_code(rule.code)
    exact = [f.fix for f in found if f.fix is not None and f.fix.safety is Safety.EXACT and f.fix.verb in VERBS]
    if not exact:
        pytest.skip("no exact fix")
    model = case.model.eval()
    call = as_call(case.example)
    with torch.no_grad():
        before = call.run(model)
        for fix in exact:
            assert mend(model, fix)
        after = call.run(model)
    # Statistics of 16 bits widened to 32: the same numbers, and torch's kernels compute in float32 either way.
    torch.testing.assert_close(after, before, rtol=0, atol=0)
