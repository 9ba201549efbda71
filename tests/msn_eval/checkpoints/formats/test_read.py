"""Reading weight files, and refusing those that are damaged, hostile, or something else."""

import argparse
import hashlib
import io
import pickle
import random
import re
import struct
import tarfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from msn_eval.checkpoints.formats.read import _plain_content, read_weight_file, sniff_container
from msn_eval.errors import CheckpointError

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def saved(content: object = WEIGHTS, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def written(folder: Path, content: bytes | None = None, name: str = "vit.pth") -> Path:
    path = folder / name
    path.write_bytes(saved() if content is None else content)
    return path


def old_file(pickled: bytes, keys: bytes = b"\x80\2].") -> bytes:
    headers = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    return headers + pickled + keys


def real_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors", "vit.bin", "vit"])
def test_container_is_recognised_by_content_and_not_by_name(tmp_path: Path, name: str) -> None:
    assert read_weight_file(written(tmp_path, safetensors.torch.save(WEIGHTS), name)).container == "safetensors"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_file_cut_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    content = saved(zipped=zipped)
    path = tmp_path / "vit.pth"
    for size in range(0, len(content) - 1, 7):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read_weight_file(path)


def training_checkpoint() -> dict[str, object]:
    """Return weights beside everything else that training code saves."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    hyper = argparse.Namespace(lr=0.1, out=Path("/runs"), sizes=[1, 2])
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "with an attribute"
    return {
        "model": network.state_dict(),
        "parameters": dict(network.named_parameters()),
        "noted": {"p": parameter},
        "optimizer": optimizer.state_dict(),
        "rng": [torch.get_rng_state(), random.getstate(), np.random.get_state()],
        "args": hyper,
        "config": OmegaConf.create({"a": {"b": [1, {"c": None}], "d": "${a.b}"}, "e": True, "f": 1.5, "g": "x"}),
        "list": OmegaConf.create([1, [2]]),
        "scores": {"best": np.float64(0.5), "last": np.int64(3), "all": np.arange(4), "named": np.array([None, "x"])},
        "paths": [PurePosixPath("a"), PureWindowsPath("b"), Path("c")],
        "plain": [1, 2.5, "x", b"x", b"", bytearray(b"x"), {1}, frozenset([1]), 1j, None, 2**70, (1, (2,))],
        "torch": [torch.float16, torch.device("cuda:0"), torch.Size([1]), torch.strided, Counter("aab")],
        "tensors": {
            **{
                name: torch.ones(4).to(getattr(torch, name))
                for name in ("bfloat16", "float16", "int8", "bool", "int64")
            },
            "view": torch.arange(24.0).reshape(4, 6).t()[1:, ::2],
            "empty": torch.empty(0, 3),
            "empty of another type": torch.empty(0, dtype=torch.int64),
            "scalar": torch.tensor(2.0),
        },
        "epoch": 3,
        "empty": defaultdict(list),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_checkpoint_with_all_that_training_code_keeps_gives_its_tensors(tmp_path: Path, zipped: bool) -> None:
    everything = training_checkpoint()

    content = read_weight_file(written(tmp_path, saved(everything, zipped=zipped))).content

    assert content["epoch"] == 3
    assert all(torch.equal(content["tensors"][name], value) for name, value in everything["tensors"].items())
    assert all(torch.equal(content["model"][name], value) for name, value in everything["model"].items())
    assert torch.equal(content["parameters"]["0.weight"], everything["parameters"]["0.weight"])


def test_what_was_left_out_is_noted(tmp_path: Path) -> None:
    path = written(tmp_path, saved({"model": WEIGHTS, "args": argparse.Namespace(lr=0.1)}))
    assert read_weight_file(path).notes == ("left out: argparse.Namespace",)


def test_names_of_old_numpy_are_left_out_too(tmp_path: Path) -> None:
    content = saved({"model": WEIGHTS, "best": np.float64(0.5)}, zipped=False)
    path = written(tmp_path, content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_weight_file(path).notes == ("left out: numpy.core.multiarray.scalar, numpy.dtype",)


@pytest.mark.parametrize("package", ["lightning.fabric.utilities.data", "pytorch_lightning.utilities.parsing"])
def test_lightning_hyper_parameters_are_read(tmp_path: Path, package: str) -> None:
    hyper = b"c" + package.encode() + b"\nAttributeDict\n)\x81X\2\0\0\0lrG" + struct.pack(">d", 0.5) + b"s"
    path = written(tmp_path, old_file(b"\x80\2}X\5\0\0\0hyper" + hyper + b"s."))
    assert read_weight_file(path).content == {"hyper": {"lr": 0.5}}


def test_weights_saved_on_a_gpu_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, saved(zipped=False).replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:1"))
    assert read_weight_file(path).content["weight"].device.type == "cpu"


def test_file_of_python_2_is_read(tmp_path: Path) -> None:
    storage = b"(U\7storagectorch\nFloatStorage\nU\0017U\6cuda:0\x8a\1\2NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0(K\2t(K\1t\x89NtR"
    pickled = (
        b"\x80\2ccollections\nOrderedDict\n]](U\6weight"
        + tensor
        + b"ea\x85Rq\1}U\t_metadataccollections\nOrderedDict\n)Rsb."
    )
    path = written(tmp_path, old_file(pickled, b"\x80\2]U\0017a.") + struct.pack("<Q2f", 2, 1.5, 2.5))
    assert read_weight_file(path).content["weight"].tolist() == [1.5, 2.5]


def test_file_written_without_checksums_is_read_and_noted(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = written(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weight_file(path).notes == ("its members carry no checksums",)


@pytest.mark.parametrize("line", ["{}  vit.pth\n", "{}", "# made in May\n{} *vit.pth\n"])
def test_hash_beside_the_file_that_matches_is_noted(tmp_path: Path, line: str) -> None:
    path = written(tmp_path)
    (tmp_path / "vit.pth.sha256").write_text(line.format(hashlib.sha256(saved()).hexdigest().upper()))
    assert read_weight_file(path).notes == ("sha256 matches vit.pth.sha256",)


@pytest.mark.parametrize(("stated", "reason"), [("0" * 64, "is not the file that"), ("none", "no SHA-256 in it")])
def test_hash_beside_the_file_that_differs_is_refused(tmp_path: Path, stated: str, reason: str) -> None:
    path = written(tmp_path)
    (tmp_path / "vit.pth.sha256").write_text(stated)
    with pytest.raises(CheckpointError, match=reason) as refusal:
        read_weight_file(path)
    assert "vit.pth.sha256" in str(refusal.value)


@pytest.mark.parametrize("change", ["grow", "replace"])
def test_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path, other = written(tmp_path), written(tmp_path, name="other.pth")
    unchanged = torch.load

    def load(*arguments: object, **options: object) -> object:
        loaded = unchanged(*arguments, **options)  # type: ignore[arg-type]
        if change == "grow":
            path.write_bytes(saved() + b"\0")
        else:
            other.replace(path)
        return loaded

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        read_weight_file(path)


@pytest.mark.parametrize(
    "error",
    [
        RecursionError("deep"),
        MemoryError(),
        AssertionError(),
        struct.error("short"),
        RuntimeError("\x1b[1mset weights_only=False"),
    ],
)
def test_any_error_of_torch_becomes_a_refusal_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_: object, **__: object) -> object:
        raise error

    path = written(tmp_path)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError) as refusal:
        read_weight_file(path)
    assert not re.search("weights_only|x1b", str(refusal.value))


def test_torch_loads_nothing_but_data_whatever_its_default_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, object] = {}

    def load(*_: object, **options: object) -> object:
        received.update(options)
        return {}

    path = written(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(torch, "load", load)
    read_weight_file(path)
    assert received == {"map_location": "cpu", "weights_only": True, "mmap": False}


def test_missing_file_is_refused_with_where_to_find_the_schemes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such checkpoint file") as refusal:
        read_weight_file(tmp_path / "nowhere.pth")
    assert "msn-eval ls checkpoints" in refusal.value.hint


def test_torch_with_known_holes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CheckpointError, match=r"torch 2\.9\.1") as refusal:
        read_weight_file(path)
    assert "2.10" in refusal.value.hint


@pytest.mark.parametrize(
    ("head", "what", "hint"),
    [
        (b"", "empty", "Fetch the file again"),
        (bytes(512), "zeros", "Fetch the file again"),
        (b"<!DOCTYPE html><html>404", "web page", "Fetch the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git-lfs pointer", "git lfs pull"),
        (b"\x1f\x8b\x08\0", "gzip", "Unpack it"),
        (b"BZh91AY", "bzip2", "Unpack it"),
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
        (b"epoch,loss\n1,0.5\n", "not a checkpoint format that is known (first bytes 65 70 6f 63)", "safetensors"),
    ],
)
def test_what_is_not_a_container_is_named_with_a_hint(head: bytes, what: str, hint: str) -> None:
    verdict = sniff_container(head)
    assert isinstance(verdict, tuple)
    assert (what in verdict[0], hint in verdict[1]) == (True, True)


@given(st.binary(max_size=512))
def test_any_first_bytes_give_a_container_or_a_fault_with_its_hint(head: bytes) -> None:
    verdict = sniff_container(head)
    assert verdict in ("zip", "pickle", "safetensors") or all(verdict)


# Content of what torch loaded.


def refused(loaded: object, file_bytes: int = 100) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        _plain_content(loaded, file_bytes=file_bytes)
    return caught.value


def test_mappings_tensors_and_plain_values_stay() -> None:
    loaded = {"model": OrderedDict(a=torch.ones(2)), "epoch": 3, "loss": 0.5, "done": True, "arch": "vit"}
    found = _plain_content(loaded, file_bytes=100)
    assert found["model"]["a"].tolist() == [1, 1]  # type: ignore[index, union-attr, call-overload]
    assert {name: value for name, value in found.items() if name != "model"} == {
        "epoch": 3,
        "loss": 0.5,
        "done": True,
        "arch": "vit",
    }


@pytest.mark.parametrize(
    "value", [None, [torch.ones(1)], (1,), object(), {1: torch.ones(1)}, b"x", {1, 2}, torch.float32]
)
def test_everything_else_is_left_out(value: object) -> None:
    assert _plain_content({"value": value}, file_bytes=100) in ({}, {"value": {}})


def test_parameter_becomes_its_values() -> None:
    found = _plain_content({"a": torch.nn.Parameter(torch.ones(2))}, file_bytes=100)["a"]
    assert isinstance(found, torch.Tensor)
    assert (type(found), found.requires_grad) == (torch.Tensor, False)


@pytest.mark.parametrize(("loaded", "kind"), [([], "list"), (torch.ones(1), "Tensor"), (3, "int")])
def test_root_that_is_not_a_mapping_is_refused_by_its_kind(loaded: object, kind: str) -> None:
    error = refused(loaded)
    assert (error.what, error.hint) == (f"holds a {kind}, not a state dict", "Save model.state_dict().")


def test_dict_shared_over_and_over_is_refused() -> None:
    loaded: dict[str, object] = {}
    for _ in range(60):
        loaded = {"a": loaded, "b": loaded}
    assert "more than 1,000,000 values" in refused(loaded).what


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(1, 1).expand(1 << 20, 1 << 16), "in fewer bytes"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, device="meta"), "meta"),
        (torch.ones(2).as_subclass(type("Odd", (torch.Tensor,), {})), "Odd"),
    ],
    ids=["expanded", "sparse", "meta", "subclass"],
)
def test_tensor_that_is_not_dense_is_refused(tensor: object, reason: str) -> None:
    assert reason in refused({"layer.weight": tensor}).what


def test_views_that_repeat_their_bytes_too_often_are_refused() -> None:
    base = torch.ones(1 << 20)
    loaded = {str(turn): base[turn:] for turn in range(10)}
    assert "tensors of" in refused(loaded, file_bytes=1 << 22).what


def test_tied_weights_count_once() -> None:
    base = torch.ones(1 << 20)
    assert len(_plain_content({str(turn): base for turn in range(10)}, file_bytes=1 << 22)) == 10
