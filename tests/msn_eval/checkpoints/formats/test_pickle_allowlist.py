"""Names that a checkpoint may ask for."""

import argparse
import pathlib
import pickle

import pytest
import torch

from msn_eval.checkpoints.formats.opcodes import PickleScan
from msn_eval.checkpoints.formats.pickle_allowlist import (
    ACCEPTED,
    STAND_INS,
    Dropped,
    PlainDict,
    check_names,
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
    assert "sandbox without network" in refusal("mymodels.Config").remedy


def test_sparse_tensors_are_refused_with_the_way_to_make_them_dense() -> None:
    assert "to_dense" in refusal("torch._utils._rebuild_sparse_tensor", "torch.sparse_coo").remedy


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
