"""All or nothing: the user's model and optimizer, before, after, and when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from nets import bits, same_bits
from swaps.swap_nets import Small, batches, fitted
from torch import Tensor, nn

import bnfix
from bnfix.errors import CalibrationError, PassError
from bnfix.graph import Surgeon
from bnfix.swaps import optimizers

DATA = batches(8, 3, 8, 8)
ALL = ("group", "layer", "instance", "frozen", "sync")


def small() -> nn.Module:
    return fitted(Small(), DATA)


def everything(model: nn.Module) -> Any:
    """All that a call could have left behind: objects, their flags and attributes, hooks, random numbers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return (
        {k: (id(m), m.training, sorted(vars(m)), list(m._forward_hooks)) for k, m in modules.items()},
        {k: list(m._forward_pre_hooks) for k, m in modules.items()},
        {k: (id(p), p.requires_grad) for k, p in model.named_parameters()},
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("to", ALL)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_copy_by_default_and_the_model_is_as_it_was(to: str, dry_run: bool) -> None:
    model = small()
    before, values = everything(model), bits(model)
    result = bnfix.swap(model, to, data=DATA, dry_run=dry_run)
    assert everything(model) == before
    assert same_bits(model, values)
    assert len(result.edits) == 3
    assert (result.model is None) == dry_run
    if result.model is not None:
        mine = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
        assert not mine & {t.data_ptr() for t in (*result.model.parameters(), *result.model.buffers()) if t.numel()}
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.model.modules())


@pytest.mark.parametrize("to", ALL)
def test_a_dry_run_says_what_the_run_does(to: str) -> None:
    model = small()
    dry, real = bnfix.swap(model, to, data=DATA, dry_run=True), bnfix.swap(model, to, data=DATA)
    assert dry.edits == real.edits
    assert dry.refusals == real.refusals
    assert dry.recipe == real.recipe
    assert dry.dry_run


@pytest.mark.parametrize("to", ALL)
def test_in_place_is_the_copy(to: str) -> None:
    model = small()
    made = bnfix.swap(model, to, data=DATA).model
    convolution = model.c1
    result = bnfix.swap(model, to, data=DATA, inplace=True)
    assert result.model is model
    assert model.c1 is convolution
    assert model.state_dict().keys() == made.state_dict().keys()
    for key, value in made.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert {k: p.requires_grad for k, p in model.named_parameters()} == {
        k: p.requires_grad for k, p in made.named_parameters()
    }


def _breaking_loader(error: BaseException) -> Iterator[Tensor]:
    yield DATA[0]
    raise error


LEFT = {"calls": 100}


class Raising(Small):
    """Raises in one of its forwards, of whichever copy."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        LEFT["calls"] -= 1
        if LEFT["calls"] == 0:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "call"),
    # in the last two forwards a single sample is tried, which a model may refuse: that is told, and no error
    [*[(RuntimeError("mine"), PassError, n) for n in range(1, 9)],
     *[(KeyboardInterrupt(), KeyboardInterrupt, n) for n in range(1, 11)]],
)  # fmt: skip
def test_a_forward_that_fails_leaves_everything(
    inplace: bool, error: BaseException, raised: type[BaseException], call: int
) -> None:
    model = fitted(Raising(error), DATA)
    LEFT["calls"] = call
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before, values = everything(model), bits(model)
    with pytest.raises(raised):
        bnfix.swap(model, data=DATA, inplace=inplace, optimizer=optimizer if inplace else None)
    LEFT["calls"] = 100
    assert everything(model) == before
    assert same_bits(model, values)


def test_data_that_fails_is_named() -> None:
    model = small()
    with pytest.raises(CalibrationError, match="batch 1 of the data raised ZeroDivisionError"):
        bnfix.swap(model, data=_breaking_loader(ZeroDivisionError("x")))
    with pytest.raises(KeyboardInterrupt):
        bnfix.swap(model, data=_breaking_loader(KeyboardInterrupt()))
    with pytest.raises(CalibrationError, match="no batch"):
        bnfix.swap(model, data=[])
    with pytest.raises(CalibrationError, match="batch 1, input 0: NaN or Inf"):
        bnfix.swap(model, data=[DATA[0], DATA[1] * torch.inf])


@pytest.mark.parametrize("at", range(1, 12))
def test_ctrl_c_in_the_middle_of_the_surgery_takes_it_back(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slots, then the optimizer: wherever it comes, model and optimizer are as they were."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    F.mse_loss(model(DATA[0]), torch.zeros(8, 5)).backward()
    optimizer.step()
    optimizer.zero_grad()
    before, values = everything(model), bits(model)
    groups = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    state = {id(k): v["momentum_buffer"].clone() for k, v in optimizer.state.items()}
    count = [0]

    def interrupted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], Surgeon) and args[0].memo is not None:
                return real(*args, **kwargs)  # on a copy
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
            value = real(*args, **kwargs)
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
            return value

        return call

    monkeypatch.setattr(Surgeon, "put", interrupted(Surgeon.put))
    from bnfix.swaps import swapping

    monkeypatch.setattr(swapping, "bring_along", interrupted(optimizers.bring_along))
    try:
        bnfix.swap(model, data=DATA, inplace=True, optimizer=optimizer)
    except KeyboardInterrupt:
        assert everything(model) == before
        assert same_bits(model, values)
        assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == groups
        assert {id(k): True for k in optimizer.state} == dict.fromkeys(state, True)
        assert all(torch.equal(v["momentum_buffer"], state[id(k)]) for k, v in optimizer.state.items())
    else:
        assert at > 8
        assert isinstance(model.bn1, nn.GroupNorm)


def test_new_norms_that_the_code_does_not_expect_fail_before_anything_is_changed() -> None:
    class Asking(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.bn1.running_var.mean()

    model = fitted(Asking(), DATA)
    values = bits(model)
    with pytest.raises(PassError, match="running_var") as caught:
        bnfix.swap(model, data=DATA, inplace=True)
    assert "only=" in caught.value.hint
    assert same_bits(model, values)
    assert isinstance(model.bn1, nn.BatchNorm2d)
    assert len(bnfix.swap(model, only="bn[23]", data=DATA).edits) == 2


def test_activations_that_are_no_numbers_are_an_error() -> None:
    model = small()
    with torch.no_grad():
        model.c2.weight.fill_(float("inf"))
    with pytest.raises(CalibrationError, match="bn2: activations there are NaN or Inf"):
        bnfix.swap(model, data=DATA)


def test_a_model_that_swallows_exceptions_hides_nothing() -> None:
    class Swallowing(Small):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:  # noqa: BLE001
                return x.new_zeros(len(x), 5)

    model = fitted(Swallowing(), DATA)
    with torch.no_grad():
        model.c2.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        bnfix.swap(model, data=DATA)


def test_the_result_has_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[int] = []
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(1)
            self.last = self.c1(x)
            return super().forward(x)

    model = fitted(Counting(), DATA)
    model.calls.clear()
    model.last = None
    result = bnfix.swap(model, data=DATA)
    assert result.model.calls == []
    assert result.model.last is None
    assert model.calls == []
    assert model.last is None


# ---------------------------------------------------------------------------------------- optimizers


OPTIMIZERS = [
    pytest.param(lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), id="sgd"),
    pytest.param(lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True), id="adamw"),
    pytest.param(lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"), id="lbfgs"),
]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(DATA[0]), torch.ones(8, 5))
        loss.backward()
        return loss

    return optimizer.step(closure).item()


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("to", ALL)
def test_the_optimizer_goes_on_with_the_new_parameters(make: Any, to: str) -> None:
    """With others it keeps the old ones, and the new norms never learn."""
    model = small().train()
    optimizer = make(model.parameters())
    step(model, optimizer)
    kept = {k: v for k, v in optimizer.state.items() if k is model.c1.weight}
    order = [n for n, _ in model.named_parameters()]
    result = bnfix.swap(model, to, data=DATA, inplace=True, optimizer=optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in model.parameters() if p.requires_grad]
    assert [n for n in order if n in dict(model.named_parameters())] == [n for n, _ in model.named_parameters()]
    for key, value in kept.items():
        assert not isinstance(optimizer, torch.optim.LBFGS) and optimizer.state[key] is value  # noqa: PT018
    mine = {id(p) for p in model.parameters()}
    assert all(id(p) in mine for p in optimizer.state)
    before = bits(model)
    losses = [step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    if to != "frozen":
        assert not torch.equal(before["bn1.weight"], model.bn1.weight)
    else:
        assert torch.equal(before["bn1.weight"], model.bn1.weight)
        assert torch.equal(before["bn1.running_mean"], model.bn1.running_mean)
    if to in ("group", "layer", "instance"):
        assert any(n.startswith("optimizer: 6 parameters replaced in its groups") for n in result.notes)
        assert any("starts anew" in n for n in result.notes)


def test_groups_with_names_and_rates_of_their_own_are_kept() -> None:
    model = fitted(Small(norm=timm.layers.BatchNormAct2d), DATA)
    norms = [(n, p) for n, p in model.named_parameters() if "bn" in n]
    rest = [(n, p) for n, p in model.named_parameters() if "bn" not in n]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": norms, "lr": 0.5, "weight_decay": 0.0}], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    bnfix.swap(model, data=DATA, inplace=True, optimizer=optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    assert optimizer.param_groups[1]["param_names"] == [n for n, _ in model.named_parameters() if "bn" in n]
    assert optimizer.param_groups[1]["param_names"][0].endswith(".norm.weight")
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05)


def test_an_optimizer_that_was_not_given_is_spoken_of() -> None:
    assert any("give it as optimizer=" in n for n in bnfix.swap(small(), data=DATA, inplace=True).notes)
    assert not any("optimizer" in n for n in bnfix.swap(small(), "sync", data=DATA, inplace=True).notes)


def test_marks_on_parameters_are_kept() -> None:
    model = small()
    model.bn1.weight._no_weight_decay = True
    assert bnfix.swap(model, data=DATA).model.bn1.weight._no_weight_decay is True
    assert bnfix.swap(model, data=DATA, inplace=True).model.bn1.weight._no_weight_decay is True
