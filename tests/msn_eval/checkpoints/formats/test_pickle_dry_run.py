"""Pickles carried out on paper."""

import io
import pickle
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from msn_eval.checkpoints.formats.pickle_dry_run import Rehearsal, rehearse
from msn_eval.errors import CheckpointError


def rehearsed(content: bytes, most_bytes: int = 10_000) -> Rehearsal:
    return rehearse(io.BytesIO(content), most_bytes=most_bytes, where="vit.pth")


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


def test_storages_are_those_of_the_tensors() -> None:
    claims = rehearsed(pickled({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)})).storages
    assert {key: claim.bytes for key, claim in claims.items()} == {"0": 48, "1": 10}


def test_tied_weights_claim_their_bytes_once() -> None:
    weight = torch.ones(100)
    assert rehearsed(pickled({"a": weight, "b": weight, "c": weight[10:]}), most_bytes=400).claimed_bytes == 400


def test_claims_above_the_files_size_are_refused() -> None:
    with pytest.raises(CheckpointError, match="claims 400 bytes of weights, more than the file holds"):
        rehearsed(pickled({"a": torch.ones(100)}), most_bytes=399)


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(a=1),
        Counter("aab"),
        {1, 2},
        b"bytes",
        bytearray(b"bytes"),
        bytearray(),
        1 + 2j,
        torch.Size([1, 2]),
        torch.float16,
        torch.device("cuda:1"),
        torch.strided,
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(4).to(torch.uint16),
        torch.ones(4).to(torch.float8_e5m2),
        torch.empty(0, 3),
        torch.ones(4, 6).t()[1:, ::2],
        {(0, "a"): None, 1: True},
        2**70,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_torch_saves_is_accepted(value: object) -> None:
    assert rehearsed(pickled({"value": value})).value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x02cbuiltins\nbytearray\nM\xff\xff\x85R.", "calls builtins.bytearray"),
        (b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0bz2\x86R.", "calls _codecs.encode"),
        (b"\x80\x02N)R.", "no named function"),
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "no named function"),
        (b"\x80\x02})))\x86Ns.", "no dict"),
        (b"\x80\x02}))\x86Ns.", "keys that are no plain values"),
        (b"\x80\x02)Na.", "no list"),
        (b"\x80\x02NQ.", "no storage"),
        (b"\x80\x02]}b.", "state of something"),
        (b"\x80\x02ccollections\ndefaultdict\n)RNNs.", "collections.defaultdict with items"),
        (b"\x80\x02R.", "never gave"),
        (b"\x80\x02h\x01.", "never gave"),
        (b"\x80\x02N0N.", "not written by torch.save"),
        (b"\x80\x04N.", "pickle protocol 4"),
    ],
)
def test_what_torch_never_saves_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        rehearsed(content)


def test_protocol_4_is_refused_by_its_number() -> None:
    with pytest.raises(CheckpointError, match="saved with pickle protocol 4") as refusal:
        rehearsed(pickle.dumps({"epoch": 3}, protocol=4))
    assert "torch.save" in refusal.value.hint
