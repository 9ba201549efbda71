"""One split: counts over its images."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from PIL import Image

from msn_eval.data.hashing import content_sha256, hash_images
from msn_eval.data.image_info import look_at_images
from msn_eval.data.images import ImageSet
from msn_eval.data.split_check import Sized, SplitCheck, check_split, look_alikes

ImageSetMaker = Callable[..., ImageSet]
Check = Callable[[Mapping[str, bytes | None]], SplitCheck]


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (3, 2), **options: object) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind, **options)
    return content.getvalue()


def with_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture("JPEG", exif=exif)


def with_broken_exif() -> bytes:
    """Promise an entry that the block is too short for."""
    return picture("JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00")


@pytest.fixture
def check(memory_images: ImageSetMaker) -> Check:
    def look(contents: Mapping[str, bytes | None]) -> SplitCheck:
        images = memory_images(contents)
        return check_split("val", images, look_at_images("val", images))

    return look


def test_images_are_counted_by_class_and_kind(check: Check) -> None:
    found = check({"a/1.png": picture(), "b/1.png": picture("PNG", "L"), "b/2.png": picture(size=(9, 9))})
    assert (found.images, found.class_sizes) == (3, {"a": 1, "b": 2})
    assert list(found.kinds.items()) == [("PNG RGB", 2), ("PNG L", 1)]


def test_class_of_the_other_split_alone_has_no_images(memory_images: ImageSetMaker) -> None:
    images = replace(memory_images({"a/1.png": picture()}), classes=("a", "z"))
    assert check_split("val", images, look_at_images("val", images)).class_sizes == {"a": 1, "z": 0}


def test_passed_over_files_are_those_of_the_set(memory_images: ImageSetMaker) -> None:
    images = memory_images({"a/1.png": picture()}, passed_over=4)
    assert check_split("val", images, look_at_images("val", images)).passed_over == 4


def test_image_of_no_known_format_is_of_no_kind(check: Check) -> None:
    assert check({"a/1.png": None, "a/2.png": picture(), "a/3.png": b""}).kinds == {"PNG RGB": 1}


def test_turned_and_damaged_are_counted(check: Check) -> None:
    contents = {
        "a/1.jpg": with_exif(6),
        "a/2.jpg": with_exif(3),
        "a/3.jpg": with_exif(1),
        "a/4.jpg": with_broken_exif(),
    }
    found = check(contents)
    assert (found.turned, found.damaged_exif) == (2, 1)


def test_smallest_and_largest_go_by_pixels_and_the_first_of_several_is_named(check: Check) -> None:
    sizes = {"a/1.png": (9, 1), "a/2.png": (4, 4), "a/3.png": (1, 9), "a/4.png": (2, 8)}
    found = check({name: picture(size=size) for name, size in sizes.items()})
    assert (found.smallest, found.largest) == (
        Sized(image="a/1.png", width=9, height=1),
        Sized(image="a/2.png", width=4, height=4),
    )


def test_every_image_that_cannot_be_used_is_listed_with_place_and_reason(check: Check) -> None:
    found = check({"a/1.png": None, "a/2.png": picture(), "a/3.png": b""})
    assert [(one.image, one.place, one.reason) for one in found.unreadable] == [
        ("a/1.png", "/data/a/1.png", "cannot be read: Permission denied"),
        ("a/3.png", "/data/a/3.png", "the file is empty"),
    ]


def test_duplicates_are_images_with_the_bytes_of_an_earlier_one(check: Check) -> None:
    same, other = picture(), picture(size=(1, 1))
    assert check({"a/1.png": same, "a/2.png": same, "b/3.png": same, "b/4.png": other}).duplicates == 2


def test_images_that_cannot_be_read_are_no_duplicates(check: Check) -> None:
    assert check({"a/1.png": None, "a/2.png": None}).duplicates == 0


def test_content_hash_is_that_of_records(memory_images: ImageSetMaker) -> None:
    images = memory_images({"a/1.png": picture(), "b/1.png": b"damaged"})
    expected = content_sha256(images.ids, hash_images(images, memory=None))
    assert check_split("val", images, look_at_images("val", images)).content_sha256 == expected


def test_there_is_no_content_hash_where_an_image_cannot_be_read(check: Check) -> None:
    assert check({"a/1.png": picture(), "a/2.png": None}).content_sha256 is None


def test_split_without_images_is_no_trouble(check: Check) -> None:
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


def test_classes_that_look_alike_are_told_even_where_no_two_images_do(check: Check) -> None:
    assert check({"Cat/1.png": picture(), "cat/2.png": picture()}).look_alikes == (("Cat", "cat"),)
