"""Files that are not what was written: torch reads over a flipped bit, and the weight in it is as good as any."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from formats_nets import IMAGE, Net, net

from bnfix.errors import LoadError
from bnfix.formats import load, save, sniff
from bnfix.formats.archive import Archive
from bnfix.formats.loading import weights
from bnfix.formats.updating import update
from bnfix.running import Call


def flip(path: Path, record: str) -> None:
    """One bit in the middle of ``record``."""
    with zipfile.ZipFile(path) as file:
        member = next(m for m in file.infolist() if f"/{m.filename}".endswith(f"/{record}"))
        assert file.testzip() is None
    data = bytearray(path.read_bytes())
    name, extra = struct.unpack("<HH", data[member.header_offset + 26 : member.header_offset + 30])
    data[member.header_offset + 30 + name + extra + member.file_size // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("record", ["data/0", "data/3", ".data/serialization_id"])
def test_a_flipped_bit_is_seen_and_the_record_named(tmp_path: Path, record: str) -> None:
    path = tmp_path / "w.pt"
    torch.save(net().state_dict(), path)
    flip(path, record)
    torch.load(path)  # sees nothing
    info = sniff(path)
    title = f"a damaged zip archive: record {record} is not what was written, by its checksum"
    assert (info.kind, info.title, info.loadable) == ("damaged", title, False)
    for read in (lambda: load(path, arch=Net), lambda: load(path, arch=Net, trust=True), lambda: weights(path)):
        with pytest.raises(LoadError) as caught:
            read()
        assert caught.value.message.startswith(f"{path} is {title}")
        assert caught.value.hint == "copy or download it again"


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_in_modules_and_programs_too(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "module.pt")
    torch.jit.save(torch.jit.trace(net(), IMAGE), tmp_path / "script.pt")
    save(net(), tmp_path / "program.pt2", calls=[Call((IMAGE,))])
    with zipfile.ZipFile(tmp_path / "program.pt2") as file:  # before torch 2.8 all tensors are one record
        old = "serialized_state_dict.pt" in file.namelist()
    tensors = "serialized_state_dict.pt" if old else "data/weights/weight_0"
    for name, record in [("module.pt", "data/0"), ("script.pt", "data/0"), ("program.pt2", tensors)]:
        assert sniff(tmp_path / name).loadable
        flip(tmp_path / name, record)
        assert f"record {record} is not what was written" in sniff(tmp_path / name).title
        with pytest.raises(LoadError, match="is not what was written"):
            load(tmp_path / name, trust=True)


def test_what_a_dangerous_file_names_is_said_first(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return eval, ("1",)

    torch.save({"w": torch.zeros(8), "x": Evil()}, tmp_path / "w.pt")
    flip(tmp_path / "w.pt", "data/0")
    assert sniff(tmp_path / "w.pt").dangerous == ("__builtin__.eval",)


def test_files_written_without_checksums_load(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net().state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(computed)
    with zipfile.ZipFile(path) as file:
        assert {m.CRC for m in file.infolist()} == {0}
    loaded = load(path, arch=Net)
    assert torch.equal(loaded.value(IMAGE), net()(IMAGE))
    update(loaded.value, tmp_path / "again.pt", source=loaded.info)
    assert torch.equal(load(tmp_path / "again.pt", arch=Net).value(IMAGE), net()(IMAGE))


def test_a_file_that_was_whole_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command looks at its file several times; another file of that name is another file."""
    read: list[str] = []
    checked = Archive.check_sums.__globals__["_check_sum"]
    monkeypatch.setitem(
        Archive.check_sums.__globals__, "_check_sum", lambda f, m, name: (read.append(name), checked(f, m, name))
    )
    path = tmp_path / "w.pt"
    torch.save(net().state_dict(), path)
    for _ in range(3):
        assert sniff(path).loadable
    assert read.count("data/0") == 1
    torch.save(net().state_dict(), tmp_path / "other.pt")
    flip(tmp_path / "other.pt", "data/0")
    (tmp_path / "other.pt").replace(path)
    assert sniff(path).kind == "damaged"
    assert sniff(path).kind == "damaged"
