"""A data set: both splits, what they share, and its manifest."""

import hashlib
import io
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from msn_eval.data import read_dataset, validation
from msn_eval.data.dataset import DataSet, class_map_sha256
from msn_eval.data.image_info import ImageInfo, inspect_images
from msn_eval.data.imagenet_subsets import Publication
from msn_eval.data.images import ImageSet
from msn_eval.data.validation import (
    ImageSize,
    SplitCheck,
    check_dataset,
    check_split,
    compare_manifest,
    read_manifest,
    write_manifest,
)
from msn_eval.errors import DataError

ImageSetMaker = Callable[..., ImageSet]
DataSetMaker = Callable[..., DataSet]


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (3, 2), **options: object) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind, **options)
    return content.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def data_set(memory_images: ImageSetMaker) -> DataSetMaker:
    def make(train: Mapping[str, bytes | None], val: Mapping[str, bytes | None]) -> DataSet:
        return DataSet(name="pets", train=memory_images(train), val=memory_images(val))

    return make


def test_shared_images_are_named_with_the_first_of_training(data_set: DataSetMaker) -> None:
    first, second, third = (picture(size=(1, side)) for side in (1, 2, 3))
    data = data_set(
        {"a/1.png": first, "a/2.png": second, "b/1.png": second},
        {"a/7.png": second, "a/8.png": third, "b/9.png": second},
    )
    assert check_dataset(data).shared == (("a/7.png", "a/2.png"), ("b/9.png", "a/2.png"))


def publish(monkeypatch: pytest.MonkeyPatch, classes: tuple[str, ...]) -> None:
    known = Publication(url="", class_map_sha256=class_map_sha256(classes), val_images=3, lists=())
    monkeypatch.setattr(validation, "read_publication", lambda: known)
    monkeypatch.setattr(validation, "_IMAGENET_TRAIN_IMAGES", 1)


def test_known_data_set_of_other_counts_is_warned_of(data_set: DataSetMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, ("a",))
    result = check_dataset(data_set({"a/1.png": picture(), "a/2.png": picture()}, {"a/9.png": picture()}))
    assert result.warnings == (
        "these are ImageNet's classes, but train has 2 images instead of 1",
        "these are ImageNet's classes, but val has 1 image instead of 3",
    )


def test_known_data_set_of_its_counts_and_unknown_ones_are_not(
    data_set: DataSetMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, ("a",))
    contents = {f"a/{number}.png": picture() for number in range(3)}
    assert check_dataset(data_set({"a/1.png": picture()}, contents)).warnings == ()
    publish(monkeypatch, ("b",))
    assert check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": picture()})).warnings == ()


Check = Callable[[Mapping[str, bytes | None]], SplitCheck]


@pytest.fixture
def check(memory_images: ImageSetMaker) -> Check:
    def check_contents(contents: Mapping[str, bytes | None]) -> SplitCheck:
        images = memory_images(contents)
        return check_split(images, inspect_images("val", images))

    return check_contents


def test_images_are_counted_by_class_and_kind(check: Check) -> None:
    result = check(
        {
            "a/1.png": picture(),
            "b/1.png": picture("PNG", "L"),
            "b/2.png": picture(size=(9, 9)),
        }
    )
    assert (result.images, result.class_sizes) == (3, {"a": 1, "b": 2})
    assert list(result.kinds.items()) == [("PNG RGB", 2), ("PNG L", 1)]


def test_every_image_that_cannot_be_used_is_listed_with_place_and_reason(check: Check) -> None:
    result = check({"a/1.png": None, "a/2.png": picture(), "a/3.png": b""})
    assert result.unreadable == (
        {"image": "a/1.png", "place": "/data/a/1.png", "reason": "cannot be read: Permission denied"},
        {"image": "a/3.png", "place": "/data/a/3.png", "reason": "the file is empty"},
    )


def test_duplicates_are_images_with_the_bytes_of_an_earlier_one(check: Check) -> None:
    same, other = picture(), picture(size=(1, 1))
    assert check({"a/1.png": same, "a/2.png": same, "b/3.png": same, "b/4.png": other}).duplicates == 2


def test_there_is_no_content_hash_where_an_image_cannot_be_read(check: Check) -> None:
    assert check({"a/1.png": picture(), "a/2.png": None}).content_sha256 is None


def test_split_without_images_is_valid(check: Check) -> None:
    result = check({})
    assert (result.images, result.kinds, result.smallest, result.largest, result.unreadable) == (0, {}, None, None, ())


SplitsOf = Callable[..., Mapping[str, SplitCheck]]


@pytest.fixture
def splits_of(memory_images: ImageSetMaker) -> SplitsOf:
    def check_contents(train: Mapping[str, bytes | None], val: Mapping[str, bytes | None]) -> Mapping[str, SplitCheck]:
        named = {"train": memory_images(train), "val": memory_images(val)}
        return {name: check_split(images, inspect_images(name, images)) for name, images in named.items()}

    return check_contents


def test_manifest_is_accepted_by_sha256sum(tmp_path: Path) -> None:
    """Also with spaces and bytes that are not text."""
    for split in ("train", "val"):
        folder = tmp_path / split / "caf\udce9"
        folder.mkdir(parents=True)
        for name in ("a b.png", "c.png"):
            (folder / name).write_bytes(picture())
    content = write_manifest(check_dataset(read_dataset(str(tmp_path))).splits)
    (tmp_path / "SHA256SUMS").write_bytes(content)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr, content.count(b"\n")) == (0, b"", b"", 4)


def test_manifest_is_read_back_as_it_was_written(splits_of: SplitsOf, tmp_path: Path) -> None:
    names = ["a/1 2.png", "a/caf\udce9.png"]
    result = splits_of({name: picture() for name in names}, {"a/1.png": picture()})
    (tmp_path / "m").write_bytes(write_manifest(result))
    assert read_manifest(tmp_path / "m") == {
        **{f"train/{name}": digest(picture()) for name in names},
        "val/a/1.png": digest(picture()),
    }


@pytest.mark.parametrize(
    "line",
    [b"%s  val/a/1.png\n", b"%s *val/a/1.png", b"%s  ./val/a/1.png\r\n", b"\xef\xbb\xbf%s  val/a/1.png\n\n"],
    ids=["text", "binary", "names from find, CRLF", "BOM, empty line"],
)
def test_lines_of_other_tools_are_read(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "m").write_bytes(line % (b"AB" * 32))
    assert read_manifest(tmp_path / "m") == {"val/a/1.png": "ab" * 32}


@pytest.mark.parametrize("line", [b"val/a/1.png", b"ab" * 31 + b"  val/x", b"ab" * 32 + b"  ", b"ab" * 32 + b"\tval/x"])
def test_line_that_is_none_of_a_manifest_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "m").write_bytes(b"ab" * 32 + b"  val/a/1.png\n" + line + b"\n")
    with pytest.raises(DataError, match=f"{tmp_path / 'm'}: line 2 is not a SHA-256 with a name: "):
        read_manifest(tmp_path / "m")


def test_name_that_is_repeated_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes((b"ab" * 32 + b"  val/a/1.png\n") * 2)
    with pytest.raises(DataError, match=r"line 2 names val/a/1\.png again"):
        read_manifest(tmp_path / "m")


def test_changed_missing_and_extra_images_are_listed(splits_of: SplitsOf) -> None:
    result = splits_of({"a/1.png": picture(), "a/2.png": picture()}, {"a/1.png": picture(size=(1, 1))})
    manifest = {
        "train/a/1.png": digest(picture()),
        "train/a/0.png": "0" * 64,
        "val/a/1.png": digest(picture()),
        "val/a/9.png": "9" * 64,
    }
    assert compare_manifest(manifest, result) == {
        "changed": ("val/a/1.png",),
        "missing": ("train/a/0.png", "val/a/9.png"),
        "extra": ("train/a/2.png",),
    }


def test_image_that_cannot_be_read_is_neither_missing_nor_changed(splits_of: SplitsOf) -> None:
    result = splits_of({"a/1.png": picture()}, {"a/1.png": None})
    manifest = {"train/a/1.png": digest(picture()), "val/a/1.png": "0" * 64}
    assert compare_manifest(manifest, result) == {"changed": (), "missing": (), "extra": ()}


def test_exif_faults_are_counted(memory_images: ImageSetMaker) -> None:
    infos = [ImageInfo(orientation=6), ImageInfo(orientation=3), ImageInfo(), ImageInfo(damaged_exif=True)]
    check = check_split(memory_images({f"a/{number}.jpg": b"" for number in range(4)}), infos)
    assert (check.turned, check.damaged_exif) == (2, 1)


def test_smallest_and_largest_are_the_first_by_number_of_pixels(memory_images: ImageSetMaker) -> None:
    infos = [ImageInfo(size=size) for size in ((9, 1), (4, 4), (1, 9), (2, 8))]
    check = check_split(memory_images({f"a/{number}.png": b"" for number in range(4)}), infos)
    assert (check.smallest, check.largest) == (ImageSize("a/0.png", 9, 1), ImageSize("a/1.png", 4, 4))
