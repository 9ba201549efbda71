"""Dry runs of pickles: what torch saves passes, everything else is refused by what it does."""

import contextlib
import io
import os
import pickle
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msn_eval.checkpoints.formats import pickle_dry_run
from msn_eval.checkpoints.formats.pickle_allowlist import STUBS, Dropped, PlainDict
from msn_eval.checkpoints.formats.pickle_dry_run import dry_run_pickle
from msn_eval.errors import CheckpointError


def dry_run(content: bytes, file_bytes: int = 10_000) -> tuple[object, dict[str, int], tuple[str, ...]]:
    return dry_run_pickle(io.BytesIO(content), file_bytes=file_bytes, sha256="5ha")


def refusal(content: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        dry_run(content)
    return caught.value


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


def naming(*names: str) -> bytes:
    return b"\x80\x02(" + b"".join(f"c{name.replace('/', chr(10))}\n".encode() for name in names) + b"t."


def test_storages_are_those_of_the_tensors() -> None:
    _, storage_bytes, _ = dry_run(pickled({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}))
    assert storage_bytes == {"0": 48, "1": 10}


def test_tied_weights_claim_their_bytes_once() -> None:
    weight = torch.ones(100)
    assert dry_run(pickled({"a": weight, "b": weight, "c": weight[10:]}), file_bytes=400)[1] == {"0": 400}


def test_claims_above_the_files_size_are_refused() -> None:
    with pytest.raises(CheckpointError, match="claims 400 bytes of weights, more than the file holds"):
        dry_run(pickled({"a": torch.ones(100)}), file_bytes=399)


@pytest.mark.parametrize(
    "value",
    [
        *(OrderedDict(a=1), Counter("aab"), {1, 2}, b"bytes", bytearray(b"bytes"), bytearray(), 1 + 2j, 2**70),
        *(torch.Size([1, 2]), torch.float16, torch.device("cuda:1"), torch.strided),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(4).to(torch.uint16),
        torch.ones(4).to(torch.float8_e5m2),
        torch.empty(0, 3),
        torch.ones(4, 6).t()[1:, ::2],
        {(0, "a"): None, 1: True},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_torch_saves_is_accepted(value: object) -> None:
    assert dry_run(pickled({"value": value}))[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x02cbuiltins\nbytearray\nM\xff\xff\x85R.", "calls builtins.bytearray"),
        (b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0bz2\x86R.", "encodes text"),
        (b"\x80\x02N)R.", "not a named function"),
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "not a named function"),
        (b"\x80\x02}))\x86\x85Ns.", "keys that are not plain values"),
        (b"\x80\x02NQ.", "not a storage"),
        (b"\x80\x02]}b.", "not a named function or object"),
        (b"\x80\x02ccollections\ndefaultdict\n)RNNs.", "collections.defaultdict with items"),
        (b"\x80\x02R.", "cannot be read in full"),
        (b"\x80\x02h\x01.", "cannot be read in full"),
        (b"\x80\x02\x82\x07.", "cannot be read in full"),
        (b"\x80\x04\x88\x94.", "saved with pickle protocol 4"),
    ],
)
def test_what_torch_never_saves_is_refused(content: bytes, reason: str) -> None:
    error = refusal(content)
    assert (reason in error.what, len(error.hint) > 10) == (True, True)


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps(os.system, protocol=protocol) for protocol in range(6)),
        b"(X\4\0\0\0trueiposix\nsystem\n.",
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940h\x00h\x01\x93.",
    ],
    ids=[*(f"protocol {protocol}" for protocol in range(6)), "INST", "from the memo"],
)
def test_foreign_global_is_named_in_every_protocol(content: bytes) -> None:
    assert "found: posix.system" in refusal(content).what


def test_refusal_has_foreign_and_dropped_names_and_the_hash() -> None:
    error = refusal(naming("argparse/Namespace", "mymodels/Config", "posix/system"))
    assert "found: mymodels.Config, posix.system" in error.what
    assert "left out while loading: argparse.Namespace\n  sha256: 5ha" in error.what
    assert "sandbox without network" in error.hint


def test_sparse_tensors_are_refused_with_the_way_to_make_them_dense() -> None:
    assert "to_dense" in refusal(naming("torch._utils/_rebuild_sparse_tensor", "torch/sparse_csc")).hint


def test_refusal_lists_only_the_first_names_and_their_beginnings() -> None:
    text = str(refusal(naming(*(f"evil/{turn}" + "x" * 1000 for turn in range(1000)))))
    assert len(text) < 1500
    assert "and 995 more" in text


def test_only_dropped_values_are_noted() -> None:
    _, _, notes = dry_run(
        naming("torch/FloatStorage", "argparse/Namespace", "lightning.fabric.utilities.data/AttributeDict")
    )
    assert notes == ("left out: argparse.Namespace",)


def test_stub_accepts_anything_and_keeps_nothing() -> None:
    dropped = Dropped(1, "two", [3])
    dropped.__setstate__({"four": 4})
    assert (vars(dropped), type(PlainDict(1))) == ({}, dict)


@pytest.mark.parametrize("name", [name for name in STUBS if name.startswith(("argparse", "pathlib.P", "builtins"))])
def test_names_of_stubs_are_those_of_real_classes(name: str) -> None:
    module, _, kind = name.rpartition(".")
    assert pickle.loads(f"c{module}\n{kind}\n.".encode()).__name__ == kind


def test_pickles_in_a_row_are_run_one_by_one() -> None:
    stream = io.BytesIO(pickle.dumps(1, protocol=2) + pickle.dumps("b", protocol=2))
    assert [dry_run_pickle(stream, file_bytes=9, sha256="")[0] for _ in range(2)] == [1, "b"]


@pytest.mark.parametrize("size", range(0, 40, 3))
def test_pickle_cut_anywhere_is_refused(size: int) -> None:
    content = pickle.dumps({"weight": [1.0, 2], "name": "vit"}, protocol=2)
    assert "cannot be read in full" in refusal(content[: min(size, len(content) - 1)]).what


def test_pickle_of_too_many_opcodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_dry_run, "_MAX_OPCODES", 10)
    assert "more than 10 operations" in refusal(b"]" + b"Na" * 10 + b".").what


@given(st.binary(max_size=200))
def test_any_bytes_are_run_or_refused(content: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        dry_run(content)
