"""Norms for each call, while the model is used: another number of calls is loud, and everything else works on."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from nets import bits, same_bits
from shared_nets import IMAGE, IMAGES, Functional, PyramidHead, TwoNames, tensors, triplet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnfix
from bnfix.graph import NormPerCall


def apart() -> Any:
    return bnfix.unshare(triplet(), IMAGES).model


def function() -> Any:
    from nets import lived_in

    return bnfix.unshare(lived_in(Functional(2)), IMAGE).model


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


# --------------------------------------------------------------------------------------------- loud, never reuse


def test_fewer_calls_are_an_error() -> None:
    model = apart()
    model.calls = 2
    with pytest.raises(RuntimeError, match=r"net.bn was called 2 times in this forward.*each of 3 calls"):
        model(*IMAGES)
    model.calls = 3
    assert same(model(*IMAGES), triplet()(*IMAGES))  # and the next one begins anew


def test_more_calls_are_an_error() -> None:
    model = apart()
    model.calls = 4
    with pytest.raises(RuntimeError, match=r"net.bn is called more than 3 times in this forward"):
        model(*IMAGES, IMAGE)
    assert same(model(*IMAGES), triplet()(*IMAGES))


def test_another_number_of_pyramid_levels_is_an_error() -> None:
    from nets import lived_in

    model = bnfix.unshare(lived_in(PyramidHead(4)), IMAGE).model
    for levels in (3, 5):
        model.levels = levels
        with pytest.raises(RuntimeError, match=r"tower.1"):
            model(torch.randn(2, 3, 32, 32))


def test_no_call_at_all_is_none_too_few() -> None:
    model = apart()
    model.calls = 0
    assert model(*IMAGES) == ()


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.net(IMAGE),
        lambda m: m.net.bn(torch.randn(2, 4, 3, 3)),
        lambda m: m.forward(*IMAGES),
        lambda m: copy.deepcopy(m.net)(IMAGE),
    ],
)
def test_a_call_outside_of_a_forward_is_an_error(use: Any) -> None:
    with pytest.raises(RuntimeError, match=r"called outside of one: call the model itself.*net.bn\[0\]"):
        use(apart())


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.forward(IMAGE),
        lambda m: m.norm(torch.randn(2, 4, 3, 3)),
    ],
)
def test_a_function_outside_of_a_forward_is_an_error(use: Any) -> None:
    with pytest.raises(RuntimeError, match="running_mean has a norm for each of its 2 calls"):
        use(function())


@pytest.mark.parametrize("use", [lambda t: t * 2, lambda t: torch.stack([t]), lambda t: t.shape])
def test_statistics_of_a_function_are_for_batch_norms_only(use: Any) -> None:
    with pytest.raises((TypeError, AttributeError)):
        use(function().running_mean)


def test_an_exception_in_the_middle_leaves_nothing_behind() -> None:
    model = apart()
    with pytest.raises(RuntimeError, match="expected input"):
        model(IMAGE, torch.randn(2, 5, 9, 9), IMAGE)
    with pytest.raises(RuntimeError, match="outside of one"):
        model.net(IMAGE)
    assert same(model(*IMAGES), triplet()(*IMAGES))


def test_ctrl_c_in_the_middle_leaves_nothing_behind() -> None:
    model = apart()

    def interrupt(_m: Any, inputs: Any) -> None:
        if inputs[0] is IMAGES[1]:
            raise KeyboardInterrupt

    handle = model.net.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(*IMAGES)
    handle.remove()
    assert same(model(*IMAGES), triplet()(*IMAGES))


def test_a_forward_inside_an_except_block_is_looked_at_too() -> None:
    """The hook behind a forward must not take somebody's earlier exception for its own."""
    model = apart()
    model.calls = 2
    try:
        raise ValueError("earlier")
    except ValueError:
        with pytest.raises(RuntimeError, match="2 times"):
            model(*IMAGES)


# --------------------------------------------------------------------------------------------- the model in use


def test_copies_count_for_themselves() -> None:
    model = apart()
    twin = copy.deepcopy(model)
    for one in (twin, model):
        assert same(one(*IMAGES), triplet()(*IMAGES))
    twin.train()(*IMAGES)
    assert [int(n.num_batches_tracked) for n in twin.net.bn] == [1, 1, 1]
    assert [int(n.num_batches_tracked) for n in model.net.bn] == [0, 0, 0]
    with pytest.raises(RuntimeError, match="outside"):
        twin.net(IMAGE)


@pytest.mark.parametrize("build", [apart, function])
def test_a_model_saved_whole_can_be_loaded(build: Any) -> None:
    model = build()
    call = IMAGES if build is apart else (IMAGE,)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert same(torch.load(stream, weights_only=False)(*call), model(*call))


def test_state_dicts_go_from_one_to_the_other() -> None:
    model, other = apart(), apart()
    model.train()(*IMAGES)
    other.load_state_dict(model.state_dict())
    assert same_bits(other, bits(model))
    with pytest.raises(RuntimeError, match=r"net.bn.0.weight"):
        other.load_state_dict(triplet().state_dict())


def test_several_threads_at_a_time() -> None:
    """A server runs one model in many threads: each counts its own calls."""
    model, expected = apart(), triplet()(*IMAGES)
    inside, failures = threading.Barrier(4), []

    def all_at_once(_m: Any, _i: Any) -> None:
        inside.wait(20)

    model.net.conv.register_forward_pre_hook(all_at_once)

    def work() -> None:
        try:
            assert same(model(*IMAGES), expected)
        except Exception as error:  # noqa: BLE001  # told below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert model.net.bn._calls == {}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("build", [apart, function])
def test_an_exported_program_has_separate_norms(strict: bool, build: Any) -> None:
    if strict and torch.__version__.startswith("2.7."):
        pytest.skip("torch 2.7 exports no model that has a pre-hook of any kind with strict=True")
    model = build()
    call = IMAGES if build is apart else (IMAGE,)
    program = torch.export.export(model, call, strict=strict)
    nodes = [n for n in program.graph.nodes if "batch_norm" in str(n.target)]
    assert len({n.args[3] for n in nodes}) == len(nodes) == (6 if build is apart else 2)
    assert same(program.module()(*call), model(*call))


@pytest.mark.parametrize("build", [apart, function])
def test_compiled_whole_without_a_break(build: Any) -> None:
    model = build()
    call = IMAGES if build is apart else (IMAGE,)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert same(compiled(*call), model(*call))
    if build is apart:
        model.calls = 2
        # in Dynamo's own error; torch 2.7 tells the kind alone
        with pytest.raises(Exception, match=r"net.bn was called 2 times in this forward|<class 'RuntimeError'>"):
            compiled(*IMAGES)


def test_traced_by_jit() -> None:
    model = apart()
    assert same(torch.jit.trace(model, IMAGES)(*IMAGES), model(*IMAGES))


def test_functional_call_and_grad() -> None:
    model = apart()
    params = dict(model.named_parameters())
    assert same(torch.func.functional_call(model, params, IMAGES), model(*IMAGES))
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, IMAGES)[1].square().sum())(params)
    assert grads["net.bn.1.weight"].abs().sum() > 0
    assert grads["net.bn.0.weight"].abs().sum() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_model_as_a_whole(reentrant: bool) -> None:
    plain, model = apart().train(), apart().train()
    call = tuple(x.clone().requires_grad_() for x in IMAGES)
    sum(o.square().sum() for o in plain(*IMAGES)).backward()
    sum(o.square().sum() for o in checkpoint(model, *call, use_reentrant=reentrant)).backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)  # the same kernels on the same numbers
    assert model.net.bn._calls == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_part_is_loud_not_wrong(reentrant: bool) -> None:
    """In the backward pass nobody can tell which call is computed again."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = triplet().net

        def forward(self, *xs: Tensor) -> Any:
            return [checkpoint(self.net, x, use_reentrant=reentrant) for x in xs]

    model = bnfix.unshare(Checkpointed(), IMAGES).model.train()
    call = tuple(x.clone().requires_grad_() for x in IMAGES)
    out = sum(o.square().sum() for o in model(*call))
    with pytest.raises(RuntimeError, match="let activation checkpointing run it again as a whole"):
        out.backward()


def test_gradients_accumulate_over_forwards() -> None:
    model = apart().train()
    model(*IMAGES)[0].sum().backward()
    model(*IMAGES)[0].sum().backward()
    assert [int(n.num_batches_tracked) for n in model.net.bn] == [2, 2, 2]


def test_inside_a_larger_model_that_calls_it_twice() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *xs: Tensor) -> Any:
            return self.inner(*xs), self.inner(*(x * 2 for x in xs))

    model = Outer(apart()).eval()
    call = IMAGES
    expected = (triplet()(*call), triplet()(*(x * 2 for x in call)))
    assert same(model(*call), expected)
    again = bnfix.unshare(model, call)  # each of its norms is called twice now
    assert len(again.edits) == 6
    assert same(again.model(*call), expected)
    assert isinstance(again.model.inner.net.bn[0], NormPerCall)
    twice = again.model.train()
    twice(*call)
    assert all(int(n.num_batches_tracked) == 1 for pair in twice.inner.net.bn for n in pair)


def test_taking_apart_in_two_rounds() -> None:
    model = triplet()
    first = bnfix.unshare(model, IMAGES, "net.bn").model
    second = bnfix.unshare(first, IMAGES)
    assert [e.site for e in second.edits] == ["net.bn2"]
    assert same(second.model(*IMAGES), model(*IMAGES))
    third = bnfix.unshare(second.model, IMAGES)
    assert not third.edits
    assert same(third.model(*IMAGES), model(*IMAGES))


def test_one_call_alone_can_be_taken_out() -> None:
    """As the guide says: a branch by itself, for use."""
    model = apart()
    branch = copy.deepcopy(model.net)
    for path, norm in list(branch.named_modules()):
        if isinstance(norm, NormPerCall):
            branch.set_submodule(path, norm[1])
    assert torch.equal(branch(IMAGES[1]), model(*IMAGES)[1])


# --------------------------------------------------------------------------------------------- files


class TwoNamesAndTriplet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.names, self.triplet, self.function = TwoNames(), triplet(), Functional(3)

    def forward(self, *xs: Tensor) -> Any:
        return self.names(xs[0]), self.triplet(*xs), self.function(xs[0])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share_affine", [False, True])
def test_a_saved_state_dict_brings_its_recipe(tmp_path: Any, suffix: str, share_affine: bool) -> None:
    from nets import lived_in

    model = lived_in(TwoNamesAndTriplet())
    result = bnfix.unshare(model, IMAGES, share_affine=share_affine)
    result.model.train()(*IMAGES)  # no two norms are alike any more
    result.model.eval()
    bnfix.save(result.model, tmp_path / f"w{suffix}", recipe=result.recipe)
    loaded = bnfix.load(tmp_path / f"w{suffix}", arch=TwoNamesAndTriplet)
    assert same(loaded(*IMAGES), result.model(*IMAGES))
    assert same_bits(loaded, bits(result.model))
    assert (loaded.triplet.net.bn[0].weight is loaded.triplet.net.bn[1].weight) == share_affine
    assert bnfix.info(tmp_path / f"w{suffix}").recipe["version"] == 2
    with pytest.raises(bnfix.errors.LoadError, match="un-shared in another model"):
        bnfix.load(tmp_path / f"w{suffix}", arch=lambda: nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"net.bn"):
        loaded.triplet.net(IMAGE)


def test_recalibrated_and_folded_files_stay_loadable(tmp_path: Any) -> None:
    from nets import lived_in

    model = lived_in(TwoNames())
    first = bnfix.unshare(model, IMAGE)
    bnfix.save(first.model, tmp_path / "u.pt", recipe=first.recipe)
    opened = bnfix.api.open_model(tmp_path / "u.pt", arch=TwoNames)
    assert "un-shared by bnfix: 1 norm" in opened.notes[0]
    bnfix.recalibrate(opened.value, [IMAGE, IMAGE * 2])
    bnfix.api.update_file(opened.value, tmp_path / "r.pt", source=opened.info)
    again = bnfix.api.open_model(tmp_path / "r.pt", arch=TwoNames)
    assert torch.equal(again.value(IMAGE), opened.value(IMAGE))
    folded = bnfix.fold(again.value, IMAGE)
    assert len(folded.edits) == 2
    bnfix.save(folded.model, tmp_path / "f.pt", recipe=folded.recipe, source=again.info)
    assert torch.equal(bnfix.load(tmp_path / "f.pt", arch=TwoNames)(IMAGE), folded.model(IMAGE))


@pytest.mark.parametrize(
    "step",
    [3, {"how": 3}, {"how": "calls"}, {"how": "names", "sites": "bn"}, {"how": "calls", "site": "net.bn", "calls": 3,
     "share_affine": "yes"}, {"how": "function", "site": "", "mean": 3, "var": "v"}],
)  # fmt: skip
def test_a_damaged_step_in_a_file_is_one_clear_error(tmp_path: Any, step: Any) -> None:
    recipe = {"version": 2, "edits": [{"norm": ["net.bn"], "into": [], "unshare": step}]}
    bnfix.save(triplet(), tmp_path / "w.pt", recipe=recipe)
    with pytest.raises(bnfix.errors.LoadError, match="recipe in it is damaged"):
        bnfix.load(tmp_path / "w.pt", arch=triplet)


@pytest.mark.parametrize("calls", [0, 10**9, True, "3"])
def test_a_number_of_calls_from_a_file_is_not_believed(tmp_path: Any, calls: Any) -> None:
    step = {"how": "calls", "site": "net.bn", "calls": calls}
    bnfix.save(triplet(), tmp_path / "w.pt", recipe={"version": 2, "edits": [{"norm": ["net.bn"], "into": [],
                                                                              "unshare": step}]})  # fmt: skip
    with pytest.raises(bnfix.errors.LoadError, match=r"does not fit|damaged"):
        bnfix.load(tmp_path / "w.pt", arch=triplet)
