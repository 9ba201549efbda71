"""The zip archives of torch.save, and others."""

import contextlib
import io
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msn_eval.checkpoints.formats.torch_file import check_zip
from msn_eval.errors import CheckpointError

WEIGHTS = {"weight": torch.arange(600.0), "none": torch.empty(0), "half": torch.ones(3).half()}
DATA = ("vit/data.pkl", b"\x80\x02}.")


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    return buffer.getvalue()


def check(content: bytes) -> tuple[str, ...]:
    return check_zip(io.BytesIO(content), file_bytes=len(content), sha256="")


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def test_archive_saved_to_a_path_is_accepted(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "ViT größe.pth")
    assert check((tmp_path / "ViT größe.pth").read_bytes()) == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped(DATA, DATA), "two members of one name"),
        (zipped(DATA, ("vit/DATA.PKL", b"N.")), "two members of one name"),
        *(
            (zipped(DATA, (name, b"")), "unsafe names")
            for name in ("vit/../x", "/vit/x", "vit/a\\b", "vit//x", "other/x")
        ),
        (zipped(("readme.txt", b"")), "zip archive of something else"),
        (zipped(), "zip archive of something else"),
        (zipped(("weight.npy", b"")), r"\.npz"),
        (zipped(DATA, ("vit/constants.pkl", b"")), "TorchScript"),
        (zipped(("vit/archive_format", b"pt2"), ("vit/models/model.json", b"")), r"\.pt2"),
        (zipped(DATA, method=zipfile.ZIP_DEFLATED), "compressed members"),
        (b"\0" + zipped(DATA), "bytes before its first member"),
        (zipped(DATA) + b"\0", "bytes behind its directory"),
        (zipped(DATA)[:-2] + b"\1\0x", "bytes behind its directory"),
        (zipped(DATA) + zipped(DATA), "bytes before its first member"),
    ],
)
def test_other_archives_are_refused_by_what_they_are(content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as refusal:
        check(content)
    assert refusal.value.hint


@given(place=st.integers(min_value=0, max_value=len(saved()) - 1), bit=st.integers(min_value=0, max_value=7))
def test_any_flipped_bit_is_accepted_or_refused(place: int, bit: int) -> None:
    content = bytearray(saved())
    content[place] ^= 1 << bit
    with contextlib.suppress(CheckpointError):
        check(bytes(content))
