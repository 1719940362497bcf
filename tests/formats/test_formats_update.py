"""A file written again: the tensors that have changed are new, everything else in it is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from formats_nets import Net, Tied, net, trained
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bnfix.errors import BnfixError
from bnfix.formats import load, save, sniff
from bnfix.formats.updating import update


def moved(model: nn.Module) -> str:
    """Move one running mean of ``model``; its name."""
    name = next(k for k in model.state_dict() if k.endswith("running_mean"))
    model.state_dict()[name].add_(3.0)
    return name


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    assert list(a) == list(b)
    return [k for k in a if not torch.equal(a[k], b[k])]


def content(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and tensors of a safetensors file, sorted by name."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {k: file.get_tensor(k) for k in sorted(file.keys())}


def again(path: Path, out: str = "new.pt", **kwargs: Any) -> tuple[str, tuple[str, ...], Path]:
    """``path`` loaded into a Net, one mean moved, written to ``out``: that mean's name, what was said, where it is."""
    loaded = load(path, arch=None if kwargs.get("trust") else Net, trust=kwargs.get("trust", False))
    name = moved(loaded.value)
    target = path.with_name(out)
    return name, update(loaded.value, target, source=loaded.info, **kwargs), target


@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_keeps_its_wrapper_its_names_and_what_lies_beside_the_weights(
    tmp_path: Path, old_format: bool
) -> None:
    state = {f"module.{k}": v for k, v in net().state_dict().items()}
    ema = {k: v + 1 for k, v in state.items() if v.is_floating_point()}
    checkpoint = {"epoch": 7, "state_dict": state, "optimizer": {"lr": 0.1, "m": [torch.ones(2)]}, "old": ema}
    torch.save(checkpoint, tmp_path / "c.pt", _use_new_zipfile_serialization=not old_format)
    name, said, target = again(tmp_path / "c.pt")
    more = "the weights under 'old' too; to do these, save them as a file of their own"
    assert said == (f"written into 'state_dict': all else in the checkpoint is as it was, {more}",)
    found = torch.load(target, weights_only=True)
    assert differing(found["state_dict"], state) == [f"module.{name}"]
    assert torch.equal(found["state_dict"][f"module.{name}"], state[f"module.{name}"] + 3)
    assert differing(found["old"], ema) == []
    assert (found["epoch"], found["optimizer"]["lr"]) == (7, 0.1)
    assert torch.equal(found["optimizer"]["m"][0], torch.ones(2))


def test_the_version_of_each_module_stays(tmp_path: Path) -> None:
    """Without it torch takes a file for one of before 0.4.1."""
    torch.save(net().state_dict(), tmp_path / "w.pt")
    name, said, target = again(tmp_path / "w.pt")
    found = torch.load(target, weights_only=True)
    assert said == ()
    assert found._metadata == net().state_dict()._metadata
    assert differing(found, net().state_dict()) == [name]


def test_averaged_weights_keep_their_counter_and_prefix(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(net(), use_buffers=True)
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    name, said, target = again(tmp_path / "swa.pt")
    assert said == ("the names in the file are as they were, with 'module.'",)
    fresh = torch.optim.swa_utils.AveragedModel(Net(), use_buffers=True)
    fresh.load_state_dict(torch.load(target, weights_only=True))
    assert differing(dict(fresh.state_dict()), dict(averaged.state_dict())) == [f"module.{name}"]


def test_half_precision_weights_stay_what_they_are(tmp_path: Path) -> None:
    """The model is float32; only what changed takes its type, since statistics can leave the range of float16."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in net().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    name, _, target = again(tmp_path / "w.pt")
    found = torch.load(target, weights_only=True)
    assert {k: v.dtype for k, v in found.items() if v.dtype == torch.float32} == {name: torch.float32}


def test_safetensors_keep_their_metadata_and_shared_tensors(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "w.safetensors", metadata={"format": "pt", "trained_by": "me"})
    name, _, target = again(tmp_path / "w.safetensors", "new.safetensors")
    metadata, found = content(target)
    assert metadata == {"format": "pt", "trained_by": "me"}
    assert differing(found, dict(sorted(net().state_dict().items()))) == [name]
    save(trained(Tied()), tmp_path / "t.safetensors")
    loaded = load(tmp_path / "t.safetensors", arch=Tied)
    update(loaded.value, tmp_path / "t2.safetensors", source=loaded.info)
    before, after = content(tmp_path / "t.safetensors"), content(tmp_path / "t2.safetensors")
    assert "b.weight" in before[0]
    assert after[0] == before[0]
    assert differing(after[1], before[1]) == []


def test_a_pickled_module_is_put_back_where_it_was(tmp_path: Path) -> None:
    torch.save({"model": net(), "epoch": 3}, tmp_path / "c.pt")
    name, said, target = again(tmp_path / "c.pt", trust=True)
    assert said == ("written into 'model': all else in the checkpoint is as it was",)
    found = torch.load(target, weights_only=False)
    assert found["epoch"] == 3
    assert differing(dict(found["model"].state_dict()), dict(net().state_dict())) == [name]
    torch.save(net(), tmp_path / "m.pt")
    name, said, target = again(tmp_path / "m.pt", trust=True)
    assert said == ()
    assert differing(dict(torch.load(target, weights_only=False).state_dict()), dict(net().state_dict())) == [name]


def test_another_format_has_the_weights_alone_and_says_so(tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict(), "epoch": 7}, tmp_path / "c.pt")
    name, said, target = again(tmp_path / "c.pt", "w.safetensors")
    assert said == (f"the weights alone were written: what lies beside 'state_dict' in {tmp_path / 'c.pt'} was not",)
    assert differing(dict(load(target, arch=Net).value.state_dict()), dict(net().state_dict())) == [name]


class Renaming(Net):
    """Brings old names into its own form when it loads."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [k for k in state if k.startswith(f"{prefix}old_")]:
            state[key.replace("old_", "")] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *args)


def test_names_that_a_load_hook_changed_are_not_guessed(tmp_path: Path) -> None:
    state = {f"old_{k}": v for k, v in net().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "c.pt")
    loaded = load(tmp_path / "c.pt", arch=Renaming)
    moved(loaded.value)
    before = (tmp_path / "c.pt").read_bytes()
    with pytest.raises(BnfixError, match="can't be written again with all that is in it"):
        update(loaded.value, tmp_path / "c.pt", source=loaded.info, inplace=True)
    assert (tmp_path / "c.pt").read_bytes() == before
    update(loaded.value, tmp_path / "new.pt", source=loaded.info)
    assert torch.load(tmp_path / "new.pt", weights_only=True).keys() == net().state_dict().keys()


def test_in_place_needs_the_word(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", arch=Net)
    name = moved(loaded.value)
    with pytest.raises(BnfixError, match="is the input"):
        update(loaded.value, tmp_path / "w.pt", source=loaded.info)
    update(loaded.value, tmp_path / "w.pt", source=loaded.info, inplace=True)
    assert differing(torch.load(tmp_path / "w.pt", weights_only=True), dict(net().state_dict())) == [name]


def test_folded_weights_keep_their_recipe(tmp_path: Path) -> None:
    import bnfix

    result = bnfix.fold(net(), torch.randn(2, 3, 8, 8))
    save(result.model, tmp_path / "f.pt", recipe=result.recipe)
    loaded = load(tmp_path / "f.pt", arch=Net)
    for target in ("g.pt", "g.safetensors"):
        update(loaded.value, tmp_path / target, source=loaded.info)
        assert sniff(tmp_path / target).recipe["edits"] == loaded.info.recipe["edits"]
        load(tmp_path / target, arch=Net)
