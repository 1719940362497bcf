"""Writing: every format that writes gives back the same model; a target is the old file or the new one, never less."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from formats_nets import IMAGE, VECTOR, Net, Tied, net, trained
from safetensors import safe_open
from safetensors.torch import load_model
from torch import nn

from bnfix.errors import BnfixError, LoadError
from bnfix.files import atomic_path, check_target
from bnfix.formats import load, save, sniff
from bnfix.formats.saving import known_suffixes
from bnfix.running import Call

# ---------------------------------------------------------------------------------------- the law of formats


@pytest.mark.parametrize("suffix", known_suffixes())
@pytest.mark.parametrize(("make", "x"), [(Net, IMAGE), (Tied, VECTOR)])
def test_law_save_then_load_gives_the_same_outputs(tmp_path, suffix, make, x):
    model = trained(make())
    path = save(model, tmp_path / f"w{suffix}", calls=[Call((x,))])
    assert path == tmp_path / f"w{suffix}"
    again = load(path, arch=None if suffix == ".pt2" else make).value
    assert torch.equal((again.module() if suffix == ".pt2" else again)(x), model(x))
    for name, tensor in model.state_dict().items():
        state = again.state_dict if suffix == ".pt2" else again.state_dict()
        assert torch.equal(tensor, state[name]), name
    assert os.listdir(tmp_path) == [path.name]


def test_every_suffix_of_the_design_is_known():
    assert set(known_suffixes()) == {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pt2"}
    with pytest.raises(ValueError, match=r"\.safetensors.*not as \.txt"):
        save(net(), "w.txt")
    with pytest.raises(ValueError, match="no such ending"):
        save(net(), "w")


@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "best.PT.TAR"])
def test_the_ending_of_pytorchs_own_example_scripts(tmp_path, name):
    """It is no archive; a file with this ending could be read and not be written, not in place either."""
    save(net(), tmp_path / name)
    assert torch.equal(load(tmp_path / name, arch=Net).value(IMAGE), net()(IMAGE))
    with pytest.raises(ValueError, match=r"not as \.tar"):
        save(net(), tmp_path / "weights.tar")


def test_a_pt_file_is_a_plain_state_dict_that_torch_loads_safely(tmp_path):
    save(net(), tmp_path / "w.pt")
    fresh = Net()
    fresh.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(fresh.eval()(IMAGE), net()(IMAGE))


def test_shared_tensors_in_safetensors_are_stored_once_and_the_library_finds_them(tmp_path):
    model = trained(Tied())
    save(model, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - {"b.weight", "b.bias"}
        assert file.metadata()["b.weight"] == "a.weight"
    assert sniff(tmp_path / "w.safetensors").tensors == len(model.state_dict())
    pair = nn.Sequential(model.a, model.b)
    save(pair, tmp_path / "p.safetensors")
    other = nn.Linear(6, 6)
    load_model(nn.Sequential(other, other), tmp_path / "p.safetensors")
    assert torch.equal(other(VECTOR), model.a(VECTOR))


def test_a_pickled_module_is_written_only_where_the_input_was_one(tmp_path):
    torch.save(net(), tmp_path / "m.pt")
    source = sniff(tmp_path / "m.pt")
    save(net(), tmp_path / "n.pt", source=source)
    assert sniff(tmp_path / "n.pt").kind == "pickled_module"
    save(net(), tmp_path / "n.safetensors", source=source)
    assert sniff(tmp_path / "n.safetensors").kind == "safetensors"
    save(net(), tmp_path / "o.pt", source=sniff(tmp_path / "n.safetensors"))
    assert sniff(tmp_path / "o.pt").kind == "state_dict"


def test_what_can_not_be_written_leaves_nothing(tmp_path):
    class Extra(Net):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state): ...

    with pytest.raises(LoadError, match="tensors only"):
        save(Extra(), tmp_path / "w.safetensors")
    model = net()
    model.hook = lambda: None
    torch.save(net(), tmp_path / "m.pt")
    with pytest.raises(LoadError, match="can't be saved"):
        save(model, tmp_path / "n.pt", source=sniff(tmp_path / "m.pt"))
    with torch.device("meta"):
        on_meta = Net()
    with pytest.raises(LoadError, match=r"meta|written"):
        save(on_meta, tmp_path / "w.safetensors")
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_file_does_not_depend_on_its_name(tmp_path):
    """torch.save writes the name of the file into it; the temporary one must not show."""
    save(net(), tmp_path / "a.pt")
    save(net(), tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


# ---------------------------------------------------------------------------------------- recipes

RECIPE = {
    "version": 1,
    "edits": [
        {
            "norm": ["stem.1"],
            "keep": [],
            "into": [{"module": "stem.0", "weight": "weight", "bias": True, "channels": 4}],
        }
    ],
}


def folded() -> nn.Module:
    """:func:`net` with ``stem.1`` folded into ``stem.0``, by the formula."""
    model = net()
    conv, norm = model.stem[0], model.stem[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        conv.weight.mul_(scale[:, None, None, None])
        conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    model.stem[1] = nn.Identity()
    return model


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_folded_weights_bring_their_recipe_and_load_into_the_original_class(tmp_path, suffix):
    path = save(folded(), tmp_path / f"f{suffix}", recipe=RECIPE)
    info = sniff(path)
    assert info.recipe["edits"] == RECIPE["edits"]
    assert info.recipe["bnfix"]
    label, _, line = info.advice.partition("   ")
    assert label == "with the architecture that it was made from, for example"
    assert line == f"bnfix export {path} --arch timm:resnet50 -o {tmp_path / 'f.onnx'}"
    assert (info.tensors, len(info.norms)) == (9, 1)  # 13 − 5 of the norm + 1 bias
    loaded = load(path, arch=Net)
    assert torch.equal(loaded.value(IMAGE), folded()(IMAGE))
    # one rounding of the weights, and sums of at most 27 products of numbers around 1
    assert torch.allclose(loaded.value(IMAGE), net()(IMAGE), rtol=1e-4, atol=1e-4)
    assert "1 norm is a placeholder" in loaded.notes[0]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loading_folded_weights_again_and_saving_them_is_idempotent(tmp_path, suffix):
    first = save(folded(), tmp_path / f"f{suffix}", recipe=RECIPE)
    loaded = load(first, arch=Net)
    second = save(loaded.value, tmp_path / f"g{suffix}", recipe=loaded.info.recipe)
    assert torch.equal(load(second, arch=Net).value(IMAGE), folded()(IMAGE))


def test_a_raw_strict_load_of_folded_weights_fails_loudly(tmp_path):
    save(folded(), tmp_path / "f.pt", recipe=RECIPE)
    with pytest.raises(RuntimeError, match="__bnfix__"):
        Net().load_state_dict(torch.load(tmp_path / "f.pt", weights_only=True))

    class Fitting(Net):  # even where every other name fits
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU())

    with pytest.raises(RuntimeError, match="__bnfix__"):
        Fitting().load_state_dict(torch.load(tmp_path / "f.pt", weights_only=True))


def test_without_edits_there_is_no_recipe(tmp_path):
    for recipe in (None, {}, {"version": 1, "edits": []}):
        save(net(), tmp_path / "w.pt", recipe=recipe)
        assert "__bnfix__" not in torch.load(tmp_path / "w.pt", weights_only=True)


def test_a_recipe_of_a_newer_version(tmp_path):
    torch.save({**folded().state_dict(), "__bnfix__": json.dumps({"version": 99, "bnfix": "9.1"})}, tmp_path / "f.pt")
    with pytest.raises(LoadError, match=r"newer bnfix \(9\.1\)") as caught:
        load(tmp_path / "f.pt", arch=Net)
    assert "pip install -U bnfix" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"version": 1}', '{"version": 1, "edits": {}}', '{"version": 1, "edits": [3]}',
     '{"version": 1, "edits": [{"norm": "bn", "into": []}]}', '{"version": 1, "edits": [{"norm": [], "into": []}]}',
     '{"version": 1, "edits": [{"norm": ["bn"], "into": [{"module": "conv"}]}]}', "[" * 100_000,
     '{"version": 1, "edits": [{"norm": ["bn"], "into": [{"module": "conv", "bias": true, "channels": 1e99}]}]}'],
)  # fmt: skip
def test_a_damaged_recipe_is_one_clear_error(tmp_path, text):
    torch.save({**folded().state_dict(), "__bnfix__": text}, tmp_path / "f.pt")
    with pytest.raises(LoadError, match="recipe in it is damaged") as caught:
        load(tmp_path / "f.pt", arch=Net)
    assert "\n" not in caught.value.message


def test_a_recipe_for_another_architecture(tmp_path):
    save(folded(), tmp_path / "f.pt", recipe=RECIPE)
    with pytest.raises(LoadError, match="--arch does not fit"):
        load(tmp_path / "f.pt", arch=lambda: nn.Sequential(nn.Linear(2, 2)))


# ---------------------------------------------------------------------------------------- targets


@pytest.fixture
def old(tmp_path) -> Path:
    (tmp_path / "old.pt").write_bytes(b"old")
    return tmp_path / "old.pt"


def untouched(old: Path) -> bool:
    return old.read_bytes() == b"old" and os.listdir(old.parent) == ["old.pt"]


def test_the_input_is_not_overwritten_without_saying_so(tmp_path):
    source = save(net(), tmp_path / "w.pt")
    (tmp_path / "link.pt").symlink_to(source)
    os.link(source, tmp_path / "hard.pt")
    before = source.read_bytes()
    for target in ("w.pt", "link.pt", "hard.pt", "../" + tmp_path.name + "/w.pt"):
        with pytest.raises(BnfixError, match="is the input") as caught:
            save(trained(Net(), 1), tmp_path / target, source=sniff(source))
        assert "--in-place" in caught.value.hint
        check_target(tmp_path / target, source_path=source, inplace=True)
    with pytest.raises(BnfixError, match="is the input"):
        check_target(source, source_path=tmp_path / "link.pt")
    assert source.read_bytes() == before
    save(trained(Net(), 1), source, source=sniff(source), inplace=True)
    assert torch.equal(load(source, arch=Net).value(IMAGE), trained(Net(), 1)(IMAGE))


def test_targets_that_can_not_be_written(tmp_path, monkeypatch, old):
    (tmp_path / "folder.pt").mkdir()
    for target, message in (
        (tmp_path / "folder.pt", "is a directory"),
        (tmp_path / "none" / "w.pt", "there is no directory"),
        (old / "w.pt", "there is no directory"),
        (Path("/dev/null"), "no regular file"),
        (tmp_path / ("x" * 300 + ".pt"), "can't be written"),
        (tmp_path / "a\0b.pt", "can't be written"),
    ):
        with pytest.raises(BnfixError, match=message) as caught:
            check_target(target)
        assert "\n" not in caught.value.message
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BnfixError, match="can't be written"):
        check_target(tmp_path / "loop")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path.resolve())
    with pytest.raises(BnfixError, match="is not writable"):
        check_target(tmp_path / "w.pt")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != old.resolve())
    with pytest.raises(BnfixError, match="read-only"):
        check_target(old)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_leaving_by_any_exception_leaves_the_old_file_and_no_other(old, error):
    def leave() -> None:
        with atomic_path(old) as beside:
            beside.write_bytes(b"half")
            assert beside.parent == old.parent
            raise error

    with pytest.raises(type(error)):
        leave()
    assert untouched(old)


def test_a_full_disk_is_a_clear_error(old):
    with pytest.raises(BnfixError, match=r"old\.pt can't be written: No space left on device"), atomic_path(old):
        raise OSError(28, "No space left on device")
    assert untouched(old)


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_disk_that_fills_while_weights_are_written(tmp_path, suffix):
    """Whatever format: it is the system that refuses, and another format would not help."""
    import resource

    target = tmp_path / f"out.{suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(BnfixError, match=f"^{re.escape(str(target))} can't be written: ") as caught:
            save(nn.Linear(1000, 100), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.hint is None
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_torch_writes(old, monkeypatch):
    def interrupted(content, file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(net(), old)
    assert untouched(old)


def test_the_content_is_on_disk_before_it_is_moved_into_place(old, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    with atomic_path(old) as beside:
        beside.write_bytes(b"new")
    assert events == ["fsync", "replace", "fsync"]  # the file, the move, the directory
    assert old.read_bytes() == b"new"


def test_permissions_are_those_of_the_replaced_file_or_of_any_new_one(tmp_path, old):
    old.chmod(0o640)
    new = tmp_path / "new.pt"
    save(net(), old)
    save(net(), new)
    save(net(), tmp_path / "new.safetensors")
    (tmp_path / "plain").touch()
    plain = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) == plain
    assert stat.S_IMODE((tmp_path / "new.safetensors").stat().st_mode) == plain


def test_a_link_stays_a_link(tmp_path, old):
    (tmp_path / "link.pt").symlink_to(old)
    save(net(), tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert sniff(old).kind == "state_dict"


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("x" * 252 + ".pt")
    save(net(), path)
    assert sniff(path).kind == "state_dict"
