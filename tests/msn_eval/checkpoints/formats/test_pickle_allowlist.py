"""Names that a checkpoint may ask for."""

import argparse
import contextlib
import io
import os
import pathlib
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msn_eval.checkpoints.formats import pickle_allowlist as opcodes
from msn_eval.checkpoints.formats.pickle_allowlist import (
    ACCEPTED,
    STAND_INS,
    Dropped,
    PickleScan,
    PlainDict,
    check_names,
    scan_pickle,
    stand_ins,
    vetted_names,
)
from msn_eval.errors import CheckpointError


def scan(*names: str) -> PickleScan:
    return PickleScan(names=names, protocol=2, opcodes=9, end=9)


def refusal(*names: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check_names(scan(*names), sha256="5ha", where="vit.pth")
    return caught.value


def test_accepted_names_pass() -> None:
    check_names(scan(*ACCEPTED), sha256="5ha", where="vit.pth")
    assert "torch._utils._rebuild_tensor_v2" in ACCEPTED


@pytest.mark.parametrize(
    "name", ["posix.system", "builtins.eval", "builtins.getattr", "functools.partial", "torch.load", "torch.Tensor"]
)
def test_names_beyond_tensors_are_not_accepted(name: str) -> None:
    assert name not in ACCEPTED


def test_refusal_tells_what_was_found_what_is_vetted_and_the_hash() -> None:
    text = str(refusal("argparse.Namespace", "mymodels.Config", "posix.system"))
    assert [
        part in text for part in ("mymodels.Config, posix.system", "left out while loading: argparse.Namespace", "5ha")
    ] == [True] * 3


def test_refusal_tells_to_open_the_file_where_it_was_made() -> None:
    assert "sandbox without network" in refusal("mymodels.Config").hint


def test_sparse_tensors_are_refused_with_the_way_to_make_them_dense() -> None:
    assert "to_dense" in refusal("torch._utils._rebuild_sparse_tensor", "torch.sparse_coo").hint


def test_refusal_lists_only_the_first_names_and_their_beginnings() -> None:
    text = str(refusal(*(f"evil.{turn}" + "x" * 10_000 for turn in range(1000))))
    assert len(text) < 1500
    assert "and 995 more" in text


def test_only_dropped_values_are_told() -> None:
    lightning = "lightning.fabric.utilities.data.AttributeDict"
    assert vetted_names(scan("torch.FloatStorage", "argparse.Namespace", lightning)) == ("argparse.Namespace",)


@pytest.mark.parametrize("kind", [argparse.Namespace, pathlib.PosixPath])
def test_stand_ins_are_never_the_real_classes(kind: type) -> None:
    assert STAND_INS[f"{kind.__module__}.{kind.__name__}"] is Dropped


def test_stand_in_takes_anything_and_keeps_nothing() -> None:
    dropped = Dropped(1, "two", [3])
    dropped.__setstate__({"four": 4})
    assert vars(dropped) == {}


def test_dict_with_attributes_becomes_a_plain_dict() -> None:
    assert type(PlainDict(1)) is dict


def test_stand_ins_are_known_to_torch_only_within_their_context() -> None:
    before = torch.serialization.get_safe_globals()
    with stand_ins():
        during = len(torch.serialization.get_safe_globals())
    after = torch.serialization.get_safe_globals()  # in the order of a set, which may change
    assert (set(after), len(after), during) == (set(before), len(before), len(before) + len(STAND_INS))


@pytest.mark.parametrize("name", [name for name in STAND_INS if name.startswith(("argparse", "pathlib.P", "builtins"))])
def test_names_are_those_of_real_classes(name: str) -> None:
    module, _, kind = name.rpartition(".")
    assert pickle.loads(f"c{module}\n{kind}\n.".encode()).__name__ == kind


def scan_stream(content: bytes) -> PickleScan:
    return scan_pickle(io.BytesIO(content), where="vit.pth")


@pytest.mark.parametrize("protocol", range(6))
def test_global_is_named_in_every_protocol(protocol: int) -> None:
    assert scan_stream(pickle.dumps(os.system, protocol=protocol)).names == ("posix.system",)


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
    assert scan_stream(content).names == (name,)


def test_names_fetched_from_the_memo_are_not_taken_for_accepted_ones() -> None:
    content = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940" + b"\x8c\x0bcollections\x8c\x0bOrderedDicth\x00h\x01\x93."
    assert scan_stream(content).names != ("posix.system",)
    assert scan_stream(content).protocol == 4


def test_name_with_a_space_is_no_accepted_name() -> None:
    assert scan_stream(b"ccollections OrderedDict\nx\n.").names == ("collections.OrderedDict x",)


@pytest.mark.parametrize("protocol", range(6))
def test_protocol_is_that_of_the_newest_opcode(protocol: int) -> None:
    assert scan_stream(pickle.dumps(OrderedDict(a=1), protocol=protocol)).protocol <= protocol


def test_pickles_in_a_row_are_scanned_one_by_one() -> None:
    first, second = pickle.dumps(1, protocol=2), pickle.dumps(os.system, protocol=2)
    stream = io.BytesIO(first + second)

    ends = [scan_pickle(stream, where="vit.pth").end for _ in range(2)]

    assert ends == [len(first), len(first) + len(second)]


@pytest.mark.parametrize("size", range(40))
def test_pickle_cut_anywhere_is_refused(size: int) -> None:
    content = pickle.dumps({"weight": [1.0, 2], "name": "vit"}, protocol=2)
    with pytest.raises(CheckpointError, match=r"^vit\.pth: cannot be read in full"):
        scan_stream(content[: min(size, len(content) - 1)])


def test_pickle_of_too_many_opcodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "MOST_OPCODES", 10)
    with pytest.raises(CheckpointError, match="more than 10 operations"):
        scan_stream(b"]" + b"Na" * 10 + b".")


def test_pickle_of_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "MOST_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than 100 bytes"):
        scan_stream(pickle.dumps("a" * 200, protocol=2))


@given(st.binary(max_size=200))
def test_any_bytes_are_scanned_or_refused(content: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        assert scan_stream(content).end <= len(content)
