"""What to type next for a file: lines that a shell takes as they are."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from formats_nets import Net
from safetensors.torch import save_file
from torch import nn

from bnfix.errors import LoadError
from bnfix.formats import load, sniff
from bnfix.formats.advice import example_arch, module_classes
from bnfix.formats.specs import build, meant, parse_spec, resolve

SOURCE = """
import torch
from torch import nn
raise SystemExit("it is read, not run")

class Block(nn.Module):
    pass

class Config:
    pass

class Tall(nn.Module):
    def __init__(self):
        self.block = Block()
"""


def commands(advice: str) -> list[list[str]]:
    """The commands in an advice or a hint, as a shell would split them."""
    lines = [line.partition("   ")[2].strip() or line for line in advice.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("bnfix ")]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _files() -> dict[str, object]:
    net, plain = Net(), nn.Sequential(nn.Conv2d(3, 4, 1))
    return {
        "state.pt": net.state_dict(),
        "with space & sign.pt": net.state_dict(),
        "whole.pt": net,
        "plain.pt": plain,
        "no_norm.pth": plain.state_dict(),
        "objects.ckpt": {"state_dict": net.state_dict(), "args": Namespace(lr=1)},
    }


@pytest.mark.parametrize("name", [*_files(), "w.safetensors"])
def test_every_command_that_info_proposes_is_whole_and_harmless_to_a_shell(name: str) -> None:
    if name.endswith(".safetensors"):
        save_file({k: v.contiguous() for k, v in Net().state_dict().items()}, name)
    else:
        torch.save(_files()[name], name)
    found = commands(sniff(name).advice)
    assert found
    for words in found:
        assert words[1] in ("fold", "export")
        assert words[2] in (name, "weights.pt")
        assert words[-2] == "-o"
        assert not {"|", "...", "…", "&", "<", ">"} & set(words)
        assert "--trust" in words or "--arch" in words
    assert found[0][-1] != name


def test_a_pickled_module_without_norms_is_exported_not_folded() -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)), "plain.pt")
    assert commands(sniff("plain.pt").advice)[0] == ["bnfix", "export", "plain.pt", "--trust", "-o", "plain.onnx"]
    torch.save(Net(), "net.pt")
    assert commands(sniff("net.pt").advice)[0] == ["bnfix", "fold", "net.pt", "--trust", "-o", "net-folded.pt"]


def test_objects_beside_the_weights_give_a_command_with_both_options() -> None:
    torch.save(_files()["objects.ckpt"], "objects.ckpt")
    with pytest.raises(LoadError) as caught:
        load("objects.ckpt", arch=Net)
    assert "--arch timm:resnet50 --trust -o objects-folded.ckpt" in (caught.value.hint or "")
    assert "..." not in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("resnet18", "timm:resnet18"), ("torchvision:vgg11", "torchvision:vgg11"), ("$(rm x)", "timm:resnet50")],
)
def test_the_architecture_that_a_checkpoint_names_is_the_example(arch: str, expected: str) -> None:
    torch.save({"arch": arch, "state_dict": Net().state_dict()}, "c.pt")
    info = sniff("c.pt")
    assert commands(info.advice)[0][4] == expected
    assert info.facts["arch"] == arch
    with pytest.raises(LoadError, match="of which architecture") as caught:
        load("c.pt")
    assert commands(caught.value.hint or "")[0][4] == expected


def test_a_class_beside_the_weights_is_the_example_and_is_not_run() -> None:
    assert example_arch("net.pt") == "timm:resnet50"
    Path("net.py").write_text(SOURCE)
    assert module_classes(Path("net.py")) == ("Tall", "Block")  # what the file itself uses comes last
    assert example_arch("net.pt") == "net.py:Tall"
    assert example_arch("other.pt") == "net.py:Tall"  # the only one there is
    Path("second.py").write_text(SOURCE)
    assert example_arch("other.pt") == "timm:resnet50"  # nobody can tell
    assert example_arch("net.pt") == "net.py:Tall"


def test_batches_beside_the_class_are_what_it_is_run_on() -> None:
    Path("net.py").write_text(f"{SOURCE}\ndef batches():\n    yield torch.zeros(1)\n")
    torch.save(Net().state_dict(), "net.pt")
    assert commands(sniff("net.pt").advice) == [
        shlex.split("bnfix fold net.pt --arch net.py:Tall --data net.py:batches -o net-folded.pt")
    ]


@pytest.mark.parametrize("source", [b"class A(", b"\0", b"\xff\xfe", b"(" * 5000, b""])
def test_a_file_that_is_no_python_has_no_classes(source: bytes) -> None:
    Path("broken.py").write_bytes(source)
    assert module_classes(Path("broken.py")) == ()


def test_a_spec_that_is_none_is_answered_with_what_was_meant() -> None:
    Path("mynet.py").write_text(SOURCE)
    assert meant("mynet.Tall") == "did you mean   --arch mynet:Tall\ndid you mean   --arch mynet.py:Tall"
    assert meant("mynet.py") == "did you mean   --arch mynet.py:Tall\ndid you mean   --arch mynet.py:Block"
    assert "no file gone.py" in meant("gone.py")
    assert meant("no such thing").startswith("--arch takes timm:resnet50")
    with pytest.raises(LoadError) as caught:
        build("mynet.Tall")
    assert "mynet:Tall" in (caught.value.hint or "")


def test_a_name_of_a_hub_without_the_hub() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    assert meant("resnet18") == "did you mean   --arch timm:resnet18\ndid you mean   --arch torchvision:resnet18"


def test_a_wrong_argument_is_answered_with_those_that_there_are() -> None:
    Path("wide.py").write_text(
        "from torch import nn\nclass Wide(nn.Module):\n    def __init__(self, width=3, *, depth=2, **rest: int):\n"
        "        super().__init__()\n        assert not rest\n"
    )
    with pytest.raises(LoadError) as caught:
        build("wide.py:Wide", {"1x": 3, "width": 1, "self": 2})
    assert caught.value.hint == "it takes width, depth:  --arch-kw name=value"


def test_a_missing_import_of_a_file_says_where_it_lies_or_how_to_get_it() -> None:
    Path("pkg/inner").mkdir(parents=True)
    Path("pkg/helper_of_pkg.py").write_text("x = 1\n")
    Path("pkg/inner/a.py").write_text("import helper_of_pkg\n")
    Path("pkg/inner/b.py").write_text("import not_there_at_all.sub\n")
    with pytest.raises(LoadError) as caught:
        build("pkg/inner/a.py:Net")
    assert (
        caught.value.hint
        == f"helper_of_pkg lies in {Path('pkg').resolve()}:  export PYTHONPATH={Path('pkg').resolve()}"
    )
    with pytest.raises(LoadError) as caught:
        build("pkg/inner/b.py:Net")
    assert "pip install not_there_at_all\n" in (caught.value.hint or "")


def test_onnx_counts_its_bytes_and_is_for_verify() -> None:
    onnx = pytest.importorskip("onnx")
    weights = [
        onnx.numpy_helper.from_array(torch.zeros(6, 3, 1, 1).numpy(), "w"),
        onnx.numpy_helper.from_array(torch.zeros(5, dtype=torch.int64).numpy(), "i"),
        onnx.numpy_helper.from_array(torch.zeros(7, dtype=torch.float16).numpy(), "h"),
    ]
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1, 3, 4, 4])], [value("y", 1, [1, 6, 4, 4])], weights)
    onnx.save(onnx.helper.make_model(graph), "m.onnx")
    info = sniff("m.onnx")
    assert info.bytes == 6 * 3 * 4 + 5 * 8 + 7 * 2
    assert commands(info.advice) == [["bnfix", "verify", "weights.pt", "m.onnx", "--arch", "timm:resnet50"]]


def test_a_directory_gets_a_next_step() -> None:
    Path("adir").mkdir()
    with pytest.raises(LoadError) as caught:
        sniff("adir")
    assert "name a file of weights" in (caught.value.hint or "")


def test_a_wrong_name_in_a_file_is_answered_with_those_that_were_written_there(tmp_path):
    """What the file imports came first: BatchSampler, ChainDataset … of a ``from torch.utils.data import *``."""
    file = tmp_path / "loader.py"
    file.write_text("from torch.utils.data import *\ndef make(): ...\ndef other(): ...\n")
    with pytest.raises(LoadError, match="has no zz") as caught:
        resolve(parse_spec(f"{file}:zz"))
    assert caught.value.hint == "it has make, other"
