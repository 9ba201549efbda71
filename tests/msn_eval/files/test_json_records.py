"""Seals: an object reads back as it was written, and any change of it is noticed."""

import hashlib
import json
from typing import Any

import pytest

from msn_eval.files.json_records import add_seal, pack_sealed, parse_json, remove_seal, unpack_sealed

_CONTENT = {"name": "räum/\udcff", "top1": 0.1, "counts": [1, 2], "inner": {"b": None, "a": True}}


def test_sealed_object_reads_back_whatever_its_layout() -> None:
    text = json.dumps(add_seal(_CONTENT), indent=3, sort_keys=True)

    assert remove_seal(parse_json(text.encode())) == _CONTENT


def test_seal_is_the_hash_of_the_canonical_text_of_the_other_fields() -> None:
    sealed = add_seal({"b": [1, 0.5], "a": "x"})

    assert sealed["seal"] == hashlib.sha256(b'{"a":"x","b":[1,0.5]}').hexdigest()
    assert list(sealed)[-1] == "seal"


@pytest.mark.parametrize(
    "change",
    [
        {"top1": 0.95},
        {"counts": [2, 1]},
        {"inner": {"b": None, "a": 1}},
        {"more": 0},
        {"seal": None},
        {"seal": "0" * 64},
    ],
)
def test_changed_field_breaks_the_seal(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="its seal does not match"):
        remove_seal(add_seal(_CONTENT) | change)


@pytest.mark.parametrize("content", [_CONTENT, [], None], ids=["unsealed", "list", "null"])
def test_missing_seal_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="it has no seal"):
        remove_seal(content)


def test_packed_object_reads_back_in_both_ways() -> None:
    packed = pack_sealed(_CONTENT)

    assert unpack_sealed(packed) == remove_seal(parse_json(packed)) == _CONTENT


def test_every_flipped_bit_breaks_the_seal_of_a_packed_object() -> None:
    packed = pack_sealed(_CONTENT)

    for position in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match="its seal does not match"):
            unpack_sealed(bytes(damaged))
