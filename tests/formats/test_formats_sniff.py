"""What a file is, by its content alone; and that what is listed is what torch reads."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from formats_nets import IMAGE, Net, Tied, net, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from bnfix.errors import LoadError, UnknownFormatError, UntrustedModelError
from bnfix.formats import load, save, sniff
from bnfix.formats.base import Probe
from bnfix.formats.names import open_wrappers
from bnfix.formats.pickles import machine
from bnfix.formats.pickles.contents import contents
from bnfix.formats.pickles.machine import examine
from bnfix.formats.recognition import formats
from bnfix.formats.torch_files import _entries, _sort

MEMBERS = {"empty": b"", "zeros": b"\0" * 400, "text": b"hello there\n" * 40, "dot": b".", "pickle of None": b"N."}


def listed(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and types as the symbolic reading has them."""
    file = Probe(path, path.stat().st_size)
    if file.is_zip:
        pickle = examine(file.archive.read("data.pkl", 1 << 26))
    else:
        end = 0
        for _ in range(4):  # the magic number, the protocol, the system, the object
            pickle = examine(file.pickled, end)
            end = pickle.end
    return {k: (v.shape, v.dtype) for k, v in contents(pickle.value).tensors.items()}


def loaded(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    value = open_wrappers(torch.load(path, weights_only=True), _sort, _entries).value
    return {
        k: (tuple(v.shape), str(v.dtype).removeprefix("torch."))
        for k, v in value.items()
        if isinstance(v, torch.Tensor)
    }


# ---------------------------------------------------------------------------------------- torch's own files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict_is_known_in_both_containers_and_every_protocol(tmp_path, zipped, protocol):
    path = tmp_path / "w.pt"
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    info = sniff(path)
    assert (info.kind, info.container, info.loadable) == ("state_dict", "zip" if zipped else "legacy", True)
    # 3·4·9 + 4+4 | 4·2 + 4 | 4·5 + 5, without the statistics of the two norms
    assert (info.tensors, info.parameters) == (13, 108 + 8 + 12 + 25)
    assert dict(info.dtypes) == {"float32": 11, "int64": 2}
    assert [(n.path, n.channels, n.dtype, n.affine) for n in info.norms] == [
        ("stem.1", 4, "float32", True),
        ("bn", 4, "float32", False),
    ]
    assert not info.names_code
    assert not info.dangerous
    assert listed(path) == {k: (tuple(v.shape), str(v.dtype)[6:]) for k, v in net().state_dict().items()}
    if protocol > 3:
        with pytest.raises(UntrustedModelError, match="pickle_protocol"):
            load(path, arch=Net)
    x = IMAGE
    assert torch.equal(load(path, arch=Net, trust=protocol > 3).value(x), net()(x))


def test_the_old_format_begins_as_the_design_says(tmp_path):
    torch.save({}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert (tmp_path / "w.pt").read_bytes().startswith(bytes.fromhex("80028a0a6cfc9c46f9206aa850192e"))


def test_shared_and_strided_tensors_are_counted_once_and_listed_under_every_name(tmp_path):
    torch.save(trained(Tied()).state_dict(), tmp_path / "w.pt")
    info = sniff(tmp_path / "w.pt")
    # a.weight and b.weight are one tensor; `scratch` is not persistent
    assert (info.tensors, info.parameters) == (8, 36 + 6 + 6 + 6 + 6 + 2)
    assert listed(tmp_path / "w.pt") == loaded(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_listed_without_unpickling_as_its_state_dict(tmp_path, zipped):
    model = nn.Sequential(trained(Net()), trained(Tied()))
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    info = sniff(tmp_path / "m.pt")
    assert info.kind == "pickled_module"
    assert info.root_class == "torch.nn.modules.container.Sequential"
    assert "formats_nets.Net" in info.names_code
    assert not info.dangerous
    expected = {k: (tuple(v.shape), str(v.dtype)[6:]) for k, v in model.state_dict().items()}
    assert listed(tmp_path / "m.pt") == expected
    assert [n.path for n in info.norms] == ["0.stem.1", "0.bn"]


def test_a_module_in_a_wrapper_is_a_pickled_module(tmp_path):
    torch.save({"epoch": 3, "ema": None, "model": net()}, tmp_path / "yolo.pt")
    info = sniff(tmp_path / "yolo.pt")
    assert (info.kind, info.wrapper, info.root_class) == ("pickled_module", "model", "formats_nets.Net")


def test_objects_beside_weights_are_named(tmp_path):
    torch.save({"model": net().state_dict(), "args": Namespace(lr=0.1), "best": np.float64(0.9)}, tmp_path / "c.pt")
    info = sniff(tmp_path / "c.pt")
    assert (info.kind, info.wrapper, info.dangerous) == ("state_dict", "model", ())
    assert "argparse.Namespace" in info.names_code


def test_a_lightning_checkpoint(tmp_path):
    weights = {f"model.{k}": v for k, v in net().state_dict().items()}
    torch.save({"pytorch-lightning_version": "2.4.0", "epoch": 4, "state_dict": weights}, tmp_path / "l.ckpt")
    info = sniff(tmp_path / "l.ckpt")
    assert (info.kind, info.wrapper, info.tensors) == ("lightning", "state_dict", 13)
    assert info.facts["pytorch-lightning_version"] == "2.4.0"
    assert info.facts["epoch"] == 4


def test_wrappers_are_opened_in_the_order_of_the_design_and_the_others_are_named(tmp_path):
    one, two = net().state_dict(), trained(Net(), seed=1).state_dict()
    for order in (
        ["state_dict_ema", "model_ema", "state_dict", "model"],
        ["model_ema", "model"],
        ["state_dict", "model"],
    ):
        torch.save({"epoch": 1, **{k: one if k == order[0] else two for k in reversed(order)}}, tmp_path / "c.pt")
        info = sniff(tmp_path / "c.pt")
        assert info.wrapper == order[0]
        assert set(info.other_wrappers) == set(order[1:])


def test_an_optimizer_or_a_lone_number_is_not_taken_for_weights(tmp_path):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model.train()(torch.randn(2, 3, 7, 7)).sum().backward()
    optimizer.step()
    torch.save(
        {"optimizer": optimizer.state_dict(), "best": torch.tensor(0.5), "x": model.state_dict()}, tmp_path / "c.pt"
    )
    info = sniff(tmp_path / "c.pt")
    assert (info.wrapper, info.tensors, info.other_wrappers) == ("x", 13, ())


def test_several_sets_of_weights_under_other_names_are_not_guessed_at(tmp_path):
    torch.save({"generator": net().state_dict(), "discriminator": net().state_dict()}, tmp_path / "gan.pt")
    info = sniff(tmp_path / "gan.pt")
    assert (info.kind, info.loadable) == ("checkpoint", False)
    with pytest.raises(LoadError, match="generator, discriminator"):
        load(tmp_path / "gan.pt", arch=Net)


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [("module.", "module."), ("_orig_mod.", "_orig_mod."), ("module._orig_mod.", "module._orig_mod.")],
)
def test_prefixes_are_seen_and_norms_named_without_them(tmp_path, prefix, shown):
    torch.save({prefix + k: v for k, v in net().state_dict().items()}, tmp_path / "w.pt")
    info = sniff(tmp_path / "w.pt")
    assert info.prefix == shown
    assert [n.path for n in info.norms] == ["stem.1", "bn"]


def test_a_module_called_module_is_no_prefix(tmp_path):
    torch.save({"module.w": torch.ones(2), "other.w": torch.ones(2)}, tmp_path / "w.pt")
    assert sniff(tmp_path / "w.pt").prefix == ""


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True)
DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
TENSORS = st.builds(
    lambda shape, dtype, cut: torch.zeros(shape, dtype=dtype)[cut:],
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    DTYPES,
    st.integers(0, 1),
)


@settings(max_examples=60)
@given(
    tensors=st.dictionaries(NAMES, TENSORS, min_size=1, max_size=6),
    prefix=st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]),
    wrapper=st.sampled_from([(), ("state_dict",), ("model_ema",), ("model", "state_dict")]),
    container=st.sampled_from(["zip", "legacy", "safetensors"]),
)
def test_property_what_is_listed_is_what_torch_loads(tmp_path_factory, tensors, prefix, wrapper, container):
    path = tmp_path_factory.getbasetemp() / "property.bin"
    weights = {prefix + k: v for k, v in tensors.items()}
    if container == "safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
        wrapper = ()
    else:
        value = weights
        for key in reversed(wrapper):
            value = {"epoch": 1, key: value}
        torch.save(value, path, _use_new_zipfile_serialization=container == "zip")
    info = sniff(path)
    assert info.wrapper == (".".join(wrapper) or None)
    assert info.tensors == len(weights)
    if container == "safetensors":
        assert info.bytes == sum(v.numel() * v.element_size() for v in weights.values())
    else:
        assert listed(path) == {k: (tuple(v.shape), str(v.dtype)[6:]) for k, v in weights.items()} == loaded(path)


# ---------------------------------------------------------------------------------------- the rest


def test_safetensors_with_norms_and_metadata(tmp_path):
    save(net(), tmp_path / "w.safetensors")
    info = sniff(tmp_path / "w.safetensors")
    assert (info.kind, info.tensors, info.parameters, len(info.norms)) == ("safetensors", 13, 153, 2)


def test_a_safetensors_file_whose_name_says_pt(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "w.pt")
    assert sniff(tmp_path / "w.pt").kind == "safetensors"


def test_torchscript_and_exported_programs_are_recognised(tmp_path):
    model = net()
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 7, 7)), str(tmp_path / "s.pt"))
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 7, 7),)), tmp_path / "e.pt2")
    for name, kind in (("s.pt", "torchscript"), ("e.pt2", "exported_program")):
        info = sniff(tmp_path / name)
        assert (info.kind, info.loadable) == (kind, True)
        assert f"bnfix fold {tmp_path / name}" in info.advice


def test_onnx_is_read_without_the_onnx_library(tmp_path):
    onnx = pytest.importorskip("onnx")
    h, t = onnx.helper, onnx.TensorProto
    arrays = {n: onnx.numpy_helper.from_array(np.ones(6, np.float32), n) for n in ("s", "b", "bn.running_mean", "v")}
    node = h.make_node("BatchNormalization", ["x", *arrays], ["y"])
    value = lambda n: h.make_tensor_value_info(n, t.FLOAT, [1, 6, 4, 4])  # noqa: E731
    graph = h.make_graph([node], "g", [value("x")], [value("y")], list(arrays.values()))
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)]), tmp_path / "m.onnx")
    info = sniff(tmp_path / "m.onnx")
    assert (info.kind, info.facts["opset"], info.facts["nodes"], info.tensors) == ("onnx", 17, 1, 4)
    assert [(n.path, n.channels, n.dtype) for n in info.norms] == [("bn", 6, "float32")]
    assert load(tmp_path / "m.onnx").value == tmp_path / "m.onnx"


def test_an_onnx_model_cut_off(tmp_path):
    onnx = pytest.importorskip("onnx")
    weights = onnx.numpy_helper.from_array(np.ones(600, np.float32), "w")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weights]))
    data = model.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data[: len(data) // 2])
    assert sniff(tmp_path / "m.onnx").kind == "truncated"


def _zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights.pt"))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46827520\n"
NO_MODELS = {
    "git_lfs": LFS,
    "html": b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
    "empty": b"",
    "unknown": bytes(range(7, 200)) * 5,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 50,
    "gguf": b"GGUF" + b"\0" * 50,
    "npy": _npy(),
    "npz": _zip(**{"a.npy": _npy()}),
    "zip": _zip(**{"weights.pt": b"x"}),
    "keras": _zip(**{"config.json": b"{}", "model.weights.h5": b"x"}),
    "tar": _tar(),
    "gzip": b"\x1f\x8b\x08" + b"\0" * 50,
    "weights_index": json.dumps({"metadata": {}, "weight_map": {"w": "a.safetensors"}}).encode(),
    "json": b'{"architecture": "resnet18"}',
    "pickle": b"\x80\x04]\x94.",
    "zip ": _zip(**{"repo/code/net.py": b"x", "repo/models/net.json": b"{}"}),
    "truncated": b"PK\x03\x04" + b"\0" * 90,
}


@pytest.mark.parametrize("kind", sorted(NO_MODELS))
def test_what_is_no_model_has_a_name_an_advice_and_one_clear_line(tmp_path, kind):
    path = tmp_path / "model.pt"
    path.write_bytes(NO_MODELS[kind])
    info = sniff(path)
    assert (info.kind, info.loadable) == (kind.strip(), False)
    assert info.title
    assert info.advice
    with pytest.raises(UnknownFormatError if kind == "unknown" else LoadError) as caught:
        load(path, arch=Net, trust=True)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint == info.advice


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_bytes_that_mean_nothing_are_called_so(tmp_path, name):
    (tmp_path / "x").write_bytes(MEMBERS[name])
    assert sniff(tmp_path / "x").kind in ("unknown", "empty", "pickle")


def test_missing_files_directories_and_devices(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(LoadError, match="no file") as caught:
        sniff(tmp_path / "weigths.pt")
    assert "weights.pt" in caught.value.hint
    with pytest.raises(LoadError, match="is a directory") as caught:
        sniff(tmp_path)
    assert "weights.pt" in caught.value.hint
    with pytest.raises(LoadError, match="no regular file"):
        sniff("/dev/null")
    with pytest.raises(LoadError):
        sniff("a\0b")


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(b"x")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # as root every file can be read, so chmod would prove nothing
    with pytest.raises(LoadError, match="can't be read: Permission denied"):
        sniff(tmp_path / "w.pt")


def test_sniffing_imports_neither_torch_nor_numpy(tmp_path):
    torch.save(net(), tmp_path / "m.pt")
    save(net(), tmp_path / "w.safetensors")
    code = (
        "import sys; from bnfix.formats import sniff\n"
        f"print(sniff({str(tmp_path / 'm.pt')!r}).kind, sniff({str(tmp_path / 'w.safetensors')!r}).kind)\n"
        "assert not {'torch', 'numpy', 'safetensors', 'onnx', 'formats_nets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pickled_module", "safetensors"]


def test_every_format_is_found_and_no_two_claim_one_suffix():
    names = [type(f).__name__ for f in formats()]
    assert {"TorchZip", "TorchLegacy", "SafeTensors", "Onnx", "TorchScript", "GitLfs"} <= set(names)
    suffixes = [s for f in formats() for s in f.suffixes]
    assert len(suffixes) == len(set(suffixes))


# ---------------------------------------------------------------------------------------- bounds


def test_a_pickle_with_more_opcodes_than_any_model_has_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MAX_OPS", 50)
    torch.save(net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(LoadError, match="more than 50 pickle opcodes"):
        sniff(tmp_path / "w.pt")


def test_a_list_copied_again_and_again_hits_a_bound():
    pairs = b"(" + b"(K\x01K\x02t" * 1000 + b"l" + b"q\x00"
    copies = b"0ccollections\nOrderedDict\nh\x00\x85R" * 10_000
    with pytest.raises(machine.LimitError, match="copied"):
        examine(b"\x80\x02" + pairs + copies + b".")


def test_a_memo_number_for_which_the_real_unpickler_would_make_gigabytes_of_room(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    assert "numbers a value 2,147,483,647" in examine((tmp_path / "w.pt").read_bytes()).problem
    with pytest.raises(LoadError):
        load(tmp_path / "w.pt", arch=Net, trust=True)


def test_modules_nested_beyond_any_model_hit_a_bound(tmp_path, monkeypatch):
    module: nn.Module = nn.Linear(1, 1)
    shared = nn.Sequential(module, module)
    for _ in range(40):  # 2^40 names from forty modules
        shared = nn.Sequential(shared, shared)
    torch.save(shared, tmp_path / "m.pt")
    monkeypatch.setattr("bnfix.formats.pickles.contents.MAX_TENSORS", 20_000)
    with pytest.raises(LoadError, match="more of them, than a model has"):
        sniff(tmp_path / "m.pt")


def test_structures_that_contain_themselves_end(tmp_path):
    loop: dict[str, object] = {"w": torch.ones(2)}
    loop["self"] = [loop]
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "w.pt")
    assert sniff(tmp_path / "w.pt").tensors == 1


def test_a_member_that_claims_to_be_huge(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * (70 << 20))
    with pytest.raises(LoadError, match="claims 73,400,320 bytes"):
        sniff(path)


@pytest.mark.parametrize("name", ["byteorder", "data/0", "data/77", ".data/serialization_id", "version"])
def test_members_that_unpack_to_far_more_than_they_are(tmp_path, name):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as file:
        members = {n.partition("/")[2]: file.read(n) for n in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for member, data in members.items():
            if member != name:
                file.writestr(f"archive/{member}", data)
        file.writestr(f"archive/{name}", b"\0" * (80 << 20), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    started = time.monotonic()
    with pytest.raises(LoadError, match="83,886,080 bytes out of"):
        load(path, arch=Net, trust=True)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 62]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"w": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
         "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": {"w2": 7}},
    ],
)  # fmt: skip
def test_a_safetensors_header_that_lies_is_one_error(tmp_path, header):
    path = tmp_path / "w.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
    with pytest.raises(LoadError) as caught:
        load(path, arch=Net)
    assert "\n" not in caught.value.message


def test_a_member_whose_size_in_the_table_is_a_lie(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + 20 : at + 28] = b"\xff\xff\xff\x7f" * 2
    path.write_bytes(data)
    assert sniff(path).kind in ("truncated", "damaged")


def test_more_members_than_any_model_has(tmp_path, monkeypatch):
    monkeypatch.setattr("bnfix.formats.archive.MAX_MEMBERS", 3)
    torch.save(net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(LoadError, match="members, more than the 3"):
        sniff(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["archive/../../evil", "/etc/passwd", "archive\\data", "a" * 2000])
def test_paths_that_lead_out_of_the_archive(tmp_path, name):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"N.")
        file.writestr(name, b"x")
    if len(name) > 1024:
        with pytest.raises(LoadError, match="2,000 characters long"):
            sniff(path)
    else:
        assert sniff(path).kind == "damaged"


def test_a_storage_that_is_shorter_than_its_tensor(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(400)}, path)
    with zipfile.ZipFile(path) as file:
        members = {n: file.read(n) for n in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data[:100] if name.endswith("data/0") else data)
    info = sniff(path)
    assert info.kind == "damaged"
    assert "too short" in info.title
