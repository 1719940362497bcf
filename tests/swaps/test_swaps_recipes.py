"""A swapped state_dict carries its recipe: load builds the same model again, a raw strict load fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
from nets import lived_in
from safetensors.torch import load_file
from swaps.swap_nets import Activated, Head, Small, batches, fitted
from torch import nn

import bnfix
from bnfix.errors import LoadError
from bnfix.graph import FrozenBatchNorm

DATA = batches(8, 3, 8, 8)


class Fused(Small):
    """With fused activations."""

    def __init__(self) -> None:
        super().__init__(norm=timm.layers.BatchNormAct2d)


class Several(nn.Module):
    """A shared norm, one of another class, one with a submodule, one without an affine, and one that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.alias = self.bn
        self.sync, self.act = nn.SyncBatchNorm(16), Activated(16)
        self.bare, self.fc, self.kept = nn.BatchNorm2d(16, affine=False), nn.Linear(16, 4), nn.BatchNorm1d(4)

    def forward(self, x: Any) -> Any:
        x = self.act(self.sync(self.alias(self.bn(self.conv(x)))))
        return self.kept(self.fc(self.bare(x).mean((2, 3))))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("to", ["group", "layer", "instance", "frozen", "sync"])
@pytest.mark.parametrize("net", [Small, Fused, Several])
def test_what_is_saved_is_loaded_again(net: type[nn.Module], to: str, suffix: str, tmp_path: Path) -> None:
    model = fitted(net(), DATA)
    result = bnfix.swap(model, to, data=DATA)
    path = bnfix.save(result.model, tmp_path / f"swapped{suffix}", recipe=result.recipe)
    loaded = bnfix.load(path, arch=net)
    assert torch.equal(loaded(DATA[0]), result.model(DATA[0]))
    assert {k: type(m) for k, m in loaded.named_modules()} == {k: type(m) for k, m in result.model.named_modules()}
    if net is Several:
        assert loaded.alias is loaded.bn
    trained = {k: p.requires_grad for k, p in result.model.named_parameters()}
    assert {k: p.requires_grad for k, p in loaded.named_parameters()} == trained


@pytest.mark.parametrize("to", ["group", "instance", "frozen", "sync"])
def test_a_raw_strict_load_fails(to: str, tmp_path: Path) -> None:
    result = bnfix.swap(fitted(Small(), DATA), to, data=DATA)
    path = bnfix.save(result.model, tmp_path / "swapped.pt", recipe=result.recipe)
    with pytest.raises(RuntimeError, match="__bnfix__"):
        Small().load_state_dict(torch.load(path, weights_only=True))


def test_a_raw_load_of_safetensors_fails_on_statistics_or_is_the_same_function(tmp_path: Path) -> None:
    model = fitted(Small(), DATA)
    for to in ("group", "frozen"):
        result = bnfix.swap(model, to, data=DATA)
        weights = load_file(bnfix.save(result.model, tmp_path / f"{to}.safetensors", recipe=result.recipe))
        if to == "group":
            with pytest.raises(RuntimeError, match="running_mean"):
                Small().load_state_dict(weights)
        else:
            plain = Small().eval()
            plain.load_state_dict(weights)
            assert torch.equal(plain(DATA[0]), model(DATA[0]))


def test_a_root_that_is_a_norm(tmp_path: Path) -> None:
    x = batches(8, 16, 6, 6)
    result = bnfix.swap(lived_in(nn.BatchNorm2d(16)), data=x)
    path = bnfix.save(result.model, tmp_path / "root.pt", recipe=result.recipe)
    loaded = bnfix.load(path, arch=lambda: nn.BatchNorm2d(16))
    assert isinstance(loaded, nn.GroupNorm)
    assert torch.equal(loaded(x[0]), result.model(x[0]))


def test_one_repair_after_the_other(tmp_path: Path) -> None:
    """Swapped in part, loaded, folded, saved: the file is loaded with both."""
    model = fitted(Small(), DATA)
    swapped = bnfix.swap(model, "group", only=["bn2"], data=DATA)
    first = bnfix.save(swapped.model, tmp_path / "first.pt", recipe=swapped.recipe)
    again = bnfix.swap(bnfix.load(first, arch=Small), "frozen", only=["bn1"], data=DATA)
    second = bnfix.save(again.model, tmp_path / "second.pt", recipe=again.recipe, source=bnfix.info(first))
    middle = bnfix.load(second, arch=Small)
    assert isinstance(middle.bn2, nn.GroupNorm)
    assert isinstance(middle.bn1, FrozenBatchNorm)
    folded = bnfix.fold(middle, DATA[0])
    assert len(folded.edits) == 2
    third = bnfix.save(folded.model, tmp_path / "third.safetensors", recipe=folded.recipe, source=bnfix.info(second))
    last = bnfix.load(third, arch=Small)
    assert [type(m).__name__ for m in (last.bn1, last.bn2, last.bn3)] == ["Identity", "GroupNorm", "Identity"]
    assert torch.equal(last(DATA[0]), folded.model(DATA[0]))
    with torch.no_grad():
        torch.testing.assert_close(last(DATA[0]), swapped.model(DATA[0]), rtol=1e-4, atol=1e-4)
    assert json.loads(bnfix.info(third).to_dict() and json.dumps(bnfix.info(third).recipe))["before"]["before"]["edits"]


def test_recalibrate_in_between_keeps_the_recipe(tmp_path: Path) -> None:
    model = fitted(Head(8), DATA)
    swapped = bnfix.swap(model, data=DATA)
    path = bnfix.save(swapped.model, tmp_path / "s.pt", recipe=swapped.recipe)
    loaded = bnfix.load(path, arch=lambda: Head(8))
    bnfix.recalibrate(loaded, DATA)
    from bnfix.api import update_file

    update_file(loaded, tmp_path / "r.pt", source=bnfix.info(path))
    again = bnfix.load(tmp_path / "r.pt", arch=lambda: Head(8))
    assert torch.equal(again(DATA[0]), loaded(DATA[0]))
    assert isinstance(again.bn, nn.GroupNorm)


def test_another_architecture_is_a_clear_error(tmp_path: Path) -> None:
    result = bnfix.swap(fitted(Small(), DATA), data=DATA)
    path = bnfix.save(result.model, tmp_path / "s.pt", recipe=result.recipe)
    with pytest.raises(LoadError, match="swapped in another model: --arch does not fit"):
        bnfix.load(path, arch=lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(LoadError, match="3 norms swapped by bnfix"):
        bnfix.load(path)


@pytest.mark.parametrize(
    "to",
    [
        {"class": "Linear", "args": {"in_features": 3, "out_features": 3}},
        {"class": "__import__", "args": {}},
        {"class": "GroupNorm", "args": {"num_groups": 5, "num_channels": 16}},
        {"class": "GroupNorm", "args": {"num_groups": 0, "num_channels": 16}},
        {"class": "GroupNorm", "args": {"num_groups": "os.system", "num_channels": 16}},
        {"class": "GroupNorm", "args": {"num_channels": 16}},
        {"class": "GroupNorm", "args": {"num_groups": 1, "num_channels": 1 << 40}},
        {"class": "LayerNorm", "args": {"normalized_shape": [1 << 40]}},
        {"class": "LayerNorm", "args": {"normalized_shape": [1 << 20, 1 << 20]}},
        {"class": "GroupNorm", "args": {"num_groups": 1, "num_channels": 16, "device": "cuda"}},
        {"class": "SyncBatchNorm", "args": {"num_features": 16, "process_group": 3}},
        {"class": "GroupNorm"},
        {"args": {}},
        7,
    ],
)
def test_a_recipe_is_not_believed(to: Any, tmp_path: Path) -> None:
    result = bnfix.swap(fitted(Small(), DATA), data=DATA)
    recipe = {**result.recipe, "edits": [{"norm": ["bn1"], "to": to, "keep": [], "into": []}]}
    torch.save({**result.model.state_dict(), "__bnfix__": json.dumps(recipe)}, tmp_path / "bad.pt")
    with pytest.raises(LoadError):
        bnfix.load(tmp_path / "bad.pt", arch=Small)


def test_a_recipe_without_end_is_damaged(tmp_path: Path) -> None:
    result = bnfix.swap(fitted(Small(), DATA), data=DATA)
    recipe: dict[str, Any] = dict(result.recipe)
    for _ in range(40):
        recipe = {**result.recipe, "before": recipe}
    torch.save({**result.model.state_dict(), "__bnfix__": json.dumps(recipe)}, tmp_path / "deep.pt")
    with pytest.raises(LoadError, match="damaged"):
        bnfix.load(tmp_path / "deep.pt", arch=Small)
