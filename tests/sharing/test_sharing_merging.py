"""merge_calls: calls become one, and everything else about the model stays."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from merging_nets import ROUNDING, XS, Made, Siamese, X, block, close, merged
from nets import lived_in, relative_error
from torch import Tensor, nn

import bnfix

# --------------------------------------------------------------------------------------------- what it does


def test_three_calls_become_one() -> None:
    model = Siamese()
    result = merged(model, XS)
    runs: list[int] = []
    result.model.net.register_forward_hook(lambda _m, i, _o: runs.append(len(i[0])))
    found, expected = result.model(*XS), model(*XS)
    assert runs == [12]
    assert list(found) == list(expected)
    assert close(found, expected)
    assert result.parity.verdict == "passed"
    (edit,) = result.edits
    assert (edit.site, edit.calls, edit.into) == ("net", ("net", "net@1", "net@2"), ("net.1",))
    assert result.verb == "merge_calls"
    assert "merged 1 of 1 network" in str(result)


def test_training_has_the_statistics_and_gradients_of_one_forward() -> None:
    model = Siamese()
    apart = merged(model, XS).model.train()

    class ByHand(Siamese):
        def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Any:  # type: ignore[override]
            za, zp, zn = bnfix.joint(self.embed)(a, p, n)
            return {"a": za, "p": self.head(zp), "n": zn}

    hand = ByHand().train()
    hand.load_state_dict(model.state_dict())
    hand.net[1].momentum = 1 - (1 - 0.1) ** 3
    for one in (apart, hand):
        sum((i + 1) * v.square().sum() for i, v in enumerate(one(*XS).values())).backward()
    for (name, p), q in zip(apart.named_parameters(), hand.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)  # sums in another order
    torch.testing.assert_close(apart.net[1].running_mean, hand.net[1].running_mean)
    torch.testing.assert_close(apart.net[1].running_var, hand.net[1].running_var)
    assert int(apart.net[1].num_batches_tracked) == 1


@pytest.mark.parametrize(("momentum", "expected"), [(0.1, 0.271), (0.5, 0.875), (None, None), (1.0, 1.0)])
def test_k_updates_become_one(momentum: float | None, expected: float | None) -> None:
    """What is left of the old statistics is the same: m' = 1 − (1 − m)^k."""
    model = Siamese()
    model.net[1].momentum = momentum
    found = merged(model, XS).model.net[1].momentum
    assert found == expected if expected is None else found == pytest.approx(expected)
    assert model.net[1].momentum == momentum


def test_everything_else_about_the_model_stays() -> None:
    model = Siamese()
    model.note = ["kept"]
    result = merged(model, XS)
    other = result.model
    assert isinstance(other, Siamese)
    assert type(other).__name__ == "Siamese"
    assert list(other.state_dict()) == list(model.state_dict())
    assert [n for n, _ in other.named_modules()] == [n for n, _ in model.named_modules()]
    assert other.note == ["kept"]
    assert close(other.embed(X), model.embed(X))
    assert result.recipe == {}
    model.load_state_dict(other.state_dict())
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(other)
    assert close(twin(*XS), model(*XS))
    assert twin.net is not other.net
    stream = io.BytesIO()
    torch.save(other, stream)
    stream.seek(0)
    assert close(torch.load(stream, weights_only=False)(*XS), model(*XS))
    assert twin.train().training
    assert close(twin.eval()(*XS), model(*XS))
    assert close(nn.DataParallel(other)(*XS), model(*XS))


def test_other_batch_sizes_and_keywords_run_too() -> None:
    model = Siamese()
    other = merged(model, XS).model
    more = (torch.randn(1, 4), torch.randn(7, 4), torch.randn(2, 4))
    assert close(other(*more), model(*more))
    assert close(other(n=more[2], p=more[1], a=more[0]), model(*more))


@pytest.mark.parametrize("how", ["export", "compile"])
def test_exported_and_compiled(how: str) -> None:
    model = Siamese()
    other = merged(model, XS).model
    if how == "export":
        program = torch.export.export(other, XS)
        assert sum("batch_norm" in str(n.target) for n in program.graph.nodes) == 1
        assert close(program.module()(*XS), model(*XS))
    else:
        torch._dynamo.reset()
        assert close(torch.compile(other, backend="eager", fullgraph=True)(*XS), model(*XS))


def halves(m: Any, x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return torch.cat([m.net(one), m.net(other)], 1)


@pytest.mark.parametrize(
    ("forward", "example"),
    [
        (lambda m, *xs: [m.net(x) for x in xs], XS),
        (lambda m, a, b: m.net(a) + m.net(a * b), (X, X + 1)),
        (halves, torch.randn(5, 8)),
        (lambda m, a, b: (m.net(a), {"b": [m.net(b), 3]}, None), XS[:2]),
        (lambda m, a, b: F.dropout(m.net(a), 0.5, m.training) + m.net(b), (X, X + 1)),
        (lambda m, a, b: m.net(a) * a.shape[0] + m.net(b).mean(0), (X, X + 1)),
    ],
)
def test_ways_to_write_it(forward: Any, example: Any) -> None:
    model = Made(forward)
    result = merged(model, example)
    assert len(result.edits) == 1
    call = example if isinstance(example, tuple) else (example,)
    for one, other in zip(result.model(*call), model(*call), strict=True):
        assert isinstance(one, Tensor) == isinstance(other, Tensor)
        if isinstance(one, Tensor):
            assert relative_error(one, other) < ROUNDING


def test_lists_and_optional_inputs() -> None:
    class Lists(Siamese):
        def forward(self, xs: list[Tensor], flag: bool = True) -> Any:  # type: ignore[override]
            return [self.embed(x) if flag else x for x in xs]

    model = Lists()
    other = merged(model, (list(XS),)).model
    assert close(other(list(XS)), model(list(XS)))
    with pytest.raises(RuntimeError, match=r"merged for a forward on xs=.*flag=True, and this is another one"):
        other(list(XS[:2]))
    with pytest.raises(RuntimeError, match="this is another one"):
        other(list(XS), flag=False)
    two = merged(Siamese(), XS[:2]).model  # without the optional one
    with pytest.raises(RuntimeError, match="n=None, and this is another one"):
        two(*XS)


def test_a_setting_that_was_read_must_not_change() -> None:
    """torch.fx writes numbers down as they are: an annealed temperature would be frozen in silence."""
    other = merged(Siamese(), XS).model
    other(*XS)
    other.temperature = 0.1
    with pytest.raises(RuntimeError, match="temperature was read when its calls were merged, and has changed"):
        other(*XS)
    other.temperature = 0.5
    other.something_else = 3
    other(*XS)


def scaled(model: Any, x: Tensor) -> Tensor:
    """Reads a setting of the model outside of its class."""
    y: Tensor = x * model.outside
    return y


class Settings(Siamese):
    """Reads its settings by strings, by a property, in a function, through a decorator."""

    outside, by_string, nested = 2.0, 3.0, None

    def __init__(self) -> None:
        super().__init__()
        self.outside, self.by_property, self.config = 2.0, 4.0, {"gain": [1.0, 2.0]}

    @property
    def gain(self) -> float:
        return self.by_property * self.config["gain"][1]

    def forward(self, a: Tensor, p: Tensor) -> Any:  # type: ignore[override]
        return scaled(self, self.net(a)), self.net(p) * self.gain


@pytest.mark.parametrize("change", ["outside", "by_property", "config"])
def test_settings_are_found_where_the_code_reads_them(change: str) -> None:
    model = Settings()
    other = merged(model, XS[:2]).model
    assert close(other(*XS[:2]), model(*XS[:2]))
    if change == "config":
        other.config["gain"][1] = 5.0
    else:
        setattr(other, change, 7.0)
    with pytest.raises(RuntimeError, match="has changed since"):
        other(*XS[:2])


def test_an_inner_module_that_the_model_calls_twice() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Made(lambda m, a, b: m.net(a) - m.net(b))
            self.stem = nn.BatchNorm1d(4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            a = self.stem(a)
            return self.pair(a, b) + self.pair(b, a * 2)

    model = Outer()
    result = merged(model, (X, X + 1))
    assert [e.site for e in result.edits] == ["pair", "pair.net"]
    assert close(result.model(X, X + 1), model(X, X + 1))
    assert result.model.pair.net[1].momentum == pytest.approx(1 - 0.9**4)
    training = result.model.train()
    training(X, X + 1)
    assert int(training.pair.net[1].num_batches_tracked) == 1
    assert int(training.stem.num_batches_tracked) == 1


def test_encoder_and_projector_one_after_the_other() -> None:
    """Ancestors are looked for anew after each merge: the second one stands on the first."""
    model = Made(lambda m, a, b: (m.proj(m.net(a)), m.proj(m.net(b) * 2)), proj=block())
    result = merged(model, (X, X + 1))
    assert [e.site for e in result.edits] == ["net", "proj"]
    assert close(result.model(X, X + 1), model(X, X + 1))


def test_sites_dry_run_and_in_place() -> None:
    model = lived_in(Made(lambda m, a, b: (m.proj(m.net(a)), m.proj(m.net(b) * 2)), proj=block()))
    expected = model(X, X + 1)
    with pytest.raises(
        ValueError, match=r"'proj.1' is no network with norms that a forward calls several times: net, proj"
    ):
        bnfix.merge_calls(model, (X, X + 1), "proj.1")
    dry = bnfix.merge_calls(model, (X, X + 1), dry_run=True)
    assert dry.model is None
    assert len(dry.edits) == 2
    assert type(model) is Made
    result = bnfix.merge_calls(model, (X, X + 1), ["proj"], inplace=True)
    assert [e.site for e in result.edits] == ["proj"]
    assert result.model is model
    assert close(model(X, X + 1), expected)
    assert (model.net[1].momentum, model.proj[1].momentum) == (0.1, pytest.approx(0.19))
    again = bnfix.merge_calls(model, (X, X + 1))
    assert "merged already" in again.refusals[0].reason


def test_nothing_to_merge() -> None:
    result = merged(nn.Sequential(block(), block()), X)
    assert not result.edits
    assert not result.refusals
    assert "nothing to do" in str(result)


def test_dropout_is_noted() -> None:
    result = merged(Siamese(block(nn.Dropout(0.5))), XS)
    assert len(result.edits) == 1
    assert any("random numbers (dropout)" in n for n in result.notes)
