"""Files cut off at any length and with bits flipped: an error of bnfix or a model, never anything else."""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from formats_nets import IMAGE, Net, net

from bnfix.errors import BnfixError
from bnfix.formats import load, save, sniff

CASES = 150


def _state_dict(path: Path) -> None:
    torch.save(net().state_dict(), path)


def _old_state_dict(path: Path) -> None:
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)


def _module(path: Path) -> None:
    torch.save(net(), path)


def _old_module(path: Path) -> None:
    torch.save(net(), path, _use_new_zipfile_serialization=False)


def _checkpoint(path: Path) -> None:
    torch.save({"model": net().state_dict(), "args": Namespace(a=1)}, path, pickle_protocol=4)


def _safetensors(path: Path) -> None:
    save(net(), path.with_suffix(".safetensors")).rename(path)


WRITERS = [_state_dict, _old_state_dict, _module, _old_module, _checkpoint, _safetensors]


def attempt(path: Path) -> str | None:
    """The message of the error of bnfix; None where a module came out. Any other exception passes."""
    try:
        value = load(path, arch=Net, trust=True).value
    except BnfixError as error:
        return error.message
    return None if isinstance(value, torch.nn.Module) else f"a {type(value).__name__}\n"


@pytest.mark.parametrize("write", WRITERS)
def test_whole_files_load(tmp_path, write):
    write(tmp_path / "x")
    assert torch.equal(load(tmp_path / "x", arch=Net, trust=True).value(IMAGE), net()(IMAGE))


@pytest.mark.parametrize("write", WRITERS)
def test_cut_off_anywhere_a_file_is_an_error_and_never_a_model(tmp_path, write):
    write(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    rng = random.Random(1)
    ends = {0, 1, 2, 4, 8, len(data) - 1, len(data) - 2, len(data) - 21} | {
        rng.randrange(len(data)) for _ in range(CASES)
    }
    for end in sorted(ends):
        (tmp_path / "x").write_bytes(data[:end])
        with pytest.raises(BnfixError) as caught:
            load(tmp_path / "x", arch=Net, trust=True)
        assert "\n" not in caught.value.message, end


@pytest.mark.parametrize("write", WRITERS)
def test_with_bits_flipped_a_file_is_an_error_or_a_model(tmp_path, write):
    write(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    rng = random.Random(2)
    outcomes = {"error": 0, "model": 0}
    for case in range(CASES):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 2, 8, 64])):
            # every second case in the first kilobyte, where the structure is
            at = rng.randrange(len(data) if case % 2 else min(1024, len(data)))
            changed[at] ^= 1 << rng.randrange(8)
        (tmp_path / "x").write_bytes(changed)
        outcome = attempt(tmp_path / "x")
        outcomes["model" if outcome is None else "error"] += 1
        assert outcome is None or ("\n" not in outcome and len(outcome) < 1000), case
    assert outcomes["error"] > CASES // 10


def test_random_bytes_are_nothing(tmp_path):
    rng = random.Random(3)
    for size in [1, 2, 3, 9, 30, 100, 1000, 5000]:
        for first in (b"", b"\x80\x02", b"PK\x03\x04", b"\x08\x07", b"(", b"{", b"\x10\0\0\0\0\0\0\0{"):
            (tmp_path / "x").write_bytes(first + rng.randbytes(size))
            assert not sniff(tmp_path / "x").loadable
            with pytest.raises(BnfixError):
                load(tmp_path / "x", arch=Net, trust=True)
