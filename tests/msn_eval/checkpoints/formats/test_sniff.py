"""What files are by their first bytes."""

import io
import pickle
import tarfile

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from msn_eval.checkpoints.formats.sniff import sniff_container


def saved(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def real_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (saved(zipped=True), "zip"),
        (saved(zipped=False), "pickle"),
        (pickle.dumps({"epoch": 3}), "pickle"),
        (pickle.dumps({"epoch": 3}, protocol=0), "pickle"),
        (pickle.dumps({"epoch": 3}, protocol=1), "pickle"),
        (pickle.dumps(print, protocol=0), "pickle"),
        (safetensors.torch.save({"weight": torch.ones(2)}), "safetensors"),
    ],
    ids=["torch", "torch before 1.6", "bare pickle", "protocol 0", "protocol 1", "bare global", "safetensors"],
)
def test_containers_of_weights_are_told_apart(content: bytes, container: str) -> None:
    assert sniff_container(content[:512]) == container


@pytest.mark.parametrize(
    ("head", "what", "remedy"),
    [
        (b"", "empty", "fetch it again"),
        (bytes(512), "zeros", "Fetch it again"),
        (b"<!DOCTYPE html><html>404", "web page", "fetch the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git-lfs pointer", "git lfs pull"),
        (b"\x1f\x8b\x08\0", "gzip", "Unpack it"),
        (b"BZh91AY", "bzip2", "Unpack it"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17000000\n",
            "17,000,000 bytes",
            "git lfs pull",
        ),
        (b"version https://git-lfs", "git-lfs pointer", "git lfs pull"),
        (b"\x28\xb5\x2f\xfd\0", "zstd", "Unpack it"),
        (b"GGUF\3\0", "GGUF", "safetensors"),
        (b"\x08\x07\x12\x07pytorch", "ONNX", "safetensors"),
        (b'{"weight_map": {}}', "JSON", "weight file itself"),
        (b"#!/bin/sh\n", "script", "safetensors"),
        (b"PK\5\6" + bytes(18), "empty zip", "torch.save"),
        (b"\xfd7zXZ\0", "xz archive", "Unpack it"),
        (b"7z\xbc\xaf\x27\x1c", "7z archive", "Unpack it"),
        (real_tar()[:512], "tar archive", "Unpack it"),
        (b"\x93NUMPY\x01\0", "NumPy", "safetensors"),
        (b"\x89HDF\r\n", "HDF5", "state dict"),
        (b"epoch,loss\n1,0.5\n", "no checkpoint format that is known (first bytes 65 70 6f 63)", "safetensors"),
    ],
)
def test_what_is_no_container_is_named_with_a_remedy(head: bytes, what: str, remedy: str) -> None:
    verdict = sniff_container(head)
    assert isinstance(verdict, tuple)
    assert (what in verdict[0], remedy in verdict[1]) == (True, True)


def test_pickle_that_is_also_a_tar_is_taken_for_a_tar() -> None:
    head = bytearray(saved(zipped=False)[:100].ljust(512, b"\0"))
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    assert sniff_container(bytes(head))[0] == "a tar archive"


@given(st.binary(max_size=512))
def test_any_first_bytes_give_a_container_or_a_fault_with_its_remedy(head: bytes) -> None:
    verdict = sniff_container(head)
    assert verdict in ("zip", "pickle", "safetensors") or all(verdict)
