"""A disk that fails at every possible call: a clear error, the old rows intact, no partial file."""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msn_eval.data.hashing import hash_images
from msn_eval.data.images import ImageSet
from msn_eval.errors import MsnEvalError, StoreError
from msn_eval.features import cache as feature_cache
from msn_eval.features.cache import (
    FeatureFolder,
    FeatureKey,
    open_feature_folder,
    read_rows,
    verify_feature_folder,
    write_shard,
)
from msn_eval.results.folder import list_results
from msn_eval.results.record import Predictions, Result, read_predictions, read_result, write_result

KEY = FeatureKey(
    weights="00" * 32, arch="vit_small_16_224", network=None, code=None, tap="cls", transform={"crop": 224},
    decoder="pillow 12.3", precision="fp32", device="cpu", compiled=False, torch="2.10.0", timm="1.0.20", extractor=1,
)  # fmt: skip
OLD, NEW = ([hashlib.sha256(f"{name} {number}".encode()).hexdigest() for number in range(8)] for name in ("old", "new"))
DISK_CALLS = 1 + 2 * 6  # the folder; for each of two files: open, open again, sync, rename, open the folder, sync it
REFUSALS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


def rows_of(contents: Sequence[str]) -> Tensor:
    return torch.tensor([list(bytes.fromhex(content)) for content in contents]).float()


def keep(folder: FeatureFolder, contents: Sequence[str]) -> None:
    write_shard(folder, contents, contents, rows_of(contents))


@pytest.fixture
def folder(tmp_path: Path) -> FeatureFolder:
    """Return a folder of features with a shard of old rows."""
    folder = open_feature_folder(tmp_path, KEY, checkpoint="vit.pth")
    keep(folder, OLD)
    return folder


class FailingDisk:
    """A disk that fails at the k-th call that writes to it, and counts the calls."""

    def __init__(self, fails_at: int, code: int) -> None:
        self.fails_at, self.code, self.calls = fails_at, code, 0

    @property
    def failed(self) -> bool:
        return self.calls >= self.fails_at

    def instead_of(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fails_at:
                raise OSError(self.code, os.strerror(self.code))
            return call(*arguments, **options)

        return count_and_call


@contextlib.contextmanager
def failing_disk(fails_at: int, code: int) -> Iterator[FailingDisk]:
    """Let the k-th call fail that creates a folder, or opens, syncs or renames a file."""
    disk = FailingDisk(fails_at, code)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "mkdir"), (Path, "open"), (os, "open"), (os, "fsync"), (os, "replace")):
            patch.setattr(owner, name, disk.instead_of(getattr(owner, name)))
        yield disk


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of every file, so that the system refuses in the middle of a write."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unexpected_files(folder: Path) -> list[str]:
    """Return the damaged shards, and files that should not exist."""
    return [
        path.name
        for path in folder.iterdir()
        if not (
            path.suffix == ".json"
            or (path.suffix == ".safetensors" and hashlib.sha256(path.read_bytes()).hexdigest()[:32] == path.stem)
        )
    ]


def is_clear(error: MsnEvalError, folder: Path) -> bool:
    """Whether the error names the path, the needed bytes and the free bytes."""
    lines = re.compile(r"could not (write|keep) [\d,]+ bytes.*: [A-Z].*\n.*[\d,]+ bytes are free at /")
    return error.exit_code == 22 and str(error).startswith(str(folder)) and lines.search(str(error)) is not None


def check_feature_folder_after(folder: FeatureFolder, caught: MsnEvalError | None) -> None:
    """Check what must hold whether or not the new rows were written."""
    assert caught is None or is_clear(caught, folder.path), str(caught)
    assert unexpected_files(folder.path) == []
    assert verify_feature_folder(folder)[1] == 0
    values, found = read_rows(folder, OLD + NEW)
    assert values is not None
    assert torch.equal(values[:8], rows_of(OLD))
    assert found[:8] == [True] * 8
    assert found[8:] in ([False] * 8, [True] * 8)
    assert not found[8] or torch.equal(values[8:], rows_of(NEW))


def attempt(write: Callable[[], object]) -> MsnEvalError | None:
    """Write, and return the error of a disk that failed; any other error is a bug."""
    try:
        write()
    except StoreError as error:
        return error
    return None


@pytest.mark.parametrize("code", REFUSALS, ids=errno.errorcode.get)
def test_rows_survive_a_disk_that_fails_at_any_call(folder: FeatureFolder, code: int) -> None:
    for fails_at in range(1, 100):
        with failing_disk(fails_at, code) as disk:
            caught = attempt(lambda: keep(folder, NEW))
        check_feature_folder_after(folder, caught)
        assert caught is not None or read_rows(folder, NEW)[1] == [True] * 8
        if not disk.failed:
            break
    assert fails_at > DISK_CALLS


@pytest.mark.parametrize("code", REFUSALS, ids=errno.errorcode.get)
def test_feature_folder_is_opened_or_refused_by_a_disk_that_fails_at_any_call(tmp_path: Path, code: int) -> None:
    for fails_at in range(1, 100):
        key = replace(KEY, extractor=fails_at)
        with failing_disk(fails_at, code) as disk:
            caught = attempt(lambda key=key: open_feature_folder(tmp_path, key, checkpoint="vit.pth"))  # type: ignore[misc]
        assert caught is None or "another --cache folder" in str(caught) or is_clear(caught, tmp_path)
        assert [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"] == []
        if not disk.failed:
            break
    assert 5 < fails_at < 20


def test_rows_survive_a_disk_that_is_full_after_any_number_of_bytes(folder: FeatureFolder) -> None:
    largest = max(path.stat().st_size for path in folder.path.iterdir())
    caught = []
    for size in range(0, largest + 40, 20):
        with largest_file(size):
            caught.append(attempt(lambda: keep(folder, NEW)))
        check_feature_folder_after(folder, caught[-1])
    assert (caught[0] is None, caught[-1] is None) == (False, True)
    assert "File too large" in str(caught[0])


def write_half(path: Path, content: bytes) -> None:
    """Write directly to the final name, which is wrong."""
    try:
        with path.open("wb") as file:
            file.write(content)
    except OSError as error:
        raise StoreError(f"could not write {len(content)} bytes: {error.strerror}", where=str(path)) from error


def test_half_written_shard_is_detected(folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "write_atomically", write_half)
    with largest_file(100):
        attempt(lambda: keep(folder, NEW))
    assert len(unexpected_files(folder.path)) == 1


# Results, and cached hashes of images.


@pytest.fixture
def measured(digits_runs: Path) -> tuple[Result, Predictions]:
    """Return a result with its predictions."""
    result = next(result for result in list_results([digits_runs]) if result.predictions is not None)
    return result, read_predictions(digits_runs / str(result.predictions))


def test_result_is_complete_or_absent_on_a_disk_that_fails_at_any_call(
    tmp_path: Path, measured: tuple[Result, Predictions]
) -> None:
    result, predictions = measured
    older = replace(result, id="0" * 16, predictions=f"{'0' * 16}.npz")
    write_result(tmp_path, older, None)
    for fails_at in range(1, 100):
        for path in tmp_path.glob(f"{result.id}*"):
            path.unlink()
        with failing_disk(fails_at, errno.ENOSPC) as disk:
            caught = attempt(lambda: write_result(tmp_path, result, predictions))
        assert caught is None or is_clear(caught, tmp_path)
        assert (caught is None) == (not disk.failed)
        assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".npz"}
        assert read_result(tmp_path / f"{older.id}.json") == older
        if (tmp_path / f"{result.id}.json").exists():
            assert read_result(tmp_path / f"{result.id}.json") == result
            assert np.array_equal(read_predictions(tmp_path / str(result.predictions)).image, predictions.image)
        if not disk.failed:
            break
    assert fails_at > 10
    assert len(list_results([tmp_path])) == 2


def test_result_is_complete_or_absent_on_a_disk_that_is_full_after_any_number_of_bytes(
    tmp_path: Path, measured: tuple[Result, Predictions]
) -> None:
    result, predictions = measured
    outcomes = set()
    for size in (0, 1, 100, 1_000, 2_000, 3_000, 5_000, 10_000, 1_000_000):
        with largest_file(size):
            caught = attempt(lambda: write_result(tmp_path, result, predictions))
        outcomes.add(caught is None)
        record = tmp_path / f"{result.id}.json"
        assert caught is None or (is_clear(caught, tmp_path) and not record.exists())
        assert caught is not None or read_result(record) == result
        for path in tmp_path.glob("*.npz"):
            assert np.array_equal(read_predictions(path).label, predictions.label)
    assert outcomes == {False, True}


class Pictures:
    """Two images that are files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, image_id: str) -> bytes:
        return image_id.encode()

    def place(self, image_id: str) -> str:
        return str(self.root / image_id)

    def stamp(self, image_id: str) -> tuple[int, ...]:
        return (1, 2)


def test_cached_hashes_are_complete_or_unchanged_on_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msn_eval.data.hashing._SETTLED_NS", 0)

    def images(*ids: str) -> ImageSet:
        source: Any = Pictures(tmp_path)
        return ImageSet(ids=ids, labels=(0,) * len(ids), classes=("any",), source=source)

    hash_images(images("a"), cache_dir=tmp_path)
    before = everything_in(tmp_path)
    for size in range(0, 400, 20):
        with largest_file(size):
            hash_images(images("a", "b"), cache_dir=tmp_path)  # an error is not raised: the cache only saves time
        if everything_in(tmp_path) != before:
            break
    assert 100 < size < 380
