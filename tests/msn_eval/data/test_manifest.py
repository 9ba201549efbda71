"""Manifests: written for sha256sum, read from it, and compared with."""

import hashlib
import io
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from msn_eval.data.folder import read_folder
from msn_eval.data.image_info import look_at_images
from msn_eval.data.images import ImageSet
from msn_eval.data.manifest import ManifestCheck, compare_manifest, read_manifest, write_manifest
from msn_eval.data.split_check import SplitCheck, check_split
from msn_eval.data.validation import check_dataset
from msn_eval.errors import DataError

ImageSetMaker = Callable[..., ImageSet]
SplitsOf = Callable[..., list[SplitCheck]]


def picture(size: tuple[int, int] = (3, 2)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size).save(content, "PNG")
    return content.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def splits_of(memory_images: ImageSetMaker) -> SplitsOf:
    def look(train: Mapping[str, bytes | None], val: Mapping[str, bytes | None]) -> list[SplitCheck]:
        named = (("train", memory_images(train)), ("val", memory_images(val)))
        return [check_split(name, images, look_at_images(name, images)) for name, images in named]

    return look


def test_manifest_has_a_line_an_image(splits_of: SplitsOf) -> None:
    found = splits_of({"a/1.png": picture()}, {"a/2.png": b"damaged"})
    expected = f"{digest(picture())}  train/a/1.png\n{digest(b'damaged')}  val/a/2.png\n"
    assert write_manifest(found) == expected.encode()


def test_manifest_is_accepted_by_sha256sum(tmp_path: Path) -> None:
    """With the names that it spells in its own way, and bytes that are no text."""
    for split in ("train", "val"):
        folder = tmp_path / split / "caf\udce9"
        folder.mkdir(parents=True)
        for name in ("a b.png", "back\\slash.png", "line\nend.png", "return\r.png"):
            (folder / name).write_bytes(picture())
    content = write_manifest(check_dataset(read_folder(str(tmp_path))).splits)
    (tmp_path / "SHA256SUMS").write_bytes(content)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr, content.count(b"\n")) == (0, b"", b"", 8)


def test_manifest_is_read_back_as_it_was_written(splits_of: SplitsOf, tmp_path: Path) -> None:
    names = ["a/1 2.png", "a/b\\n.png", "a/c\n.png", "a/d\r.png", "a/e\\n\n.png", "a/caf\udce9.png", "a/\\.png"]
    found = splits_of({name: picture() for name in names}, {"a/1.png": picture()})
    (tmp_path / "m").write_bytes(write_manifest(found))
    assert read_manifest(tmp_path / "m") == {
        **{f"train/{name}": digest(picture()) for name in names},
        "val/a/1.png": digest(picture()),
    }


@pytest.mark.parametrize(
    "line",
    [b"%s  val/a/1.png\n", b"%s *val/a/1.png", b"%s  ./val/a/1.png\r\n", b"\xef\xbb\xbf%s  val/a/1.png\n\n"],
    ids=["text", "binary", "found by find, CRLF", "BOM, empty line"],
)
def test_lines_of_other_tools_are_read(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "m").write_bytes(line % (b"AB" * 32))
    assert read_manifest(tmp_path / "m") == {"val/a/1.png": "ab" * 32}


@pytest.mark.parametrize("line", [b"val/a/1.png", b"ab" * 31 + b"  val/x", b"ab" * 32 + b"  ", b"ab" * 32 + b"\tval/x"])
def test_line_that_is_none_of_a_manifest_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "m").write_bytes(b"ab" * 32 + b"  val/a/1.png\n" + line + b"\n")
    with pytest.raises(DataError, match=f"{tmp_path / 'm'}: line 2 is no SHA-256 with a name: "):
        read_manifest(tmp_path / "m")


def test_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes((b"ab" * 32 + b"  val/a/1.png\n") * 2)
    with pytest.raises(DataError, match=r"line 2 names val/a/1\.png again"):
        read_manifest(tmp_path / "m")


def test_missing_manifest_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_manifest(tmp_path / "m")


def test_changed_missing_and_extra_images_are_listed(splits_of: SplitsOf) -> None:
    found = splits_of({"a/1.png": picture(), "a/2.png": picture()}, {"a/1.png": picture(size=(1, 1))})
    manifest = {
        "train/a/1.png": digest(picture()),
        "train/a/0.png": "0" * 64,
        "val/a/1.png": digest(picture()),
        "val/a/9.png": "9" * 64,
    }
    assert compare_manifest(manifest, found) == ManifestCheck(
        listed=4, changed=("val/a/1.png",), missing=("train/a/0.png", "val/a/9.png"), extra=("train/a/2.png",)
    )


def test_image_that_cannot_be_read_is_neither_missing_nor_changed(splits_of: SplitsOf) -> None:
    found = splits_of({"a/1.png": picture()}, {"a/1.png": None})
    manifest = {"train/a/1.png": digest(picture()), "val/a/1.png": "0" * 64}
    assert compare_manifest(manifest, found).agrees
