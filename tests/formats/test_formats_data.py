"""Inputs and batches: from shapes, from code, from arrays."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bnfix.errors import LoadError
from bnfix.formats import load_data, load_input

# ---------------------------------------------------------------------------------------- --input


def test_a_shape_is_one_seeded_normal_tensor():
    call = load_input("2x3x40x40")
    (x,) = call.args
    assert (x.shape, x.dtype, call.signature) == ((2, 3, 40, 40), torch.float32, "2x3x40x40")
    # 9600 draws: the standard error of the mean is .0102, of the standard deviation .0072; five of each
    assert abs(x.mean().item()) < 0.051
    assert abs(x.std().item() - 1) < 0.036
    assert torch.equal(x, load_input("2x3x40x40").args[0])
    assert not torch.equal(x, load_input("2x3x40x40", seed=1).args[0])


def test_several_inputs_with_types_and_names():
    call = load_input("1x3x4x4, 1x16:int64,5:uint8,mask=1x8:bool,y=2:bfloat16")
    assert [(tuple(a.shape), a.dtype) for a in call.args] == [
        ((1, 3, 4, 4), torch.float32),
        ((1, 16), torch.int64),
        ((5,), torch.uint8),
    ]
    assert {k: v.dtype for k, v in call.kwargs.items()} == {"mask": torch.bool, "y": torch.bfloat16}
    assert set(call.args[1].flatten().tolist()) == {0, 1}


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "x",
        "1x",
        "1x3x",
        "a",
        "1x-3",
        "1.5x2",
        "1x3:float33",
        "1x3:nn",
        "1x0x3",
        "1,,2",
        "mask=1,2",
        "1" * 30,
        "1x3x999999x999999",
    ],
)
def test_what_is_no_shape(spec):
    with pytest.raises(ValueError, match=r"\S"):
        load_input(spec)


# ---------------------------------------------------------------------------------------- --data

LOADERS = """
    import torch
    from torch.utils.data import DataLoader, IterableDataset, TensorDataset

    X = torch.arange(10.0).reshape(5, 2)
    tensor = X
    dataset = TensorDataset(X, torch.arange(5))
    loader = DataLoader(dataset, batch_size=3)
    batches = [X[:2], X[2:]]
    number = 3
    mapping = {"a": X}

    def make_loader():
        return DataLoader(dataset, batch_size=3)

    def generator():
        yield from batches

    class Squares:
        def __len__(self): return 4
        def __getitem__(self, i):
            if i >= 4: raise IndexError(i)
            return torch.tensor([float(i * i)])

    class Stream(IterableDataset):
        def __iter__(self): yield from X

    def fails():
        raise OSError("disk gone")
"""


@pytest.fixture
def loaders(tmp_path):
    (tmp_path / "loaders.py").write_text(textwrap.dedent(LOADERS))
    return tmp_path / "loaders.py"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("tensor", [4, 1]), ("dataset", [4, 1]), ("loader", [3, 2]), ("make_loader", [3, 2]), ("batches", [2, 3]),
     ("generator", [2, 3]), ("Squares", [4]), ("Stream", [4, 1])],
)  # fmt: skip
def test_batches_from_code_can_be_gone_through_twice(loaders, name, sizes):
    data = load_data(f"{loaders}:{name}", batch_size=4)
    for _ in range(2):
        assert [len(b[0]) if isinstance(b, (list, tuple)) else len(b) for b in data] == sizes


def test_values_of_batches_are_those_of_the_code(loaders):
    data = load_data(f"{loaders}:generator")
    assert torch.equal(torch.cat(list(data)), torch.arange(10.0).reshape(5, 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [("number", "gives an int, which has no batches"), ("mapping", "gives a dict"),
     ("fails", "failed: OSError: disk gone"), ("nothing", "has no nothing")],
)  # fmt: skip
def test_code_without_batches(loaders, name, message):
    with pytest.raises(LoadError, match=message):
        load_data(f"{loaders}:{name}")


def test_arrays_hold_samples_along_their_first_axis(tmp_path):
    x = np.arange(40, dtype=np.float64).reshape(5, 8)
    labels = np.arange(5)
    np.save(tmp_path / "x.npy", np.asfortranarray(x.astype(">f4")))
    np.savez(tmp_path / "x.npz", image=x, label=labels)
    np.savez_compressed(tmp_path / "one.npz", x)
    save_file({"image": torch.from_numpy(x).float(), "label": torch.from_numpy(labels)}, tmp_path / "x.safetensors")
    expected = torch.from_numpy(x).float()
    for name in ("x.npy", "one.npz"):
        batches = list(load_data(tmp_path / name, batch_size=2))
        assert [len(b) for b in batches] == [2, 2, 1]
        assert torch.equal(torch.cat(batches), expected)
    for name in ("x.npz", "x.safetensors"):
        batches = list(load_data(tmp_path / name, batch_size=2))
        assert torch.equal(torch.cat([b["image"] for b in batches]), expected)
        assert batches[2]["label"].tolist() == [4]


def test_arrays_that_are_none(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "scalar.npy", np.array(1.0))
    np.savez(tmp_path / "lengths.npz", a=np.ones(3), b=np.ones(4))
    np.savez(tmp_path / "none.npz")
    (tmp_path / "random.npy").write_bytes(bytes(range(200)))
    (tmp_path / "random.npz").write_bytes(b"PK\x03\x04" + bytes(90))
    (tmp_path / "random.safetensors").write_bytes(bytes(90))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "pickled.npy").write_bytes(b"\x80\x02cposix\nsystem\n.")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(LoadError) as caught:
            load_data(path)
        assert "\n" not in caught.value.message, path
    with pytest.raises(LoadError, match="does not unpickle"):
        load_data(tmp_path / "objects.npy")
    with pytest.raises(LoadError, match="first axis"):
        load_data(tmp_path / "lengths.npz")


def test_random_batches():
    batches = list(load_data("random:3x4x4", batch_size=2, batches=3, seed=5))
    assert [tuple(b.shape) for b in batches] == [(2, 3, 4, 4)] * 3
    assert not torch.equal(batches[0], batches[1])
    again = list(load_data("random:3x4x4", batch_size=2, batches=3, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    pair = next(iter(load_data("random:3,16:int64", batch_size=2)))
    assert [t.dtype for t in pair] == [torch.float32, torch.int64]
    with pytest.raises(ValueError, match="no input such as"):
        load_data("random:")


def test_folders_and_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(LoadError, match="holds no images; bnfix reads jpg") as caught:
        load_data(tmp_path)
    assert "loader.py:make" in caught.value.hint
    with pytest.raises(LoadError, match="there is no file"):
        load_data(tmp_path / "none.npy")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(LoadError, match="no data that bnfix reads"):
        load_data(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="batch size of 0"):
        load_data("random:3", batch_size=0)


# ---------------------------------------------------------------------------------------- --input from files


def test_files_hold_a_call_by_name_or_by_position(tmp_path):
    x, y = np.arange(6.0).reshape(2, 3), np.array([[1], [2]])
    np.savez(tmp_path / "named.npz", b=y, a=x)
    np.savez(tmp_path / "placed.npz", x, y)
    np.savez(tmp_path / "mixed.npz", x, b=y, s=np.array(3))
    np.savez(tmp_path / "many.npz", *[np.array([float(i)]) for i in range(12)])
    np.save(tmp_path / "x.npy", x)
    save_file({"arr_0": torch.from_numpy(x), "b": torch.from_numpy(y)}, tmp_path / "x.safetensors")
    named, placed, mixed = (load_input(str(tmp_path / f"{n}.npz")) for n in ("named", "placed", "mixed"))
    assert (named.args, sorted(named.kwargs)) == ((), ["a", "b"])
    assert torch.equal(named.kwargs["a"], torch.arange(6.0).reshape(2, 3))  # float64, NumPy's default: float32 here
    assert [a.dtype for a in placed.args] == [torch.float32, torch.int64]
    assert (len(mixed.args), list(mixed.kwargs), mixed.kwargs["s"].dim()) == (1, ["b", "s"], 0)
    many = load_input(str(tmp_path / "many.npz"))  # arr_10 comes before arr_2 in the alphabet
    assert [a.item() for a in many.args] == list(range(12))
    assert load_input(str(tmp_path / "x.npy")).signature == "2x3"
    kept = load_input(str(tmp_path / "x.safetensors"))
    assert (sorted(kept.kwargs), kept.kwargs["arr_0"].dtype) == (["arr_0", "b"], torch.float64)


def test_input_files_that_are_none(tmp_path, monkeypatch):
    np.savez(tmp_path / "gap.npz", arr_0=np.ones(2), arr_2=np.ones(2))
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "empty.npz", x=np.ones((0, 3)))
    np.savez(tmp_path / "text.npz", x=np.array(["a"]))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    (tmp_path / "x.pt").write_bytes(b"x")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "gap.npz").read_bytes()[:200])
    for name, said in [
        ("gap.npz", "holds arr_2, and no arr_1"),
        ("none.npz", "holds no arrays"),
        ("empty.npz", r"x is empty: its shape is \(0, 3\)"),
        ("text.npz", "which torch has not"),
        ("objects.npz", "does not unpickle"),
        ("x.pt", "is no input that bnfix reads"),
        ("cut.npz", "can't be read"),
        ("gone.npz", "there is no file"),
    ]:
        with pytest.raises(LoadError, match=said):
            load_input(str(tmp_path / name))
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(1 << 20, dtype=np.uint8))
    monkeypatch.setattr("bnfix.formats.arrays.MAX_INPUT", 1 << 19)
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 14
    with pytest.raises(LoadError, match="too much for one input"):
        load_input(str(tmp_path / "bomb.npz"))


def test_a_header_that_lies_is_one_error(tmp_path):
    """The array says 2**40 numbers, and eight bytes follow."""
    np.save(tmp_path / "x.npy", np.ones(1))
    whole = (tmp_path / "x.npy").read_bytes()
    lying = whole.replace(b"(1,), }", b"(1099511627776,), }").replace(b" " * 12 + b"\n", b"\n")
    assert len(lying) == len(whole)
    (tmp_path / "x.npy").write_bytes(lying)
    with pytest.raises(LoadError, match="can't be read"):
        load_input(str(tmp_path / "x.npy"))


def test_code_without_a_function_names_those_there_are(loaders):
    with pytest.raises(LoadError, match="is Python code: say what in it gives the batches") as caught:
        load_data(loaders)
    assert caught.value.hint.splitlines()[0] == f"--data {loaders}:make_loader"
    (loaders.parent / "bare.py").write_text("def f(a): pass\n")
    with pytest.raises(LoadError) as caught:
        load_data(loaders.parent / "bare.py")
    assert caught.value.hint.startswith("write a function in it")  # not as if there were one
    assert caught.value.hint.endswith(f"--data {loaders.parent / 'bare.py'}:make")


def test_an_empty_array_is_said_to_be_empty(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((0, 3, 8, 8)))
    with pytest.raises(LoadError, match=r"x.npy is empty: there are no samples in array \(0, 3, 8, 8\)"):
        load_data(tmp_path / "x.npy")
