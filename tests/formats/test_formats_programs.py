"""Exported programs and TorchScript: read, folded, written; what could run code is found before torch sees it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Functional, InAutocast, NormOnTwoConvs, TiedWeights, TwoConsumers, conv_bn, lived_in, relative_error
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import bnfix
from bnfix import api
from bnfix.api.programs import fold_program
from bnfix.cli import run
from bnfix.errors import BnfixError, ExportError, LoadError, TraceError, UntrustedModelError
from bnfix.formats import sniff
from bnfix.graph import exported, from_exported, to_exported

export = functools.partial(torch.export.export, strict=False)
of_now = pytest.mark.skipif(
    importlib.util.find_spec("torch.export.pt2_archive") is None,
    reason="torch 2.7 writes another layout: one pickle for all weights",
)
IMAGE = torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
BATCH = {0: Dim.AUTO}
CLOSE = 1e-6  # a fold is exact up to one rounding of each weight; float32 has 1.2e-7, and a few layers add up


class FunctionalConv(nn.Module):
    """Weights under other names than a layer has, γ without β, a variance that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator))
        self.g = nn.Parameter(torch.rand(4, generator=generator) + 0.5)
        self.register_buffer("mean", torch.randn(4, generator=generator))
        self.register_buffer("var", torch.rand(4, generator=generator) + 0.3, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(F.conv2d(x, self.w), self.mean, self.var, self.g, None, False, 0.1, 1e-3)


class Counting(nn.Module):
    """Counts its calls in a buffer, and the count is in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv_bn()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.n.add_(1)
        return self.c(x) * self.n


class Structured(nn.Module):
    """A dict as argument, a tuple with a dict in it as output, a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv_bn(bias=False)
        self.k = torch.arange(1.0, 5.0)

    def forward(self, batch: dict[str, Any], *, scale: Tensor) -> tuple[Tensor, dict[str, Any]]:
        y = self.c(batch["img"]) * self.k[:, None, None]
        return y + batch["more"][0][:, None, None, None], {"m": (y.mean((1, 2, 3)) * scale, [y.sum()])}


class GroupedTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(6, eps=0.1)
        self.t = nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.t(self.c(x)))


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.c(x)


class Called(nn.Module):
    """Submodules and a parameter under names that the module around a program might use itself."""

    def __init__(self) -> None:
        super().__init__()
        self.plan, self.program = conv_bn(), nn.Parameter(torch.full((1,), 3.0))

    def forward(self, *xs: Tensor) -> Tensor:
        return sum(self.plan(x) for x in xs) * self.program  # type: ignore[no-any-return]


class Head(nn.Module):
    """Linear → norm behind a convolution → norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.f, self.n = conv_bn(), nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.f(self.c(x).mean((2, 3))))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], Any, int]] = {
    "plain": (lambda: conv_bn(bias=False), (IMAGE,), {}, None, 1),
    "functional": (FunctionalConv, (IMAGE,), {}, None, 1),
    "functional norm": (Functional, (IMAGE,), {}, None, 1),
    "a buffer that the forward writes": (Counting, (IMAGE,), {}, (BATCH,), 1),
    "dicts": (
        Structured,
        ({"img": IMAGE, "more": [torch.ones(2)]},),
        {"scale": torch.full((2,), 2.0)},
        {"batch": {"img": BATCH, "more": [BATCH]}, "scale": BATCH},
        1,
    ),
    "grouped and transposed": (GroupedTransposed, (IMAGE,), {}, (BATCH,), 1),
    "no_grad inside": (NoGrad, (IMAGE,), {}, (BATCH,), 1),
    "any number of arguments": (Called, (IMAGE, IMAGE + 1), {}, None, 1),
    "linear": (Head, (IMAGE,), {}, (BATCH,), 2),
    "one norm on two convolutions": (NormOnTwoConvs, (IMAGE,), {}, (BATCH,), 1),
    "two consumers": (TwoConsumers, (IMAGE,), {}, (BATCH,), 0),
    "tied weights": (TiedWeights, (IMAGE,), {}, None, 0),
}


def program_of(name: str) -> Any:
    build, args, kwargs, shapes, _ = CASES[name]
    return export(lived_in(build()), args, kwargs, dynamic_shapes=shapes)


def outputs(program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(copy.deepcopy(program).module()(*copy.deepcopy(args), **copy.deepcopy(kwargs)))


def saved(program: Any, path: Path) -> Path:
    with path.open("wb") as file:
        torch.export.save(program, file)
    return path


# ---------------------------------------------------------------------------------------- module and back


@pytest.mark.parametrize("name", CASES)
def test_a_program_as_a_module_does_the_same_to_the_bit_and_holds_the_same_tensors(name: str) -> None:
    _, args, kwargs, _, _ = CASES[name]
    program = program_of(name)
    before = {k: v.clone() for k, v in program.state_dict.items()}
    module = from_exported(program)
    with torch.no_grad():
        found = pytree.tree_leaves(copy.deepcopy(module)(*copy.deepcopy(args), **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(found, outputs(program, args, kwargs), strict=True))
    own = {id(t) for t in module.state_dict(keep_vars=True).values()}
    assert {id(p) for p in program.parameters()} <= own
    if "functional" not in name:
        assert set(module.state_dict()) <= set(program.state_dict)
        for gone in set(program.state_dict) - set(module.state_dict()):  # the other name of a tied weight, in torch 2.7
            assert id(program.state_dict[gone]) in own
    assert all(torch.equal(v, program.state_dict[k]) for k, v in before.items())


@pytest.mark.parametrize("name", CASES)
def test_programs_fold_and_are_saved_and_loaded_again(tmp_path: Path, name: str) -> None:
    _, args, kwargs, shapes, folds = CASES[name]
    program = program_of(name)
    opened = api.open_model(saved(program, tmp_path / "m.pt2"))
    assert opened.call is not None
    result = bnfix.fold(opened.value, opened.call)
    assert (len(result.edits), len(result.edits) + len(result.refusals)) == (folds, max(folds, 1))
    assert result.model is not None
    bnfix.save(result.model, tmp_path / "f.pt2")
    folded = bnfix.load(tmp_path / "f.pt2")
    wanted = outputs(program, args, kwargs)
    found = outputs(folded, args, kwargs)
    assert max(relative_error(b, a) for a, b in zip(wanted, found, strict=True)) < CLOSE
    before, after = program.call_spec, folded.call_spec
    assert (after.in_spec, after.out_spec) == (before.in_spec, before.out_spec)
    targets = [str(n.target) for n in folded.graph.nodes]
    assert sum("batch_norm" in t for t in targets) == (1 - folds if folds < 2 else 0)
    gone = set(program.state_dict) - set(folded.state_dict)
    state = {k: v for k, v in folded.state_dict.items() if k in program.state_dict}
    assert all(k.rpartition(".")[2] not in ("w", "n", "program") for k in gone)
    assert state
    if shapes is not None:  # the batch may still vary
        more = pytree.tree_map(lambda t: torch.cat([t, t * 0.5, t[:1]]) if t.dim() else t, (args, kwargs))
        for a, b in zip(outputs(program, *more), outputs(folded, *more), strict=True):
            assert relative_error(b, a) < CLOSE
            assert not a.dim() or a.shape == b.shape


def test_names_are_as_they_were_also_of_weights_that_no_layer_would_name_so() -> None:
    program = program_of("functional")
    module = from_exported(program)
    assert "w" not in module.state_dict()
    folded = to_exported(bnfix.fold(module, IMAGE).model)
    assert "w" in folded.state_dict
    assert not torch.equal(folded.state_dict["w"], program.state_dict["w"])
    assert {s.target for s in folded.graph_signature.input_specs if s.target} == set(folded.state_dict)


def test_a_norm_in_training_mode_stays_a_call_and_is_refused() -> None:
    model = lived_in(TwoConsumers())
    model.bn.train()
    result = bnfix.fold(from_exported(export(model, (IMAGE,))), IMAGE)
    assert not result.edits
    assert len(result.refusals) == 1


@pytest.mark.parametrize("table", [{}, None])
def test_programs_taken_apart_into_other_operators_fold_and_stay_so(table: dict[Any, Any] | None) -> None:
    model = lived_in(Head())
    program = export(model, (IMAGE,))
    program = program.run_decompositions() if table is None else program.run_decompositions(table)
    result = bnfix.fold(from_exported(program), IMAGE)
    assert len(result.edits) == 2
    folded = to_exported(result.model)
    assert folded.dialect == program.dialect
    assert any("aten.addmm" in str(n.target) for n in folded.graph.nodes) == (table is None)
    assert relative_error(outputs(folded, (IMAGE,), {})[0], model(IMAGE)) < CLOSE


def test_autocast_inside_is_kept() -> None:
    program = export(lived_in(InAutocast()), (IMAGE,))
    result = bnfix.fold(from_exported(program), IMAGE)
    folded = to_exported(result.model)
    assert len(result.edits) == 1
    assert any("autocast" in str(n.target) for n in folded.graph.nodes)
    # bfloat16 has 8 bits: the convolution's output is rounded before the norm in one, behind it in the other
    assert relative_error(outputs(folded, (IMAGE,), {})[0], outputs(program, (IMAGE,), {})[0]) < 2**-7


def test_two_calls_with_one_weight_that_do_different_things_stay_calls() -> None:
    class Strided(TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)).sum() + F.conv2d(x, self.conv.weight, self.conv.bias, stride=2)

    model = lived_in(Strided())
    module = from_exported(export(model, (IMAGE,)))
    assert not [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    result = bnfix.fold(module, IMAGE)
    assert not result.edits
    assert torch.equal(result.model(IMAGE), model(IMAGE))


def test_sizes_that_the_program_was_not_exported_for_are_refused_as_it_refuses_them() -> None:
    module = from_exported(export(lived_in(conv_bn()), (IMAGE,), dynamic_shapes=({0: Dim("b", max=4)},)))
    module(IMAGE[:1])
    for shape in ((2, 3, 9, 8), (5, 3, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match="exported for"):
            module(torch.zeros(shape))


@pytest.mark.skipif(not callable(Dim.AUTO), reason="torch 2.7 knows no bounds for sizes that it finds by itself")
def test_bounds_of_a_size_stay() -> None:
    program = export(lived_in(conv_bn()), (IMAGE,), dynamic_shapes=({0: Dim("b", min=2, max=16)},))
    folded = to_exported(bnfix.fold(from_exported(program), IMAGE).model)
    assert [v.upper for v in folded.range_constraints.values()] == [v.upper for v in program.range_constraints.values()]


def test_a_program_goes_in_and_a_program_comes_out() -> None:
    program = program_of("dicts")
    before = {k: v.clone() for k, v in program.state_dict.items()}
    result = fold_program(bnfix.fold, program, None)
    assert isinstance(result.model, torch.export.ExportedProgram)
    assert len(result.edits) == 1
    assert result.parity is not None
    assert result.parity.verdict == "passed"
    _, args, kwargs, _, _ = CASES["dicts"]
    for a, b in zip(outputs(program, args, kwargs), outputs(result.model, args, kwargs), strict=True):
        assert relative_error(b, a) < CLOSE
    assert all(torch.equal(v, program.state_dict[k]) for k, v in before.items())
    with pytest.raises(ValueError, match="in place"):
        fold_program(bnfix.fold, program, None, inplace=True)
    assert fold_program(bnfix.fold, program, None, dry_run=True).model is None


def test_statistics_of_a_program_are_estimated_as_those_of_its_model() -> None:
    model = lived_in(Head())
    module = from_exported(export(model, (IMAGE,), dynamic_shapes=(BATCH,)))
    data = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) + 1 for i in range(4)]
    bnfix.recalibrate(model, data)
    bnfix.recalibrate(module, data)
    assert relative_error(to_exported(module).module()(IMAGE), model(IMAGE)) < CLOSE


# ---------------------------------------------------------------------------------------- any model as a program


def test_any_model_is_saved_as_a_program_that_needs_no_class(tmp_path: Path) -> None:
    model = lived_in(Head())
    result = bnfix.fold(model, IMAGE)
    bnfix.save(result.model, tmp_path / "f.pt2", example=[IMAGE, IMAGE[:1]], recipe=result.recipe)
    program = bnfix.load(tmp_path / "f.pt2")
    x = torch.cat([IMAGE, -IMAGE, IMAGE])
    assert relative_error(program.module()(x), model(x)) < CLOSE
    assert os.listdir(tmp_path) == ["f.pt2"]


def test_what_can_not_be_a_program_leaves_nothing(tmp_path: Path) -> None:
    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ExportError, match="can't be exported"):
        bnfix.save(Decides(), tmp_path / "f.pt2", example=IMAGE)
    with pytest.raises(ExportError, match="example"):
        bnfix.save(conv_bn(), tmp_path / "f.pt2")
    assert os.listdir(tmp_path) == []


def test_a_program_is_not_saved_as_weights(tmp_path: Path) -> None:
    path = saved(program_of("plain"), tmp_path / "m.pt2")
    opened = api.open_model(path)
    with pytest.raises(LoadError, match="no class"):
        bnfix.save(opened.value, tmp_path / "f.pt", source=opened.info)


def test_the_models_outputs_are_compared_with_the_programs() -> None:
    class Drifting(nn.Module):
        """Its forward gives other numbers when torch traces it: no program of it can be right."""

        def forward(self, x: Tensor) -> Tensor:
            return x + (1.0 if torch.compiler.is_exporting() else 2.0)

    with pytest.raises(ExportError, match="does not give what the model gives"):
        exported(Drifting(), [bnfix.Call((IMAGE,))])


def test_what_a_program_is_shows_without_torch(tmp_path: Path) -> None:
    info = sniff(saved(program_of("linear"), tmp_path / "m.pt2"))
    assert (info.kind, info.loadable, info.names_code, info.dangerous) == ("exported_program", True, (), ())
    assert [(n.path, n.channels) for n in info.norms] == [("c.1", 4), ("n", 5)]
    assert (info.tensors, info.parameters) == (14, 4 * 27 + 4 + 8 + 25 + 10)


def test_the_command_line_folds_programs_and_writes_them_from_any_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = lived_in(Head())
    saved(export(model, (IMAGE,), dynamic_shapes=(BATCH,)), tmp_path / "m.pt2")
    before = Path("m.pt2").read_bytes()
    assert run(["fold", "m.pt2", "-o", "f.pt2"]) == 0
    out = capsys.readouterr().out
    assert "folded 2 of 2 norms" in out
    assert "as the program was exported with" in out
    assert 'bnfix.load("f.pt2")' in out
    assert Path("m.pt2").read_bytes() == before
    x = torch.cat([IMAGE, -IMAGE, IMAGE])
    assert relative_error(bnfix.load("f.pt2").module()(x), model(x)) < CLOSE
    assert run(["verify", "m.pt2", "f.pt2"]) == 0
    assert run(["fold", "m.pt2", "-o", "f.pt"]) == 2
    assert "-o f.pt2" in capsys.readouterr().err
    torch.save(model, "p.pt")
    assert run(["fold", "p.pt", "--trust", "--input", "1x3x8x8", "-o", "g.pt2"]) == 0
    assert relative_error(bnfix.load("g.pt2").module()(x), model(x)) < CLOSE
    assert sorted(os.listdir()) == ["f.pt2", "g.pt2", "m.pt2", "p.pt"]


# ---------------------------------------------------------------------------------------- TorchScript


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = conv_bn()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.c(x)
        if y.shape[-1] > 3:
            y = y * 2
        return y * scale


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_is_converted_folded_and_saved_as_a_program(tmp_path: Path, how: str) -> None:
    model = lived_in(Head())
    made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, IMAGE)
    torch.jit.save(made, tmp_path / "s.pt")
    with pytest.raises(UntrustedModelError, match="runs code"):
        api.open_model(tmp_path / "s.pt")
    loaded = api.open_model(tmp_path / "s.pt", trust=True)
    calls, _ = api.examples(loaded, input=["1x3x8x8"])
    module = api.converted(loaded, calls).value
    result = bnfix.fold(module, calls)
    assert len(result.edits) == 2
    bnfix.save(result.model, tmp_path / "f.pt2", source=loaded.info)
    x = torch.cat([IMAGE, -IMAGE, IMAGE])
    assert relative_error(bnfix.load(tmp_path / "f.pt2").module()(x), model(x)) < CLOSE


def test_torchscript_that_can_not_be_converted_says_why_and_the_way_out() -> None:
    class Loops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while bool(x.sum() < 100):
                x = x + 1
            return x

    script = torch.jit.script(Loops()).eval()
    loaded = api.converted  # the name under which the command line has it
    with pytest.raises(TraceError, match="TorchScript program") as caught:
        loaded(_loaded(script), [bnfix.Call((IMAGE,))])
    assert "--arch" in (caught.value.hint or "")


def _loaded(value: Any) -> Any:
    from bnfix.formats import Loaded

    return Loaded(value)


def test_a_frozen_torchscript_has_nothing_to_fold(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(lived_in(Head()))), tmp_path / "z.pt")
    with pytest.raises(LoadError, match="nothing to fold"):
        api.load(tmp_path / "z.pt", trust=True)


# ---------------------------------------------------------------------------------------- what a file could do


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None], **how: Any) -> Path:
    """The archive with its members, by their name below the root folder, changed."""
    with zipfile.ZipFile(path) as file:
        root = file.namelist()[0].partition("/")[0]
        members = {n.removeprefix(f"{root}/"): file.read(n) for n in file.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", **how) as file:
        for name, content in members.items():
            file.writestr(f"{root}/{name}", content)
    return path


def graph_of(members: dict[str, bytes]) -> Any:
    return json.loads(members["models/model.json"])


class _Runs:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def _target(program: Any, code: str) -> None:
    node = next(n for n in program["graph_module"]["graph"]["nodes"] if "conv2d" in n["target"])
    node["target"] = "torch.serialization.os.system"


def _expression(program: Any, code: str) -> None:
    values = program["graph_module"]["graph"]["tensor_values"]
    next(reversed(values.values()))["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}


def _guard(program: Any, code: str) -> None:
    program["guards_code"] = [f"{code} == 0"]


def _argument(program: Any, code: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"x={code}"]


def _parameter(program: Any, code: str) -> None:
    for spec in program["graph_module"]["signature"]["input_specs"]:
        if "parameter" in spec:
            spec["parameter"]["parameter_name"] = f'a"), {code}, ("'


def _node(program: Any, code: str) -> None:
    for node in program["graph_module"]["graph"]["nodes"]:
        for out in node["outputs"]:
            if "as_tensor" in out:
                out["as_tensor"]["name"] = f"a = {code}\n"


def _defaultdict(program: Any, code: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    context = json.dumps({"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": []})
    signature["in_spec"] = json.dumps([1, {"type": "collections.defaultdict", "context": context, "children_spec": []}])


@of_now
@pytest.mark.parametrize("evil", [_target, _expression, _guard, _argument, _parameter, _node, _defaultdict])
def test_a_program_that_would_run_code_while_it_is_read_is_refused(tmp_path: Path, evil: Any) -> None:
    canary = tmp_path / "canary"
    path = saved(program_of("plain"), tmp_path / "m.pt2")

    def change(members: dict[str, bytes]) -> None:
        program = graph_of(members)
        evil(program, f"__import__('os').system('touch {canary}')")
        members["models/model.json"] = json.dumps(program).encode()

    rewritten(path, change)
    info = sniff(path)
    assert info.names_code or info.dangerous
    with pytest.raises(UntrustedModelError) as caught:
        bnfix.load(path)
    assert "\n" not in caught.value.message
    assert not canary.exists()


@of_now
@pytest.mark.parametrize(
    "place", ["data/sample_inputs/model.pt", "data/constants/opaque_obj_0", "data/weights/weight_0"]
)
def test_pickles_in_a_program_are_looked_at_and_never_run(tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    path = saved(program_of("plain"), tmp_path / "m.pt2")

    def change(members: dict[str, bytes]) -> None:
        content = io.BytesIO()
        torch.save((_Runs(canary),), content)
        members[place] = pickle.dumps(_Runs(canary)) if "opaque" in place else content.getvalue()
        for kind, folder in (("weights", "data/weights"), ("constants", "data/constants")):
            if place.startswith(folder):
                name = f"{folder}/model_{kind}_config.json"
                config = json.loads(members[name])
                config["config"]["0.weight"] = {
                    "path_name": place.rpartition("/")[2], "is_param": False, "use_pickle": True, "tensor_meta": None
                }  # fmt: skip
                members[name] = json.dumps(config).encode()

    rewritten(path, change)
    assert sniff(path).dangerous
    for trust in (False, True):
        with pytest.raises(UntrustedModelError, match="whatever the flags"):
            bnfix.load(path, trust=trust)
    assert not canary.exists()


def test_ordinary_programs_need_no_trust(tmp_path: Path) -> None:
    for i, name in enumerate(CASES):
        info = sniff(saved(program_of(name), tmp_path / f"{i}.pt2"))
        assert (info.names_code, info.dangerous, info.loadable) == ((), (), True), name


def _bigger(members: dict[str, bytes]) -> None:
    config = json.loads(members["data/weights/model_weights_config.json"])
    for entry in config["config"].values():
        entry["tensor_meta"]["sizes"] = [{"as_int": 1 << 40}]
        entry["tensor_meta"]["strides"] = [{"as_int": 1}]
    members["data/weights/model_weights_config.json"] = json.dumps(config).encode()


def _outside(members: dict[str, bytes]) -> None:
    config = json.loads(members["data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["path_name"] = "../../models/model.json"
    members["data/weights/model_weights_config.json"] = json.dumps(config).encode()


def _empty_and_huge(members: dict[str, bytes]) -> None:
    _bigger(members)
    for name in members:
        if name.startswith("data/weights/weight_"):
            members[name] = b""


def _nested(members: dict[str, bytes]) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"N.")
        file.writestr("a/data/0", b"\0" * (80 << 20))
    members["data/sample_inputs/model.pt"] = bomb.getvalue()


def _deep(members: dict[str, bytes]) -> None:
    members["models/model.json"] = b"[" * 200_000


@of_now
@pytest.mark.parametrize("lie", [_bigger, _outside, _empty_and_huge, _nested, _deep])
def test_lies_in_a_program_are_one_error_in_little_time(tmp_path: Path, lie: Any) -> None:
    path = rewritten(saved(program_of("plain"), tmp_path / "m.pt2"), lie)
    started = time.monotonic()
    with pytest.raises(LoadError) as caught:
        bnfix.load(path)
    assert "\n" not in caught.value.message
    assert time.monotonic() - started < 10


def attempt(path: Path) -> Any:
    """What the file holds, or the message of the error of bnfix; any other exception passes."""
    try:
        return bnfix.load(path)
    except BnfixError as error:
        return error.message


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_programs_cut_off_or_with_bits_flipped_are_an_error_or_a_program(tmp_path: Path, cut: float) -> None:
    data = saved(program_of("plain"), tmp_path / "m.pt2").read_bytes()
    (tmp_path / "m.pt2").write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(BnfixError):
        bnfix.load(tmp_path / "m.pt2")
    for flip in range(12):
        changed = bytearray(data)
        changed[int(len(data) * cut) - 7 * flip] ^= 1 << (flip % 8)
        (tmp_path / "m.pt2").write_bytes(changed)
        found = attempt(tmp_path / "m.pt2")
        assert isinstance(found, torch.export.ExportedProgram) or "\n" not in found
