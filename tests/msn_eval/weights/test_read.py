"""Reading weight files, and refusing those that are damaged, hostile, or something else."""

import argparse
import gzip
import hashlib
import io
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from msn_eval.errors import CheckpointError
from msn_eval.weights.read import read_weight_file

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class Payload:
    """What an attacker would pickle: loading it calls a function with arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def saved(content: object = WEIGHTS, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def real_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return buffer.getvalue()


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "not weights")
    return buffer.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "HTML": (lambda: b"<!DOCTYPE html><title>404</title>", "web page"),
    "git-lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "gzip": (lambda: gzip.compress(saved()), "gzip"),
    "tar": (real_tar, "tar archive"),
    "zeros": (lambda: bytes(4096), "zeros"),
    "truncated zip": (lambda: saved()[:-100], "cannot be read in full"),
    "half a zip": (lambda: saved()[: len(saved()) // 2], "cannot be read in full"),
    "other zip": (plain_zip, "cannot be read in full"),
    "TorchScript": (torchscript, "TorchScript"),
    "truncated old file": (lambda: saved(zipped=False)[:-4], "cannot be read in full"),
    "truncated safetensors": (lambda: safetensors.torch.save(WEIGHTS)[:-4], "cannot be read in full"),
    "safetensors without its end": (lambda: safetensors.torch.save(WEIGHTS)[:20], "cannot be read in full"),
    "pickle of protocol 4": (lambda: pickle.dumps({"epoch": 3}, protocol=4), "more than tensors"),
    "os.system": (lambda: saved(Payload(os.system, "true")), r"posix\.system"),
    "os.system, old file": (lambda: saved(Payload(os.system, "true"), zipped=False), r"posix\.system"),
    "os.system, bare pickle": (lambda: pickle.dumps(Payload(os.system, "true"), protocol=2), r"posix\.system"),
    "exec": (lambda: saved({"weight": Payload(exec, "1")}), "GLOBAL exec"),
    "whole module": (lambda: saved(torch.nn.Linear(2, 2)), r"torch\.nn\.modules\.linear\.Linear"),
    "unfamiliar class": (lambda: saved(WEIGHTS | {"args": argparse.ArgumentParser}), r"argparse\.ArgumentParser"),
}


def refusal(tmp_path: Path, kind: str) -> CheckpointError:
    path = tmp_path / "vitb16.pth"
    path.write_bytes(REFUSED[kind][0]())
    with pytest.raises(CheckpointError) as caught:
        read_weight_file(path)
    return caught.value


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_tensors_and_plain_values_are_read_as_saved(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "vit.pth"
    path.write_bytes(saved({"model": WEIGHTS, "epoch": 3, "loss": 0.5}, zipped=zipped))
    content = read_weight_file(path).content
    assert (content["epoch"], content["loss"], content["model"]["weight"].tolist()) == (3, 0.5, [[0, 1, 2], [3, 4, 5]])


def test_safetensors_are_read_as_saved(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(WEIGHTS, path)
    content = read_weight_file(path).content
    assert all(torch.equal(content[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors", "vit.bin", "vit"])
def test_container_is_told_by_content_and_not_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(safetensors.torch.save(WEIGHTS))
    assert read_weight_file(path).container == "safetensors"


def test_file_named_pth_tar_that_is_no_tar_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth.tar"
    path.write_bytes(saved())
    assert read_weight_file(path).container == "zip"


def test_sha256_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    path.write_bytes(saved())
    assert read_weight_file(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", REFUSED)
def test_unusable_file_is_refused_by_what_it_is(tmp_path: Path, kind: str) -> None:
    assert re.search(REFUSED[kind][1], refusal(tmp_path, kind).what)


@pytest.mark.parametrize("kind", REFUSED)
def test_refusal_names_the_file_and_a_remedy(tmp_path: Path, kind: str) -> None:
    error = refusal(tmp_path, kind)
    assert (error.exit_code, "vitb16.pth" in str(error), len(error.remedy) > 10) == (20, True, True)


@pytest.mark.parametrize("kind", REFUSED)
def test_refusal_passes_on_no_advice_to_trust_the_file(tmp_path: Path, kind: str) -> None:
    text = str(refusal(tmp_path, kind))
    assert not re.search("weights_only|add_safe_globals|safe_globals", text)


@pytest.mark.parametrize("kind", REFUSED)
def test_refusal_has_no_escape_sequences(tmp_path: Path, kind: str) -> None:
    text = str(refusal(tmp_path, kind))
    assert "\x1b" not in text
    assert r"\x1b" not in text


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("function", [os.system, os.popen, exec, eval], ids=["system", "popen", "exec", "eval"])
def test_payload_in_a_file_is_never_run(tmp_path: Path, function: Callable[..., object], zipped: bool) -> None:
    canary = tmp_path / "canary"
    order = f"touch {canary}" if function in (os.system, os.popen) else f"open({str(canary)!r}, 'w')"
    path = tmp_path / "vit.pth"
    path.write_bytes(saved({"weight": Payload(function, order)}, zipped=zipped))
    with pytest.raises(CheckpointError):
        read_weight_file(path)
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_file_cut_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    whole = saved(zipped=zipped)
    path = tmp_path / "vit.pth"
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_weight_file(path)


def test_missing_file_is_refused_with_where_to_find_the_schemes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such checkpoint file") as refusal:
        read_weight_file(tmp_path / "nowhere.pth")
    assert "msn-eval ls checkpoints" in refusal.value.remedy


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder") as refusal:
        read_weight_file(tmp_path)
    assert refusal.value.remedy == "Name the file."


def test_path_that_cannot_be_opened_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "vit.pth").write_bytes(saved())
    with pytest.raises(CheckpointError, match=r"inner\.pth: cannot be read") as refusal:
        read_weight_file(tmp_path / "vit.pth" / "inner.pth")
    assert refusal.value.remedy


def test_torch_with_known_holes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vit.pth"
    path.write_bytes(saved())
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CheckpointError, match=r"torch 2\.9\.1") as refusal:
        read_weight_file(path)
    assert "2.10" in refusal.value.remedy
