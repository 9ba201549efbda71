"""The zip archives of torch.save."""

import io
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msn_eval.checkpoints.formats.torch_zip import Archive, read_archive
from msn_eval.errors import CheckpointError

WEIGHTS = {"weight": torch.arange(600.0), "none": torch.empty(0), "half": torch.ones(3).half()}


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    return buffer.getvalue()


def read(content: bytes) -> Archive:
    return read_archive(io.BytesIO(content), len(content), where="vit.pth")


def zipped(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def test_members_are_those_that_zipfile_finds() -> None:
    content = saved()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        expected = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}

    found = read(content).members

    assert {name: content[one.start : one.start + one.size] for name, one in found.items()} == expected


def test_checksums_are_those_of_the_members() -> None:
    content = saved()
    assert all(
        zlib.crc32(content[one.start : one.start + one.size]) == one.crc32 for one in read(content).members.values()
    )


def test_archive_written_without_checksums_is_told() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        content = saved()
    finally:
        torch.serialization.set_crc32_options(True)
    assert (read(content).has_checksums, read(saved()).has_checksums) == (False, True)


def test_archive_saved_to_a_path_is_accepted(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "ViT größe.pth")
    assert read((tmp_path / "ViT größe.pth").read_bytes()).members["data.pkl"].size > 0


def test_archive_cut_anywhere_is_refused() -> None:
    content = saved()
    for size in range(0, len(content), 41):
        with pytest.raises(CheckpointError, match=f"truncated zip: no central directory, {size:,} bytes"):
            read(content[:size])


DATA = ("vit/data.pkl", b"N.")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped(DATA, DATA), "two members of one name"),
        (zipped(DATA, ("vit/DATA.PKL", b"N.")), "two members of one name"),
        (zipped(DATA, ("vit/../x", b"")), "member named"),
        (zipped(DATA, ("/vit/x", b"")), "member named"),
        (zipped(DATA, ("vit/a\\b", b"")), "member named"),
        (zipped(DATA, ("other/x", b"")), "outside its one folder"),
        (zipped(("readme.txt", b"")), "zip archive of something else"),
        (zipped(("weight.npy", b"")), r"\.npz"),
        (zipped(("config.json", b""), ("metadata.json", b""), ("model.weights.h5", b"")), "Keras"),
        (zipped(("[Content_Types].xml", b""), ("word/document.xml", b"")), "something else"),
        (zipped(DATA, ("vit/constants.pkl", b"")), "TorchScript"),
        (zipped(DATA, ("vit/code/__torch__.py", b"")), "TorchScript"),
        (zipped(("vit/archive_format", b"pt2"), ("vit/models/model.json", b"")), r"\.pt2"),
        (zipped(("serialized_exported_program.json", b""), ("version", b"")), "something else"),
        (zipped(), "empty zip"),
        (b"\0" + zipped(DATA), "not where it should be"),
        (zipped(DATA) + b"\0", "bytes behind its directory"),
        (zipped(DATA)[:-2] + b"\1\0x", "bytes behind its directory"),
        (zipped(DATA) + zipped(DATA), "not where it should be"),
    ],
)
def test_other_archives_are_refused_by_what_they_are(content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as refusal:
        read(content)
    assert refusal.value.hint


def test_compressed_members_are_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("vit/data.pkl", bytes(1000))
    with pytest.raises(CheckpointError, match="compressed members"):
        read(buffer.getvalue())


def test_overlapping_members_are_refused() -> None:
    content = bytearray(zipped(("vit/data.pkl", b"N."), ("vit/data/1", b"abc"), ("vit/data/2", b"abc")))
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        first, second, third = archive.infolist()
        directory = archive.start_dir
    assert second.file_size == third.file_size
    entry = content.index(b"PK\1\2", content.index(b"PK\1\2", content.index(b"PK\1\2", directory) + 1) + 1)
    struct.pack_into("<I", content, entry + 42, second.header_offset)
    with pytest.raises(CheckpointError, match="differ from their directory"):
        read(bytes(content))
    assert first.header_offset == 0


def test_too_many_members_are_refused_before_they_are_read() -> None:
    content = zipped(DATA)
    end = len(content) - 22
    zip64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 1 << 50, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    record = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with pytest.raises(CheckpointError, match="zip archive with"):
        read(content[:end] + zip64 + locator + record)


@given(place=st.integers(min_value=0, max_value=len(saved()) - 1), bit=st.integers(min_value=0, max_value=7))
def test_any_flipped_bit_leaves_the_members_in_the_file_or_is_refused(place: int, bit: int) -> None:
    content = bytearray(saved())
    content[place] ^= 1 << bit
    try:
        members = read(bytes(content)).members
    except CheckpointError:
        return
    assert all(member.start + member.size <= len(content) for member in members.values())
