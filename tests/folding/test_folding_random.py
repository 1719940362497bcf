"""Random small models: outputs kept or the norm refused, never wrong, never a crash.

A failure names the seed and prints the model; ``shortened_failure(seed)`` makes it as short as can be.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import bits, same_bits
from random_graphs import Program, program, shortened
from torch import Tensor, nn

import bnfix
from bnfix import Result
from bnfix.errors import BnfixError
from bnfix.folding import engine
from bnfix.stats import Affine

# The fold is held against the float64 original, by how far the float32 original itself is away from it. Weights that
# were rounded once more and sums in another order are a few times that; statistics drawn here amplify up to a = 30
# and more in a row, so by luck the original's own error may be a tenth of what is usual: 64 times it, or 64
# roundings of the largest value, is both 1,000 times less than any wrong channel, sign, axis or shift makes.
FACTOR, ROUNDINGS = 64.0, 64 * 2.0**-24

USUAL = [range(start, start + 20) for start in range(0, 200, 20)]
MANY = [range(start, start + 50) for start in range(1000, 3000, 50)]


@pytest.mark.parametrize("seeds", USUAL, ids=str)
def test_kept_or_refused(seeds: range) -> None:
    for seed in seeds:
        check(program(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", MANY, ids=str)
def test_kept_or_refused_many(seeds: range) -> None:
    for seed in seeds:
        check(program(seed))


def test_what_is_drawn_is_worth_drawing() -> None:
    """Most programs are folded in part; both directions, in place, several outputs, shared layers are among them."""
    programs = [program(seed) for seed in range(1000, 1080)]
    text = "\n".join(p.source() for p in programs)
    words = "cat( chunk( permute( reshape( flatten( padding_mode relu_() kept softmax ConvTranspose groups=2 avg_pool "
    for word in (words + "Dropout eps=0.1 affine=False weight_norm F.conv2d F.batch_norm hook").split():
        assert word in text, word
    assert sum(p.source().count("Norm") for p in programs) > 150
    assert program(1003).source() == programs[3].source()


@pytest.mark.parametrize("fault", ["shift", "order"])
def test_this_check_bites(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong fold is found here, not only by the proof that comes with each fold."""
    original = engine.norm_affine

    def wrong(*given: Any) -> Affine:
        affine = original(*given)
        if fault == "shift":
            return Affine(affine.scale, affine.shift * (1 + 1e-3))
        return Affine(affine.scale.roll(1), affine.shift)

    monkeypatch.setattr(engine, "norm_affine", wrong)
    caught = 0
    for seed in range(20):
        try:
            check(program(seed), verify=False)
        except AssertionError:
            caught += 1
    assert caught >= 8


def check(one: Program, *, verify: bool = True) -> Result | None:
    """All that a fold promises, of one model. None where bnfix says that it can't trace it.

    Raises:
        AssertionError: with the program.
    """
    try:
        return _check(one, verify)
    except AssertionError as error:
        raise AssertionError(f"{error}\n\n{one.source()}") from None


def _check(one: Program, verify: bool) -> Result | None:
    model, x = one.build(), one.example()
    examples = [x, *([one.example(0, 3)] if one.seed % 3 == 0 and _runs(one, one.example(0, 3)) else [])]
    before, attributes = bits(model), set(vars(model))
    given = [e.clone() for e in examples]
    try:
        result = bnfix.fold(model, examples, verify=verify)
    except BnfixError:
        result = None
    assert same_bits(model, before), "the argument is changed"
    if result is None:
        return None
    assert set(vars(model)) == attributes, f"the argument has {set(vars(model)) - attributes}"
    assert all(torch.equal(a, b) for a, b in zip(examples, given, strict=True)), "the example is changed"
    _accounted(model, result)
    folded = result.model
    assert folded is not None
    models = (one.build(), one.build().double(), folded)
    for number, example in enumerate(examples):
        for grad in (False, True):
            _same(one, models, one.example(number + 1, example.shape[0]) * 1.3, grad)
    if bnfix.fold(folded, examples, dry_run=True).edits:  # planned, and perhaps found not to be possible
        again = bnfix.fold(folded, examples, verify=False).edits
        assert not again, f"a second fold changes {[e.site for e in again]}"
    return result


def _runs(one: Program, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            one.build()(x)
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def _accounted(model: nn.Module, result: Result) -> None:
    """Each norm is either folded or refused, once; none is a defect."""
    named = {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    counted = collections.Counter([e.site for e in result.edits] + [r.site for r in result.refusals])
    assert named <= set(counted), f"nothing is said of {named - set(counted)}"
    assert max((counted[n] for n in named), default=1) == 1, f"said twice: {counted}"
    defects = [f"{r.site}: {r.reason}" for r in result.refusals if r.defect]
    assert not defects, f"planned and thrown out: {defects}"
    assert all(r.reason for r in result.refusals)


def _same(one: Program, models: tuple[nn.Module, nn.Module, nn.Module], x: Tensor, grad: bool) -> None:
    """The folded model does what the original does, by its outputs and by what it keeps, the second time as well."""
    original, oracle, folded = models
    try:
        expected = _seen(one, original, x, grad)
    except RuntimeError:  # with gradients PyTorch allows less
        assert grad
        return
    try:
        exact, least = _seen(one, oracle, x.double(), False), ROUNDINGS
    except RuntimeError:  # its forward names float32: so the original has to do, and its own error isn't known
        exact, least = expected, 100 * ROUNDINGS
    for _ in range(2):
        try:
            found = _seen(one, folded, x, grad)
        except RuntimeError as error:
            raise AssertionError(f"the folded model fails{' with gradients on' * grad}: {error}") from error
        assert len(found) == len(expected) == len(exact)
        for (name, a), (_, b), (_, c) in zip(found, expected, exact, strict=True):
            assert a.shape == b.shape, f"{name} has the shape {a.shape}, not {b.shape}"
            assert a.dtype == b.dtype, f"{name} is {a.dtype}, not {b.dtype}"
            off, own = (a - c).abs().max().item(), (b - c).abs().max().item()
            allowed = FACTOR * own + least * c.abs().max().item()
            assert off <= allowed, f"{name} is {off:.3g} off, {allowed:.3g} is allowed (grad {grad})"


def _seen(one: Program, model: nn.Module, x: Tensor, grad: bool) -> list[tuple[str, Tensor]]:
    with torch.set_grad_enabled(grad):
        out = model(x.clone())
    found = [*_flat("output", out)]
    for name in one.kept:
        found += _flat(name, getattr(model, name))
    return [(n, t.detach().clone()) for n, t in found]


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield from _flat(f"{name}[{key!r}]", inner)


def shortened_failure(seed: int, said: str | None = None) -> Program:
    """The shortest program with the failure of this seed: the one whose message begins as ``said``."""

    def failure(one: Program) -> str:
        try:
            one.build()(one.example())
        except Exception:  # noqa: BLE001  # a candidate that leaves out too much: no failure of bnfix
            return ""
        try:
            check(one)
        except AssertionError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  # a crash is a failure too
            return f"crash {type(error).__name__}"
        return ""

    kind = said or failure(program(seed))[:12]
    fails: Callable[[Program], bool] = lambda one: bool(kind) and failure(one).startswith(kind)  # noqa: E731
    return shortened(program(seed), fails)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(shortened_failure(int(argument)).source())
