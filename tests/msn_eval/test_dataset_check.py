import hashlib
import io
import multiprocessing
import os
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image

from msn_eval import dataset_check
from msn_eval.dataset_check import (
    DatasetCheck,
    ImageFacts,
    ManifestCheck,
    Sized,
    SplitCheck,
    automatic_workers,
    check_dataset,
    check_split,
    compare_manifest,
    look_alikes,
    look_at_image,
    look_at_images,
    read_manifest,
    shared_images,
    write_manifest,
)
from msn_eval.datasets.dataset import DataSet, class_map_sha256
from msn_eval.datasets.digits import read_digits
from msn_eval.datasets.folder import FolderSource, read_folder
from msn_eval.errors import DataError, ResourceError
from msn_eval.file_hashes import content_sha256, hash_images
from msn_eval.images import ImageSet, Stamp, decode_image
from msn_eval.published_lists import Publication


@dataclass(frozen=True)
class MemorySource:
    """Images in memory; None is one that cannot be read."""

    contents: Mapping[str, bytes | None]
    root: None = None

    def read(self, image_id: str) -> bytes:
        content = self.contents[image_id]
        if content is None:
            raise PermissionError(13, "Permission denied")
        return content

    def decode(self, content: bytes) -> Image.Image:
        return decode_image(content)

    def place(self, image_id: str) -> str:
        return f"/data/{image_id}"

    def stamp(self, image_id: str) -> Stamp:
        return (0,)


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (3, 2), **options: object) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind, **options)
    return content.getvalue()


def image_set(contents: Mapping[str, bytes | None], *, passed_over: int = 0) -> ImageSet:
    classes = tuple(sorted({one.partition("/")[0] for one in contents}, key=os.fsencode))
    ids = tuple(sorted(contents, key=os.fsencode))
    labels = tuple(classes.index(one.partition("/")[0]) for one in ids)
    return ImageSet(ids=ids, labels=labels, classes=classes, source=MemorySource(contents), passed_over=passed_over)


def check(contents: Mapping[str, bytes | None]) -> SplitCheck:
    images = image_set(contents)
    return check_split("val", images, look_at_images("val", images))


def facts_of(content: bytes | None) -> ImageFacts:
    return look_at_image(MemorySource({"a/x.png": content}), "a/x.png")


def with_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture("JPEG", exif=exif)


def with_broken_exif() -> bytes:
    """Promise an entry that the block is too short for."""
    return picture("JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00")


# --- one image


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (picture("JPEG"), "JPEG RGB"),
        (picture("JPEG", "L"), "JPEG L"),
        (picture("JPEG", "CMYK"), "JPEG CMYK"),
        (picture("PNG", "RGBA"), "PNG RGBA"),
        (picture("GIF", "P"), "GIF P"),
        (picture("WEBP"), "WEBP RGB"),
        (picture("BMP"), "BMP RGB"),
    ],
)
def test_kind_is_format_and_mode_of_the_bytes(content: bytes, kind: str) -> None:
    assert (facts_of(content).kind, facts_of(content).problem) == (kind, "")


def test_size_is_width_and_height() -> None:
    assert facts_of(picture(size=(7, 5))).size == (7, 5)


def test_digest_is_that_of_the_bytes() -> None:
    assert facts_of(picture()).digest == hashlib.sha256(picture()).digest()


def test_image_that_cannot_be_read_says_why() -> None:
    assert facts_of(None) == ImageFacts(problem="cannot be read: Permission denied")


def test_truncated_image_is_a_problem_with_its_kind_and_digest() -> None:
    content = picture("JPEG", size=(64, 64))[:-20]
    facts = facts_of(content)
    assert (facts.kind, facts.digest) == ("JPEG RGB", hashlib.sha256(content).digest())
    assert "truncated" in facts.problem


def test_file_that_is_no_image_has_no_kind() -> None:
    facts = facts_of(b"<html>")
    assert (facts.kind, facts.size) == ("", None)
    assert "no JPEG, PNG, WEBP, BMP, GIF image" in facts.problem


def test_sixteen_bit_image_is_a_problem() -> None:
    facts = facts_of(picture("PNG", "I;16"))
    assert (facts.kind, "more than 8 bits" in facts.problem) == ("PNG I;16", True)


def test_format_outside_the_rule_is_no_image() -> None:
    assert facts_of(picture("TIFF")).kind == ""


@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_is_read(orientation: int) -> None:
    assert facts_of(with_exif(orientation)).orientation == orientation


def test_damaged_exif_is_told_and_no_problem() -> None:
    facts = facts_of(with_broken_exif())
    assert (facts.damaged_exif, facts.problem) == (True, "")


def test_sound_exif_is_not_damaged() -> None:
    assert not facts_of(with_exif(6)).damaged_exif


def test_parser_that_gives_up_on_exif_is_damaged_exif(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(image: Image.Image) -> NoReturn:
        raise zlib.error("broken stream")

    monkeypatch.setattr(Image.Image, "getexif", give_up)
    facts = facts_of(picture())
    assert (facts.damaged_exif, facts.orientation, facts.problem) == (True, 1, "")


def test_image_far_too_large_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    content = picture(size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in facts_of(content).problem


def test_pixels_without_a_file_are_raw() -> None:
    digits = read_digits().val
    facts = look_at_image(digits.source, digits.ids[0])
    assert (facts.kind, facts.size, facts.problem) == ("raw RGB", (8, 8), "")


# --- one split


def test_images_are_counted_by_class_and_kind() -> None:
    found = check({"a/1.png": picture(), "b/1.png": picture("PNG", "L"), "b/2.png": picture(size=(9, 9))})
    assert (found.images, found.class_sizes) == (3, {"a": 1, "b": 2})
    assert list(found.kinds.items()) == [("PNG RGB", 2), ("PNG L", 1)]


def test_class_of_the_other_split_alone_has_no_images() -> None:
    images = replace(image_set({"a/1.png": picture()}), classes=("a", "z"))
    assert check_split("val", images, look_at_images("val", images)).class_sizes == {"a": 1, "z": 0}


def test_passed_over_files_are_those_of_the_set() -> None:
    images = image_set({"a/1.png": picture()}, passed_over=4)
    assert check_split("val", images, look_at_images("val", images)).passed_over == 4


def test_image_of_no_known_format_is_of_no_kind() -> None:
    assert check({"a/1.png": None, "a/2.png": picture(), "a/3.png": b""}).kinds == {"PNG RGB": 1}


def test_turned_and_damaged_are_counted() -> None:
    contents = {
        "a/1.jpg": with_exif(6),
        "a/2.jpg": with_exif(3),
        "a/3.jpg": with_exif(1),
        "a/4.jpg": with_broken_exif(),
    }
    found = check(contents)
    assert (found.turned, found.damaged_exif) == (2, 1)


def test_smallest_and_largest_go_by_pixels_and_the_first_of_several_is_named() -> None:
    sizes = {"a/1.png": (9, 1), "a/2.png": (4, 4), "a/3.png": (1, 9), "a/4.png": (2, 8)}
    found = check({name: picture(size=size) for name, size in sizes.items()})
    assert (found.smallest, found.largest) == (
        Sized(image="a/1.png", width=9, height=1),
        Sized(image="a/2.png", width=4, height=4),
    )


def test_every_image_that_cannot_be_used_is_listed_with_place_and_reason() -> None:
    found = check({"a/1.png": None, "a/2.png": picture(), "a/3.png": b""})
    assert [(one.image, one.place, one.reason) for one in found.unreadable] == [
        ("a/1.png", "/data/a/1.png", "cannot be read: Permission denied"),
        ("a/3.png", "/data/a/3.png", "the file is empty"),
    ]


def test_duplicates_are_images_with_the_bytes_of_an_earlier_one() -> None:
    same, other = picture(), picture(size=(1, 1))
    assert check({"a/1.png": same, "a/2.png": same, "b/3.png": same, "b/4.png": other}).duplicates == 2


def test_images_that_cannot_be_read_are_no_duplicates() -> None:
    assert check({"a/1.png": None, "a/2.png": None}).duplicates == 0


def test_content_hash_is_that_of_records() -> None:
    images = image_set({"a/1.png": picture(), "b/1.png": b"damaged"})
    expected = content_sha256(images.ids, hash_images(images, memory=None))
    assert check_split("val", images, look_at_images("val", images)).content_sha256 == expected


def test_there_is_no_content_hash_where_an_image_cannot_be_read() -> None:
    assert check({"a/1.png": picture(), "a/2.png": None}).content_sha256 is None


def test_split_without_images_is_no_trouble() -> None:
    found = check({})
    assert (found.images, found.kinds, found.smallest, found.largest, found.unreadable) == (0, {}, None, None, ())


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["a/x.jpg", "a/X.JPG", "a/y.jpg"], (("a/x.jpg", "a/X.JPG"),)),
        (["caf\u00e9/1.jpg", "cafe\u0301/1.jpg"], (("caf\u00e9/1.jpg", "cafe\u0301/1.jpg"),)),
        (["caf\u00c9/1.jpg", "cafe\u0301/1.jpg"], (("caf\u00c9/1.jpg", "cafe\u0301/1.jpg"),)),
        (["a/x.jpg", "b/x.jpg", "caf\udce9/1.jpg"], ()),
    ],
    ids=["case", "normalisation", "both", "none"],
)
def test_names_that_some_disks_hold_for_one_are_grouped(
    names: Sequence[str], groups: tuple[tuple[str, ...], ...]
) -> None:
    assert look_alikes(names) == groups


def test_classes_that_look_alike_are_told_even_where_no_two_images_do() -> None:
    assert check({"Cat/1.png": picture(), "cat/2.png": picture()}).look_alikes == (("Cat", "cat"),)


# --- both splits


def data_set(train: Mapping[str, bytes | None], val: Mapping[str, bytes | None]) -> DataSet:
    return DataSet(name="pets", train=image_set(train), val=image_set(val))


def test_shared_images_are_named_with_the_first_of_training() -> None:
    train = {"a/1": b"x", "a/2": b"y", "b/1": b"y"}
    assert shared_images(train, {"a/7": b"y", "a/8": b"z", "b/9": b"y"}) == (("a/7", "a/2"), ("b/9", "a/2"))


def test_data_set_is_checked_split_by_split() -> None:
    shared = picture(size=(5, 5))
    found = check_dataset(data_set({"a/1.png": picture(), "a/2.png": shared}, {"a/9.png": shared}))
    assert [(one.split, one.images) for one in found.splits] == [("train", 2), ("val", 1)]
    assert (found.shared, found.class_map_sha256) == ((("a/9.png", "a/2.png"),), class_map_sha256(("a",)))


def publish(monkeypatch: pytest.MonkeyPatch, classes: tuple[str, ...]) -> None:
    known = Publication(url="", class_map_sha256=class_map_sha256(classes), val_images=3, lists=())
    monkeypatch.setattr(dataset_check, "read_publication", lambda: known)
    monkeypatch.setattr(dataset_check, "_IMAGENET_TRAIN_IMAGES", 1)


def test_known_data_set_of_other_counts_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, ("a",))
    found = check_dataset(data_set({"a/1.png": picture(), "a/2.png": picture()}, {"a/9.png": picture()}))
    assert found.warnings == (
        "these are ImageNet's classes, but train has 2 images instead of 1",
        "these are ImageNet's classes, but val has 1 images instead of 3",
    )


def test_known_data_set_of_its_counts_and_unknown_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, ("a",))
    contents = {f"a/{number}.png": picture() for number in range(3)}
    assert check_dataset(data_set({"a/1.png": picture()}, contents)).warnings == ()
    publish(monkeypatch, ("b",))
    assert check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": picture()})).warnings == ()


def test_imagenet_has_as_many_training_images_as_published() -> None:
    assert dataset_check._IMAGENET_TRAIN_IMAGES == 1_281_167


@pytest.mark.parametrize(("content", "sound"), [(picture(), True), (b"damaged", False), (None, False)])
def test_data_set_with_an_image_that_cannot_be_used_is_not_sound(content: bytes | None, sound: bool) -> None:
    assert check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": content})).sound == sound


# --- manifests


def checked(train: Mapping[str, bytes | None], val: Mapping[str, bytes | None]) -> DatasetCheck:
    return check_dataset(data_set(train, val))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_manifest_has_a_line_an_image() -> None:
    found = checked({"a/1.png": picture()}, {"a/2.png": b"damaged"})
    expected = f"{digest(picture())}  train/a/1.png\n{digest(b'damaged')}  val/a/2.png\n"
    assert write_manifest(found) == expected.encode()


def test_manifest_is_accepted_by_sha256sum(tmp_path: Path) -> None:
    """With the names that it spells in its own way, and bytes that are no text."""
    for split in ("train", "val"):
        folder = tmp_path / split / "caf\udce9"
        folder.mkdir(parents=True)
        for name in ("a b.png", "back\\slash.png", "line\nend.png", "return\r.png"):
            (folder / name).write_bytes(picture())
    content = write_manifest(check_dataset(read_folder(str(tmp_path))))
    (tmp_path / "SHA256SUMS").write_bytes(content)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr, content.count(b"\n")) == (0, b"", b"", 8)


def test_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    names = ["a/1 2.png", "a/b\\n.png", "a/c\n.png", "a/d\r.png", "a/e\\n\n.png", "a/caf\udce9.png", "a/\\.png"]
    found = checked({name: picture() for name in names}, {"a/1.png": picture()})
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


def test_changed_missing_and_extra_images_are_listed() -> None:
    found = checked({"a/1.png": picture(), "a/2.png": picture()}, {"a/1.png": picture(size=(1, 1))})
    manifest = {
        "train/a/1.png": digest(picture()),
        "train/a/0.png": "0" * 64,
        "val/a/1.png": digest(picture()),
        "val/a/9.png": "9" * 64,
    }
    assert compare_manifest(manifest, found.splits) == ManifestCheck(
        listed=4, changed=("val/a/1.png",), missing=("train/a/0.png", "val/a/9.png"), extra=("train/a/2.png",)
    )


def test_image_that_cannot_be_read_is_neither_missing_nor_changed() -> None:
    found = checked({"a/1.png": picture()}, {"a/1.png": None})
    manifest = {"train/a/1.png": digest(picture()), "val/a/1.png": "0" * 64}
    assert compare_manifest(manifest, found.splits).agrees


@pytest.mark.parametrize("difference", ["changed", "missing", "extra"])
def test_any_difference_from_the_manifest_is_unsound(difference: str) -> None:
    manifest = {"train/a/1.png": digest(picture()), "val/a/1.png": digest(picture())}
    sound = check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": picture()}), manifest=manifest)
    if difference == "changed":
        manifest["val/a/1.png"] = "0" * 64
    elif difference == "missing":
        manifest["val/a/2.png"] = "0" * 64
    else:
        del manifest["val/a/1.png"]
    unsound = check_dataset(data_set({"a/1.png": picture()}, {"a/1.png": picture()}), manifest=manifest)
    assert (sound.sound, unsound.sound) == (True, False)


# --- worker processes


@pytest.fixture
def folder(tmp_path: Path) -> ImageSet:
    for number in range(150):
        path = tmp_path / "data" / "a" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(size=(number + 1, 1)))
    ids = tuple(f"a/{number:03d}.png" for number in range(150))
    return ImageSet(ids=ids, labels=(0,) * 150, classes=("a",), source=FolderSource(tmp_path / "data"))


def no_child() -> bool:
    return not multiprocessing.active_children()


def test_processes_say_the_same_in_the_same_order(folder: ImageSet) -> None:
    assert list(look_at_images("val", folder, workers=2)) == list(look_at_images("val", folder, workers=0))
    assert no_child()


def test_more_tasks_than_are_handed_out_ahead_are_done(folder: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_check, "_IMAGES_A_TASK", 7)
    sizes = [one.size for one in look_at_images("val", folder, workers=1)]
    assert sizes == [(number + 1, 1) for number in range(150)]


@dataclass(frozen=True)
class Deadly(MemorySource):
    """A source whose arrival ends the process."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (7,)


def test_process_that_dies_is_an_error_naming_the_images_at_hand(folder: ImageSet) -> None:
    with pytest.raises(ResourceError) as caught:
        list(look_at_images("val", replace(folder, source=Deadly({})), workers=1))
    assert str(caught.value).startswith(
        "a process that decodes images of val died, at one of these or near them:\n  /data/a/000.png\n"
    )
    assert "and 145 more" in str(caught.value)
    assert no_child()


def test_process_that_hangs_is_given_up(folder: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a pipe that nobody writes to."""
    assert isinstance(folder.source, FolderSource)
    (folder.source.root / "a" / "000.png").unlink()
    os.mkfifo(folder.source.root / "a" / "000.png")
    monkeypatch.setattr(dataset_check, "_TASK_SECONDS", 1.0)
    with pytest.raises(ResourceError, match="hung for 1 s, at one of these or near them"):
        list(look_at_images("val", folder, workers=1))
    assert no_child()


def test_interruption_leaves_no_process_behind(folder: ImageSet) -> None:
    def interrupt(what: str, done: int, total: int) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(look_at_images("val", folder, workers=1, on_progress=interrupt))
    assert no_child()


@pytest.mark.parametrize("workers", [0, 1])
def test_progress_ends_with_all_images(folder: ImageSet, workers: int) -> None:
    told: list[tuple[str, int, int]] = []
    list(look_at_images("val", folder, workers=workers, on_progress=lambda *news: told.append(news)))
    assert (told[-1], told == sorted(told)) == (("val", 150, 150), True)


def test_few_images_start_no_process(folder: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_check, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("a process was started"))
    assert len(list(look_at_images("val", folder))) == 150


def test_many_images_take_a_process_a_core_up_to_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3), raising=False)
    assert (automatic_workers(511), automatic_workers(512)) == (0, 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(99))
    assert automatic_workers(512) == 16
