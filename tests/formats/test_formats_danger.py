"""Attacks: names that no model needs, however they are spelled, wrapped or hidden; none is ever imported or called."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile

import pytest
import torch
from formats_nets import IMAGE, Net, net
from torch import nn

from bnfix.errors import BnfixError, LoadError, UntrustedModelError
from bnfix.formats import load, sniff
from bnfix.formats.pickles import guard
from bnfix.formats.pickles.danger import judge
from bnfix.formats.pickles.machine import examine, words

DANGEROUS = sorted(
    words(
        """
    posix.system nt.system os.system os.popen subprocess.Popen subprocess.check_output commands.getoutput
    shutil.rmtree __builtin__.eval __builtin__.apply builtins.eval builtins.exec builtins.compile
    builtins.__import__ builtins.getattr builtins.open builtins.map builtins.globals builtins.breakpoint
    builtins.setattr builtins.super builtins.input importlib.import_module runpy.run_path ctypes.CDLL socket.socket
    pty.spawn sys.modules sys.exit webbrowser.open code.InteractiveInterpreter pickle.loads _pickle.loads
    marshal.loads operator.attrgetter operator.methodcaller _operator.attrgetter functools.reduce pdb.run
    timeit.timeit cProfile.runctx profile.run pydoc.pipepager types.FunctionType types.CodeType ast.literal_eval
    tempfile.mktemp linecache.getline logging.FileHandler logging.config.fileConfig ensurepip._run_pip
    doctest.debug_script distutils.spawn.spawn numpy.load numpy.f2py.crackfortran.getlincoef
    numpy.testing._private.utils.runstring numpy.ctypeslib.load_library numpy.distutils.exec_command.exec_command
    torch.load torch.hub.load torch.jit.load torch.serialization.load torch.storage._load_from_bytes
    torch.ops.load_library torch.fx.graph_module.reduce_graph_module torch.utils.cpp_extension.load_inline
    torch.utils._config_module.load_config torch._inductor.codecache.compile_file
    torch.jit.unsupported_tensor_ops.execWrapper torch.utils.collect_env.run torch.distributed.rpc.rpc_sync
    torch.package.PackageImporter torch._C.import_ir_module cloudpickle.cloudpickle.subimport
    cloudpickle.cloudpickle._make_function dill._dill._create_function joblib.load pandas.read_pickle pip.main
    setuptools.sandbox.run_setup IPython.start_ipython yaml.unsafe_load requests.get urllib.request.urlopen
    weakref.finalize copyreg.extension_240 multiprocessing.util.spawnv_passfds signal.signal
    concurrent.futures.ProcessPoolExecutor
        """
    )
)

THROUGH_ANOTHER_MODULE = [  # a dotted name is resolved attribute by attribute: STACK_GLOBAL walks through modules
    ("posixpath", "os.system"), ("torch.serialization", "os.system"), ("torch.serialization", "os"),
    ("torch", "serialization.os.system"), ("torch.nn.modules.module", "torch.load"), ("shop.net", "os.system"),
    ("shop.net", "subprocess"), ("__main__", "os.system"), ("__main__", "__builtins__.eval"), ("random", "_os.system"),
    ("torch.nn", "Module.__init__.__globals__"), ("torch.nn.modules.linear", "Linear.__init__.__builtins__.eval"),
    ("collections", "_sys.modules"), ("collections", "abc.sys.modules"), ("torch.nn.modules", "functools.reduce"),
    ("logging", "os.system"), ("pathlib", "os.system"), ("shop.net", "helpers.run_it.x"), ("timm.models", "sys"),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression"), ("bdb", "Bdb.run"),
    ("shop", "os .system"), ("os ", "system"), ("shop..net", "Net"), ("", "system"), ("shop.net", ""), ("nt", "x.y"),
]  # fmt: skip

HARMLESS = sorted(
    words(
        """
    collections.OrderedDict torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter torch.FloatStorage
    torch.Size torch.float32 torch.bfloat16 torch.float8_e4m3fn torch.device torch.nn.parameter.Parameter
    _codecs.encode builtins.set torch._tensor._rebuild_from_type_v2
        """
    )
)

CODE_OF_MODELS = sorted(
    words(
        """
    shop.net.Net __main__.Net functools.partial torch.nn.modules.conv.Conv2d torch.nn.functional.relu
    argparse.Namespace numpy.core.multiarray.scalar numpy._core.multiarray._reconstruct numpy.dtype
    numpy.random._pickle.__randomstate_ctor pathlib.PosixPath collections.defaultdict
    timm.layers.norm_act.BatchNormAct2d torchvision.ops.misc.FrozenBatchNorm2d
    pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint models.yolo.Model shop.types.Config shop.io.Reader
    omegaconf.dictconfig.DictConfig torch.optim.adam.Adam torch.nn.utils.spectral_norm.SpectralNorm
    datetime.datetime torch.relu torch._C._nn.gelu torch.ao.nn.quantized.modules.conv.Conv2d copy_reg._reconstructor
    __builtin__.object
        """
    )
)


def _spelling(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last


@pytest.mark.parametrize("name", DANGEROUS)
def test_names_no_model_needs(name):
    assert judge(*_spelling(name)) == "dangerous"


@pytest.mark.parametrize(("module", "name"), THROUGH_ANOTHER_MODULE)
def test_names_reached_through_another_module_or_made_up(module, name):
    assert judge(module, name) == "dangerous"


@pytest.mark.parametrize("name", HARMLESS)
def test_names_of_every_state_dict(name):
    assert judge(*_spelling(name)) == "weights"


@pytest.mark.parametrize("name", CODE_OF_MODELS)
def test_names_that_models_are_made_of_need_trust_and_no_more(name):
    assert judge(*_spelling(name)) == "code"


def test_a_class_within_a_class_is_no_path_through_a_module():
    assert judge("shop.net", "Net.Block") == "code"


# ---------------------------------------------------------------------------------------- pickles by hand

MARK = "touched by the attack"


def string(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


CALL = b"(S'touch ATTACKED'\ntR"
ATTACKS = {
    "GLOBAL": b"\x80\x02" + global_("posix", "system") + CALL + b".",
    "protocol 0": global_("posix", "system") + b"(S'touch ATTACKED'\ntR.",
    "STACK_GLOBAL": b"\x80\x04" + string("posix") + string("system") + b"\x93" + CALL + b".",
    "STACK_GLOBAL from the memo": b"\x80\x04" + string("system") + b"q\x05" + b"0"
    + string("posix") + b"q\x060" + b"h\x06h\x05\x93" + CALL + b".",
    "memo in the wrong order": b"\x80\x04" + string("posix") + b"q\x010" + string("x") + b"q\x010"
    + string("posix") + b"q\x01" + string("system") + b"\x93" + CALL + b".",
    "MEMOIZE and DUP": b"\x80\x04" + string("posix") + b"2\x940" + string("system") + b"\x93" + CALL + b".",
    "dotted": b"\x80\x04" + string("posixpath") + string("os.system") + b"\x93" + CALL + b".",
    "INST": b"\x80\x02(S'touch ATTACKED'\niposix\nsystem\n.",
    "OBJ": b"\x80\x02(" + global_("posix", "system") + b"S'touch ATTACKED'\no.",
    "NEWOBJ": b"\x80\x02" + global_("posix", "system") + b"(S'touch ATTACKED'\nt\x81.",
    "Python 2 name": b"\x80\x02" + global_("__builtin__", "eval") + b"(S'1'\ntR.",
    "computed name": b"\x80\x04" + string("posix") + global_("_codecs", "encode") + b"(" + string("system")
    + string("utf8") + b"tR\x93" + CALL + b".",
    "popped away": b"\x80\x02" + global_("posix", "system") + CALL + b"0}.",
    "popped with its mark": b"\x80\x02(" + global_("posix", "system") + CALL + b"1}.",
    "extension": b"\x80\x02\x82\x01(tR.",
    "partial": b"\x80\x02" + global_("functools", "partial") + b"(" + global_("posix", "system") + b"tR(tR.",
    "in a key": b"\x80\x02}" + global_("posix", "system") + CALL + b"K\x01s.",
    "in a state": b"\x80\x02" + global_("shop", "Net") + b"(tR" + global_("posix", "system") + CALL + b"b.",
    "before a fault": b"\x80\x02" + global_("posix", "system") + CALL + b"h\xff.",
    "before the end is missing": b"\x80\x02" + global_("posix", "system") + CALL,
}  # fmt: skip


def as_zip(data: bytes, path, **more: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        for name, content in more.items():
            file.writestr(f"archive/{name}", content)


def as_legacy(data: bytes, path, sys_info: bytes | None = None) -> None:
    parts = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    if sys_info is not None:
        parts[2] = sys_info
    path.write_bytes(b"".join([*parts, data, pickle.dumps([], 2)]))


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_attacks_are_seen_refused_whatever_the_flags_and_not_run(tmp_path, monkeypatch, name, container):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    if container == "zip":
        as_zip(ATTACKS[name], path)
    elif container == "legacy":
        as_legacy(ATTACKS[name], path)
    else:
        path.write_bytes(ATTACKS[name])
    info = sniff(path)
    assert info.dangerous, info
    assert not info.loadable
    with pytest.raises(UntrustedModelError) as caught:
        load(path, arch=Net, trust=True)
    assert "\n" not in caught.value.message
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"before a fault", "before the end is missing"}))
def test_the_symbolic_machine_names_what_the_real_one_would_import(name):
    asked = []

    class Asking(pickle._Unpickler):  # the one in Python, whose find_class sees each name; imports nothing
        def find_class(self, module, name):
            asked.append((module, name))
            return Blank

        def get_extension(self, code):
            asked.append(("copyreg", f"extension_{code}"))
            self.stack.append(Blank)

    class Blank:
        def __init__(self, *_): ...

        def __call__(self, *_):
            return self

        def __setstate__(self, state): ...

    try:
        Asking(io.BytesIO(ATTACKS[name]), fix_imports=False).load()
    except pickle.UnpicklingError:
        assert name == "computed name"  # which is no string here
    seen = [(g.module, g.name) for g in examine(ATTACKS[name]).names]
    assert seen[: len(asked)] == list(dict.fromkeys(asked))


def test_in_the_old_format_every_pickle_is_looked_at(tmp_path):
    as_legacy(pickle.dumps({}, 2), tmp_path / "m.pt", sys_info=ATTACKS["GLOBAL"])
    assert sniff(tmp_path / "m.pt").dangerous == ("posix.system",)


def test_a_second_pickle_behind_the_first_is_refused(tmp_path):
    torch.save(net(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as file:
        members = {n: file.read(n) for n in file.namelist()}
    with zipfile.ZipFile(tmp_path / "n.pt", "w") as file:
        for name, data in members.items():
            file.writestr(name, data + ATTACKS["GLOBAL"] if name.endswith("data.pkl") else data)
    info = sniff(tmp_path / "n.pt")
    assert "posix.system" in info.dangerous
    assert any("behind its end" in d for d in info.dangerous)


@pytest.mark.parametrize("second", ["archive/data.pkl", "archive/DATA.PKL"])
def test_two_members_of_one_name_which_readers_resolve_differently(tmp_path, second):
    good = io.BytesIO()
    torch.save({}, good)
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of the second name
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr(second, ATTACKS["GLOBAL"])
    assert sniff(tmp_path / "m.pt").kind == "damaged"
    with pytest.raises(LoadError):
        load(tmp_path / "m.pt", arch=Net, trust=True)


def test_bytes_before_the_archive_that_shift_its_offsets(tmp_path):
    """zipfile forgives them and other readers do not: they would see different members."""
    as_zip(pickle.dumps({}, 2), tmp_path / "a.zip")
    evil = tmp_path / "b.zip"
    as_zip(ATTACKS["GLOBAL"], evil)
    (tmp_path / "m.pt").write_bytes(evil.read_bytes() + (tmp_path / "a.zip").read_bytes())
    assert sniff(tmp_path / "m.pt").kind == "damaged"


def test_a_local_header_that_contradicts_the_table(tmp_path):
    as_zip(pickle.dumps({}, 2), tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(data.replace(b"archive/data.pkl", b"archive/data.pkx", 1))
    assert sniff(tmp_path / "m.pt").kind in ("damaged", "truncated")


def test_a_polyglot_of_pickle_and_zip_is_read_as_torch_reads_it(tmp_path):
    as_zip(pickle.dumps({}, 2), tmp_path / "a.zip")
    (tmp_path / "m.pt").write_bytes(ATTACKS["GLOBAL"] + (tmp_path / "a.zip").read_bytes())
    assert sniff(tmp_path / "m.pt").dangerous == ("posix.system",)


def test_what_a_file_says_of_itself_can_not_write_to_the_terminal(tmp_path):
    name = "\x1b[31mred\x07\n" + "x" * 500
    torch.save({name: {"w": torch.ones(1)}, f"other{name}": {"w": torch.ones(1)}}, tmp_path / "a.pt")
    torch.save({f"{name}.running_mean": torch.ones(1), f"{name}.running_var": torch.ones(1)}, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"\x80\x04" + string("os\x1b[31m") + string("system\x07") + b"\x93.")
    for path in sorted(tmp_path.iterdir()):
        info = sniff(path)
        assert "\x1b" not in repr(info.to_dict()).replace("\\x1b", "\x1b")
        with pytest.raises(LoadError) as caught:
            load(path, arch=Net)
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 1000


def test_a_traced_module_carries_source_code_and_is_refused(tmp_path):
    torch.save(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), tmp_path / "g.pt")
    assert "torch.fx.graph_module.reduce_graph_module" in sniff(tmp_path / "g.pt").dangerous


# ---------------------------------------------------------------------------------------- the second lock


def _module_that_reexports(monkeypatch) -> None:
    shop = types.ModuleType("shop_of_aliases")
    shop.helper = os.system
    shop.tools = os
    shop.fine = nn.Linear
    monkeypatch.setitem(sys.modules, "shop_of_aliases", shop)


def test_a_friendly_name_for_system_is_refused_when_it_is_resolved(tmp_path, monkeypatch):
    _module_that_reexports(monkeypatch)
    monkeypatch.chdir(tmp_path)
    as_zip(b"\x80\x02" + global_("shop_of_aliases", "helper") + CALL + b".", tmp_path / "m.pt")
    assert sniff("m.pt").dangerous == ()  # nothing to see without importing
    with pytest.raises(UntrustedModelError, match=r"shop_of_aliases\.helper, which is (posix|nt)\.system"):
        load("m.pt", trust=True)
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_module_as_a_value_is_refused_when_it_is_resolved(tmp_path, monkeypatch):
    _module_that_reexports(monkeypatch)
    as_zip(b"\x80\x02" + global_("shop_of_aliases", "tools") + b".", tmp_path / "m.pt")
    with pytest.raises(BnfixError):
        load(tmp_path / "m.pt", trust=True)
    with pytest.raises(UntrustedModelError, match=r"shop_of_aliases\.tools"):
        guard.load(io.BytesIO(b"\x80\x02" + global_("shop_of_aliases", "tools") + b"."))


def test_the_guard_judges_names_itself():
    for data in (ATTACKS["GLOBAL"], ATTACKS["dotted"], ATTACKS["Python 2 name"], ATTACKS["INST"]):
        with pytest.raises(UntrustedModelError):
            guard.load(io.BytesIO(data))


def test_the_guard_lets_models_through():
    model = nn.Sequential(net(), nn.GELU())
    assert torch.equal(guard.load(io.BytesIO(pickle.dumps(Plain(3)))).x, torch.tensor(3))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False, pickle_module=guard)
    assert torch.equal(again(IMAGE), model(IMAGE))


class Plain:
    """Pickled without torch.save, its tensor remade by a function of its own."""

    def __init__(self, value: int) -> None:
        self.value = value

    @property
    def x(self) -> torch.Tensor:
        return torch.tensor(self.value)


def test_a_storage_reference_that_is_none(tmp_path):
    evil = b"\x80\x02}X\x01\x00\x00\x00w" + global_("torch._utils", "_rebuild_tensor_v2")
    evil += b"((X\x07\x00\x00\x00storage" + global_("torch", "FloatStorage")
    evil += b"X\x03\x00\x00\x00../X\x03\x00\x00\x00cpu\x8a\x08" + struct.pack("<q", 1 << 60) + b"tQK\x00)))tRs."
    as_zip(evil, tmp_path / "m.pt")
    with pytest.raises(LoadError):
        load(tmp_path / "m.pt", arch=Net)
