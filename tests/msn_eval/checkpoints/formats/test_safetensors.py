"""The safetensors format, compared with its own library."""

import io
import json
import math
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msn_eval.checkpoints.formats.safetensors import read_header, read_tensors
from msn_eval.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64),
]


def read(content: bytes) -> dict[str, Tensor]:
    file = io.BytesIO(content)
    return read_tensors(file, read_header(file, len(content), where="vit.safetensors"), where="vit.safetensors")


def written(header: str, data: int = 0) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + bytes(data)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(min_value=0, max_value=4), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(min_value=0, max_value=1000)))
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), tensors(), max_size=5),
    st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3),
)
def test_what_the_library_writes_is_read_bit_for_bit(
    content: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    found = read(safetensors.torch.save(content, metadata))

    assert {name: facts(one) for name, one in found.items()} == {name: facts(one) for name, one in content.items()}


def facts(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist()


def test_every_tensor_has_memory_of_its_own() -> None:
    found = read(safetensors.torch.save({"a": torch.ones(2), "b": torch.ones(2)}))
    found["a"].zero_()
    assert found["b"].tolist() == [1, 1]


ONE = '"dtype":"F32","shape":[2],"data_offsets":'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header of"),
        (struct.pack("<Q", 1 << 62), "header of"),
        (struct.pack("<Q", 65 << 20) + b"{}", "header of"),
        (written(f'{{"a":{{{ONE}[0,8]}},"a":{{{ONE}[0,8]}}}}', 8), "the name 'a' twice"),
        (written('{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', 8), "the name 'dtype' twice"),
        (written(f'{{"a":{{{ONE}[0,8]}},"b":{{{ONE}[4,12]}}}}', 12), "'b' overlapping"),
        (written(f'{{"a":{{{ONE}[0,8]}},"b":{{{ONE}[12,20]}}}}', 20), "'b' overlapping another or leaving a gap"),
        (written(f'{{"a":{{{ONE}[4,12]}}}}', 12), "gap"),
        (written(f'{{"a":{{{ONE}[0,8]}}}}', 7), "cannot be read in full"),
        (written(f'{{"a":{{{ONE}[0,8]}}}}', 9), "cannot be read in full"),
        (written(f'{{"a":{{{ONE}[8,0]}}}}', 8), "does not fit its bytes"),
        (written(f'{{"a":{{{ONE}[0,4]}}}}', 4), "does not fit its bytes"),
        (written(f'{{"a":{{{ONE}[0,8,8]}}}}', 8), "without its type, shape and place"),
        (written('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', 4), "does not fit its bytes"),
        (written('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', 4), "does not fit its bytes"),
        (written('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', 4), "does not fit its bytes"),
        (written('{"a":{"dtype":"F32","shape":[1],"data_offsets":[false,4]}}', 4), "does not fit its bytes"),
        (written('{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}', 4), "type 'F4', which is not known"),
        (written('{"a":{"shape":[1],"data_offsets":[0,4]}}', 4), "without its type"),
        (written('{"a":3}'), "without its type"),
        (written('{"__metadata__":{"a":1}}'), "metadata that is no text"),
        (written('{"__metadata__":[]}'), "metadata that is no text"),
        (written("[1]"), "no JSON object"),
        (written('{"a"'), "no JSON"),
        (written('{"a":NaN}'), "no JSON"),
        (written('{"a":' * 100_000), "no JSON"),
        (written("[" * 100_000), "no JSON"),
        (written('{"a":' + "9" * 5000 + "}"), "no JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "no JSON"),
    ],
)
def test_header_that_does_not_fit_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as refusal:
        read(content)
    assert refusal.value.hint


def test_names_in_a_refusal_are_spelled_out() -> None:
    name = json.dumps("\x1b[1m<script>" + "a" * 1000)
    with pytest.raises(CheckpointError) as refusal:
        read(written(f"{{{name}:3}}"))
    assert "\x1b" not in str(refusal.value)
    assert len(refusal.value.what) < 200


def test_shape_beyond_all_memory_is_refused_without_taking_it() -> None:
    header = '{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}'
    with pytest.raises(CheckpointError, match="does not fit its bytes"):
        read(written(header))
