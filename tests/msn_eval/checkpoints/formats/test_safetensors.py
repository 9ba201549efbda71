"""The safetensors format: what its library reads, and what is refused."""

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from msn_eval.checkpoints.formats.safetensors import DTYPES, read_metadata, read_tensors, save_tensors
from msn_eval.errors import CheckpointError

ONE = '"dtype":"F32","shape":[2],"data_offsets":'


def written(header: str, data: int = 0) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + bytes(data)


def refusal(folder: Path, content: bytes) -> CheckpointError:
    path = folder / "vit.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path) and read_metadata(path)
    return caught.value


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensors_are_read_bit_for_bit_in_memory_of_their_own(tmp_path: Path, dtype: torch.dtype) -> None:
    top = 2 if dtype == torch.bool else 256
    raw = torch.arange(6 * dtype.itemsize).remainder(top).to(torch.uint8)
    tensors = {"a": raw.view(dtype).reshape(2, 3), "b": raw.view(dtype).t(), "none": torch.empty(0, 3, dtype=dtype)}
    path = tmp_path / "vit.safetensors"
    save_tensors(path, tensors)

    found = read_tensors(path)
    path.write_bytes(b"")

    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        name: (one.dtype, one.shape) for name, one in tensors.items()
    }
    assert torch.equal(found["a"].reshape(-1).view(torch.uint8), raw)


def test_metadata_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata={"epoch": "3"})
    assert read_metadata(path) == {"epoch": "3"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 1 << 62),
        written(f'{{"a":{{{ONE}[0,8]}},"a":{{{ONE}[0,8]}}}}', 8),
        written('{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', 8),
        written(f'{{"a":{{{ONE}[0,8]}}}}', 7),
        written('{"__metadata__":{"a":1}}'),
        struct.pack("<Q", 2) + b"\xff\xfe",
    ],
)
def test_file_that_does_not_fit_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    error = refusal(tmp_path, content)
    assert ("cannot be read in full" in error.what, bool(error.hint)) == (True, True)


def test_names_in_a_refusal_are_short_and_escaped(tmp_path: Path) -> None:
    name = json.dumps("\x1b[1m<script>" + "a" * 1000)
    error = refusal(tmp_path, written(f"{{{name}:3}}"))
    assert "\x1b" not in str(error)
    assert len(error.what) < 300
