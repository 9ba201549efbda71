"""Looking at pickles without carrying them out."""

import contextlib
import io
import os
import pickle
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_eval.checkpoints.formats import opcodes
from msn_eval.checkpoints.formats.opcodes import PickleScan, scan_pickle
from msn_eval.errors import CheckpointError


def scan(content: bytes) -> PickleScan:
    return scan_pickle(io.BytesIO(content), where="vit.pth")


@pytest.mark.parametrize("protocol", range(6))
def test_global_is_named_in_every_protocol(protocol: int) -> None:
    assert scan(pickle.dumps(os.system, protocol=protocol)).names == ("posix.system",)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"(X\4\0\0\0trueiposix\nsystem\n.", "posix.system"),
        (b"\x80\x02\x82\x07.", "copyreg extension 7"),
        (b"c__builtin__\nset\n.", "builtins.set"),
        (b"ccopy_reg\n_reconstructor\n.", "copyreg._reconstructor"),
    ],
    ids=["INST", "EXT1", "Python 2 module", "renamed module"],
)
def test_older_ways_to_name_a_global_are_seen(content: bytes, name: str) -> None:
    assert scan(content).names == (name,)


def test_names_fetched_from_the_memo_are_not_taken_for_accepted_ones() -> None:
    content = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940" + b"\x8c\x0bcollections\x8c\x0bOrderedDicth\x00h\x01\x93."
    assert scan(content).names != ("posix.system",)
    assert scan(content).protocol == 4


def test_name_with_a_space_is_no_accepted_name() -> None:
    assert scan(b"ccollections OrderedDict\nx\n.").names == ("collections.OrderedDict x",)


@pytest.mark.parametrize("protocol", range(6))
def test_protocol_is_that_of_the_newest_opcode(protocol: int) -> None:
    assert scan(pickle.dumps(OrderedDict(a=1), protocol=protocol)).protocol <= protocol


def test_pickles_in_a_row_are_scanned_one_by_one() -> None:
    first, second = pickle.dumps(1, protocol=2), pickle.dumps(os.system, protocol=2)
    stream = io.BytesIO(first + second)

    ends = [scan_pickle(stream, where="vit.pth").end for _ in range(2)]

    assert ends == [len(first), len(first) + len(second)]


@pytest.mark.parametrize("size", range(40))
def test_pickle_cut_anywhere_is_refused(size: int) -> None:
    content = pickle.dumps({"weight": [1.0, 2], "name": "vit"}, protocol=2)
    with pytest.raises(CheckpointError, match=r"^vit\.pth: cannot be read in full"):
        scan(content[: min(size, len(content) - 1)])


def test_pickle_of_too_many_opcodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "MOST_OPCODES", 10)
    with pytest.raises(CheckpointError, match="more than 10 operations"):
        scan(b"]" + b"Na" * 10 + b".")


def test_pickle_of_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "MOST_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than 100 bytes"):
        scan(pickle.dumps("a" * 200, protocol=2))


@given(st.binary(max_size=200))
def test_any_bytes_are_scanned_or_refused(content: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        assert scan(content).end <= len(content)
