"""The training is the user's: the same to the bit under a watch, and nothing is left behind, whatever happens."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_nets import conv_net, images, loader, sgd, step, train, watch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import bnfix
from bnfix.graph import find_owners
from bnfix.loop import hung_on


def clean(model: nn.Module) -> bool:
    """Whether no hook of anybody's is on the model."""
    return all(
        not (m._forward_pre_hooks or m._forward_hooks or m._load_state_dict_pre_hooks or m._load_state_dict_post_hooks)
        for m in find_owners(model).modules.values()
    )


def trained(watched: bool) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(conv_net(), nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def loop() -> None:
        for i in range(40):
            out = [model(images(16)) for _ in range(1 + i % 3)]
            step(optimizer, *out)
            if i % 10 == 9:
                with torch.no_grad():
                    model(images(16))

    if watched:
        with watch(model, optimizer) as w:
            loop()
        assert w.log.steps == 40
    else:
        loop()
    return model.state_dict(), torch.rand(3)


def test_training_is_the_same_to_the_bit() -> None:
    (plain, after), (watched, then) = trained(False), trained(True)
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    assert torch.equal(after, then)


def test_dicts_of_all_modules_are_as_before() -> None:
    model = conv_net()
    before = [(set(vars(m)), {k: type(v) for k, v in vars(m).items()}) for m in model.modules()]
    hooks = dict(_global_optimizer_post_hooks)
    optimizer = sgd(model)
    own = set(vars(optimizer))
    with watch(model, optimizer):
        train(model, optimizer, 3)
    assert before == [(set(vars(m)), {k: type(v) for k, v in vars(m).items()}) for m in model.modules()]
    assert clean(model)
    assert dict(_global_optimizer_post_hooks) == hooks
    assert set(vars(optimizer)) == own
    assert all(not p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exceptions_pass_and_the_report_is_there(error: type[BaseException]) -> None:
    model = conv_net()
    optimizer = sgd(model)
    w = watch(model, optimizer)

    def loop() -> None:
        with w:
            for i in range(8):
                step(optimizer, model(images()) - model(images()))
                if i == 6:
                    raise error("mine")

    with pytest.raises(error, match="mine"):
        loop()
    assert clean(model)
    assert w.log.steps == 7
    assert w.report().by_code("BN401")


def test_an_exception_in_the_middle_of_a_forward() -> None:
    model = conv_net()
    optimizer = sgd(model)
    w = watch(model, optimizer)

    def loop() -> None:
        with w:
            train(model, optimizer, 3)
            model(torch.randn(4, 5, 8, 8))

    with pytest.raises(RuntimeError, match="channels"):
        loop()
    assert clean(model)
    assert w.log.steps == 3


def test_an_exception_while_entering_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_net()
    w = watch(model)
    real = nn.Module.register_forward_pre_hook
    seen: list[int] = []

    def fails(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", fails)
    with pytest.raises(KeyboardInterrupt):
        w.__enter__()
    monkeypatch.undo()
    assert clean(model)
    assert not hung_on(model.modules())


def test_an_interrupt_right_behind_a_registration_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook hangs already, and nobody has its handle yet."""
    model = conv_net()
    real = nn.Module.register_forward_pre_hook
    seen: list[int] = []

    def interrupted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        real(self, *args, **kwargs)
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch(model).__enter__()
    monkeypatch.undo()
    assert len(seen) == 2
    assert clean(model)


class Same(nn.Module):
    """All of a kind are equal."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return 1


class SameNorm(Same, nn.BatchNorm1d):
    pass


def test_copies_that_compare_by_value_are_all_cleaned() -> None:
    model = nn.Sequential(nn.Linear(8, 8), SameNorm(8), nn.Linear(8, 1))
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        copies = [copy.deepcopy(model) for _ in range(3)]
        step(optimizer, model(torch.randn(8, 8)))
    assert w.log.norms[0].updates == 1
    assert all(clean(m) for m in (model, *copies))


def test_nothing_is_kept_alive() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(6):
            step(optimizer, model(images()), model(images()))
            with torch.no_grad():
                model(images())
    kept = [weakref.ref(o) for o in (model, optimizer, *model.modules(), *model.parameters())]
    storages = [weakref.ref(b) for b in model.buffers()]
    del model, optimizer
    gc.collect()
    assert all(r() is None for r in (*kept, *storages))
    assert w.report().by_code("BN401")
    pickle.loads(pickle.dumps(w.log))


def test_activations_are_not_kept_alive_while_it_runs() -> None:
    """The inputs of norms are noticed weakly: a graph is freed when the user lets go of it."""
    model = conv_net()
    optimizer = sgd(model)
    alive: list[weakref.ref[Tensor]] = []
    with watch(model, optimizer):
        for _ in range(4):
            x = images().requires_grad_()
            y = model[0](x)
            alive.append(weakref.ref(y))
            step(optimizer, model[1:](y))
            del x, y
            gc.collect()
            assert all(r() is None for r in alive)


def test_a_model_that_goes_away_inside() -> None:
    with watch(model := conv_net()) as w:
        train(model, sgd(model), 2)
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None
    assert len(w.log.norms) == 3
    assert w.report() is not None


def test_copies_made_inside_are_clean_behind_it() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        deep = copy.deepcopy(model)
        deeper = copy.deepcopy(deep)
        shallow = copy.copy(model[1])
        deep(images())
        deeper(images())
        train(model, optimizer, 2)
    assert clean(deep)
    assert clean(deeper)
    assert not shallow._forward_pre_hooks
    assert all(n.updates == 2 for n in w.log.norms)


def test_a_pickle_made_inside_needs_no_bnfix(tmp_path: Path) -> None:
    model = conv_net()
    path = tmp_path / "model.pt"
    with watch(model):
        torch.save(model, path)
        train(model, sgd(model), 2)
    assert b"bnfix" not in path.read_bytes()
    code = (
        "import sys; sys.modules['bnfix'] = None\n"
        f"import torch; m = torch.load({str(path)!r}, weights_only=False)\n"
        "y = m(torch.randn(4, 3, 8, 8)); m.load_state_dict(m.state_dict()); assert y.shape == (4, 4)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PATH": ""})


def test_a_pickle_of_a_copy_made_inside() -> None:
    model = conv_net()
    with watch(model):
        file = io.BytesIO()
        torch.save(copy.deepcopy(model), file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        x = images(4)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
        again.load_state_dict(model.state_dict())


def test_state_dict_has_the_same_keys_inside() -> None:
    model = conv_net()
    before = list(model.state_dict())
    with watch(model):
        assert list(model.state_dict()) == before


def test_two_watches_at_a_time() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as outer:
        train(model, optimizer, 2)
        with watch(model, optimizer) as inner:
            train(model, optimizer, 3)
        train(model, optimizer, 2)
    assert (outer.log.steps, inner.log.steps) == (7, 3)
    assert clean(model)


def test_it_is_entered_once() -> None:
    w = watch(conv_net())
    with pytest.raises(RuntimeError, match="nothing was watched yet"):
        w.report()
    with w:
        pass
    with pytest.raises(RuntimeError, match="entered once"):
        w.__enter__()


def test_other_verbs_of_bnfix_within_a_watch() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        train(model, optimizer, 3)
        model.eval()
        assert len(bnfix.fold(model, images(2)).edits) == 3
        bnfix.check(model, images(2))
        bnfix.recalibrate(model, list(loader(2)))
        model.train()
        train(model, optimizer, 3)
    assert not w.report().findings
    assert all(n.updates == 6 for n in w.log.norms)
    assert clean(model)


def test_the_report_while_it_runs() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(20):
            step(optimizer, model(images()), model(images(shift=3.0)))
        assert not w.report().clean
        before = w.log.steps
        step(optimizer, model(images()))
    assert (before, w.log.steps) == (20, 21)
    assert not w.report().clean


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        watch("model.pt")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Optimizer"):
        watch(conv_net(), object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="BN999"):
        watch(conv_net(), select=["BN999"])


def test_an_optimizer_of_another_model_is_told() -> None:
    model, other = conv_net(), conv_net()
    optimizer = sgd(other)
    with watch(model, optimizer) as w:
        model(images())
    assert any("none of the model's parameters" in note for note in w.report().notes)


def test_a_model_without_norms() -> None:
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        step(optimizer, model(torch.randn(4, 3)))
    report = w.report()
    assert (report.norms, report.findings) == (0, ())


@pytest.mark.parametrize("kind", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_layers_that_are_not_watched(kind: type[nn.Module]) -> None:
    norm = kind(3, track_running_stats=kind is nn.InstanceNorm2d)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), norm)
    with watch(model) as w:
        model(images())
    tracked = norm.running_mean is not None
    assert any("are not watched" in n for n in w.report().notes) == tracked
    assert not w.log.norms


def test_select_and_ignore_and_thresholds() -> None:
    def run(**how: Any) -> set[str]:
        model = conv_net()
        optimizer = sgd(model)
        with watch(model, optimizer, **how) as w:
            for _ in range(16):
                step(optimizer, model(images()), model(images(shift=3.0)))
        return {f.code + f.severity[0] for f in w.report().findings}

    assert run() == {"BN303e", "BN401w"}
    assert run(ignore=["BN4"]) == {"BN303e"}
    assert run(select=["BN401"]) == {"BN401w"}
    assert run(select="BN401", thresholds={"BN401": {"means": 9.0, "spreads": 9.0}}) == {"BN401i"}
    assert run(select="BN401", per_layer_ignores={"*": "BN401"}) == set()
    with pytest.raises(ValueError, match="means"):
        run(thresholds={"BN401": {"mean": 9.0}})


def test_an_inline_ignore() -> None:
    model = conv_net()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.bnfix_ignore = {"BN4"}
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(16):
            step(optimizer, model(images()), model(images(shift=3.0)))
    report = w.report()
    assert not report.by_code("BN4")
    assert any(f.code == "BN401" for f in report.ignored)
