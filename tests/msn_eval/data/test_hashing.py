import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from msn_eval.data import hashing as file_hashes
from msn_eval.data import read_dataset
from msn_eval.data.folder import FolderSource
from msn_eval.data.hashing import content_sha256, hash_images, make_unreadable_error
from msn_eval.data.images import ImageSet
from msn_eval.errors import DataError

Hashes = dict[str, list[Any]]


@dataclass(frozen=True)
class CountingSource:
    """Files under a root that remember being read."""

    root: Path
    reads: list[str] = field(default_factory=list)

    def read(self, image_id: str) -> bytes:
        self.reads.append(image_id)
        return self.path(image_id).read_bytes()

    def decode(self, content: bytes) -> Image.Image:
        raise AssertionError("hashing decodes nothing")

    def path(self, image_id: str) -> Path:
        return self.root / image_id

    def place(self, image_id: str) -> str:
        return str(self.path(image_id))

    def stamp(self, image_id: str) -> tuple[int, ...]:
        status = self.path(image_id).stat()
        return status.st_size, status.st_mtime_ns


CONTENTS = {"a/x.jpg": b"first", "a/y.jpg": b"second", "b/x.jpg": b""}


@pytest.fixture(autouse=True)
def settled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust the clock of this disk to its last tick, so that a test need not wait for it."""
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 0)


@pytest.fixture
def source(tmp_path: Path) -> CountingSource:
    for image_id, content in CONTENTS.items():
        path = tmp_path / "train" / image_id
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return CountingSource(tmp_path / "train")


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def images_of(source: CountingSource, ids: tuple[str, ...] = tuple(CONTENTS)) -> ImageSet:
    return ImageSet(ids=ids, labels=(0,) * len(ids), classes=("any",), source=source)


def digests() -> dict[str, str]:
    return {image_id: hashlib.sha256(content).hexdigest() for image_id, content in CONTENTS.items()}


def memory_file(cache_dir: Path) -> Path:
    (path,) = (cache_dir / "hashes").iterdir()
    return path


def test_every_image_is_hashed_by_its_bytes(source: CountingSource) -> None:
    assert list(hash_images(images_of(source), cache_dir=None).items()) == list(digests().items())


def test_cached_images_are_not_read_again(source: CountingSource, cache_dir: Path) -> None:
    hash_images(images_of(source), cache_dir=cache_dir)
    source.reads.clear()
    assert (hash_images(images_of(source), cache_dir=cache_dir), source.reads) == (digests(), [])


def test_image_of_another_time_is_read_again(source: CountingSource, cache_dir: Path) -> None:
    hash_images(images_of(source), cache_dir=cache_dir)
    path = source.path("a/y.jpg")
    before = path.stat()
    path.write_bytes(b"SECOND")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    source.reads.clear()
    again = hash_images(images_of(source), cache_dir=cache_dir)
    assert (again["a/y.jpg"], source.reads) == (hashlib.sha256(b"SECOND").hexdigest(), ["a/y.jpg"])


def test_part_of_the_images_does_not_make_the_rest_forgotten(source: CountingSource, cache_dir: Path) -> None:
    hash_images(images_of(source, ("a/x.jpg", "b/x.jpg")), cache_dir=cache_dir)
    hash_images(images_of(source, ("a/y.jpg",)), cache_dir=cache_dir)
    source.reads.clear()
    assert (hash_images(images_of(source), cache_dir=cache_dir), source.reads) == (digests(), [])


def test_same_name_under_another_root_is_another_image(source: CountingSource, cache_dir: Path, tmp_path: Path) -> None:
    """Even where size and time agree, as after a copy of the folder that was then edited."""
    hash_images(images_of(source), cache_dir=cache_dir)
    stamp = source.path("a/x.jpg").stat()
    other = tmp_path / "val" / "a" / "x.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"FIRST")
    os.utime(other, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    hashes = hash_images(images_of(CountingSource(tmp_path / "val"), ("a/x.jpg",)), cache_dir=cache_dir)
    assert hashes == {"a/x.jpg": hashlib.sha256(b"FIRST").hexdigest()}


def test_names_that_are_not_utf8_are_cached(source: CountingSource, cache_dir: Path) -> None:
    image_id = "a/\udcff.jpg"
    source.path(image_id).write_bytes(b"odd")
    hash_images(images_of(source, (image_id,)), cache_dir=cache_dir)
    source.reads.clear()
    hashes = hash_images(images_of(source, (image_id,)), cache_dir=cache_dir)
    assert (hashes[image_id], source.reads) == (hashlib.sha256(b"odd").hexdigest(), [])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"root":"/a","hashes":{', b"[]", b"null", b'{"seal":"0"}'])
def test_damaged_cache_is_made_again_with_a_warning(
    source: CountingSource, cache_dir: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    hash_images(images_of(source), cache_dir=cache_dir)
    whole = memory_file(cache_dir).read_bytes()
    memory_file(cache_dir).write_bytes(content)

    assert hash_images(images_of(source), cache_dir=cache_dir) == digests()
    assert memory_file(cache_dir).read_bytes() == whole
    assert "its seal does not match: it was edited or damaged; the images are hashed again" in caplog.text


def _rotate(hashes: Hashes) -> None:
    rotated = [digest for _, digest in hashes.values()]
    for entry, digest in zip(hashes.values(), [*rotated[1:], rotated[0]], strict=True):
        entry[1] = digest


def _swap_stamps(hashes: Hashes) -> None:
    first, second, _ = hashes.values()
    first[0], second[0] = second[0], first[0]


_EDITS: dict[str, Callable[[Hashes], object]] = {
    "rotated digests": _rotate,
    "swapped stamps": _swap_stamps,
    "one digit": lambda hashes: hashes["a/x.jpg"].__setitem__(1, "0" + hashes["a/x.jpg"][1][1:]),
    "lost image": lambda hashes: hashes.pop("a/x.jpg"),
}


@pytest.mark.parametrize("edit", _EDITS)
def test_edited_cache_is_not_believed(source: CountingSource, cache_dir: Path, edit: str) -> None:
    hash_images(images_of(source), cache_dir=cache_dir)
    content = json.loads(memory_file(cache_dir).read_bytes())
    _EDITS[edit](content["hashes"])
    memory_file(cache_dir).write_text(json.dumps(content, sort_keys=True, separators=(",", ":")))
    source.reads.clear()

    assert hash_images(images_of(source), cache_dir=cache_dir) == digests()
    assert sorted(source.reads) == sorted(CONTENTS)


def test_cache_of_another_folder_is_not_believed(source: CountingSource, cache_dir: Path, tmp_path: Path) -> None:
    hash_images(images_of(source), cache_dir=cache_dir)
    mine = memory_file(cache_dir)
    shutil.copytree(source.root, tmp_path / "other")  # copies times too
    for path in (tmp_path / "other").rglob("*.jpg"):
        path.write_bytes(path.read_bytes().upper())
        os.utime(path, ns=(0, (source.root / path.relative_to(tmp_path / "other")).stat().st_mtime_ns))
    other = CountingSource(tmp_path / "other")
    hash_images(images_of(other), cache_dir=cache_dir)
    (theirs,) = set((cache_dir / "hashes").iterdir()) - {mine}
    shutil.copy(theirs, mine)

    assert hash_images(images_of(source), cache_dir=cache_dir) == digests()


def test_every_unreadable_file_is_listed(source: CountingSource, cache_dir: Path) -> None:
    source.path("a/gone.jpg").symlink_to("nowhere")
    source.path("b/folder.jpg").mkdir()
    with pytest.raises(DataError) as caught:
        hash_images(images_of(source, (*CONTENTS, "a/gone.jpg", "b/folder.jpg")), cache_dir=cache_dir)
    assert caught.value.exit_code == 21
    assert str(caught.value).splitlines()[:3] == [
        "2 images cannot be used:",
        f"  {source.path('a/gone.jpg')}: No such file or directory",
        f"  {source.path('b/folder.jpg')}: Is a directory",
    ]


def test_bad_images_are_counted_and_listed_in_order_with_a_hint() -> None:
    message = str(make_unreadable_error(["b", "c", "a"]))
    assert message.startswith("3 images cannot be used:\n  a\n  b\n  c\n")
    assert "--on-bad-image skip" in message


def test_content_hash_covers_a_line_of_id_and_hash_for_each_image() -> None:
    lines = b"a/x.jpg\t" + b"0" * 64 + b"\nb/\xff.jpg\t" + b"1" * 64 + b"\n"
    hashes = {"a/x.jpg": "0" * 64, "b/\udcff.jpg": "1" * 64, "c/other.jpg": "2" * 64}
    assert content_sha256(["a/x.jpg", "b/\udcff.jpg"], hashes) == hashlib.sha256(lines).hexdigest()


def test_cache_that_cannot_be_written_costs_only_time(
    source: CountingSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    images = ImageSet(ids=tuple(CONTENTS), labels=(0, 0, 1), classes=("a", "b"), source=source)
    assert len(hash_images(images, cache_dir=tmp_path / "file")) == 3
    assert "not cached" in caplog.text


def test_file_that_changed_a_moment_ago_is_not_cached(
    source: CountingSource, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 10**9 * 3600)
    hash_images(images_of(source), cache_dir=cache_dir)
    source.reads.clear()
    hash_images(images_of(source), cache_dir=cache_dir)
    assert sorted(source.reads) == sorted(CONTENTS)


def test_replaced_image_of_the_same_size_and_time_is_read_again(tmp_path: Path, cache_dir: Path) -> None:
    root = tmp_path / "val"
    (root / "a").mkdir(parents=True)
    (root / "a" / "x.jpg").write_bytes(b"one")
    images = ImageSet(ids=("a/x.jpg",), labels=(0,), classes=("a",), source=FolderSource(root))
    before = (root / "a" / "x.jpg").stat()
    hash_images(images, cache_dir=cache_dir)
    (root / "a" / "x.jpg").write_bytes(b"two")
    os.utime(root / "a" / "x.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_images(images, cache_dir=cache_dir)["a/x.jpg"] == hashlib.sha256(b"two").hexdigest()


def test_embedded_images_are_not_cached(cache_dir: Path) -> None:
    digits = read_dataset("digits").val
    assert list(hash_images(digits, cache_dir=cache_dir)) == list(digits.ids)
    assert not cache_dir.exists()
