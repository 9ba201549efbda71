"""One image, and many of them in worker processes."""

import hashlib
import io
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image

from msn_eval.data import image_info, read_dataset
from msn_eval.data.folder import FolderSource
from msn_eval.data.image_info import ImageInfo, inspect_image, inspect_images
from msn_eval.data.images import ImageSet
from msn_eval.errors import ResourceError

ImageSetMaker = Callable[..., ImageSet]
Inspect = Callable[[bytes | None], ImageInfo]


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (3, 2), **options: object) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def inspect(memory_images: ImageSetMaker) -> Inspect:
    def inspect_content(content: bytes | None) -> ImageInfo:
        return inspect_image(memory_images({"a/x.png": content}).source, "a/x.png")

    return inspect_content


def with_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture("JPEG", exif=exif)


def with_broken_exif() -> bytes:
    """Return a JPEG whose EXIF block is too short for its entries."""
    return picture("JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00")


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
def test_kind_is_format_and_mode_of_the_bytes(inspect: Inspect, content: bytes, kind: str) -> None:
    assert (inspect(content).kind, inspect(content).problem) == (kind, "")


def test_image_that_cannot_be_read_says_why(inspect: Inspect) -> None:
    assert inspect(None) == ImageInfo(problem="cannot be read: Permission denied")


def test_truncated_image_is_a_problem_with_its_kind_and_hash(inspect: Inspect) -> None:
    content = picture("JPEG", size=(64, 64))[:-20]
    info = inspect(content)
    assert (info.kind, info.sha256) == ("JPEG RGB", hashlib.sha256(content).hexdigest())
    assert "truncated" in info.problem


def test_file_that_is_not_an_image_has_no_kind(inspect: Inspect) -> None:
    info = inspect(b"<html>")
    assert (info.kind, info.size) == ("", None)
    assert "JPEG, PNG, WEBP, BMP, GIF" in info.problem


@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_is_read(inspect: Inspect, orientation: int) -> None:
    assert inspect(with_exif(orientation)).orientation == orientation


def test_damaged_exif_is_reported_and_not_a_problem(inspect: Inspect) -> None:
    info = inspect(with_broken_exif())
    assert (info.damaged_exif, info.problem) == (True, "")


def test_parser_that_gives_up_on_exif_is_damaged_exif(inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(image: Image.Image) -> NoReturn:
        raise zlib.error("broken stream")

    monkeypatch.setattr(Image.Image, "getexif", give_up)
    info = inspect(picture())
    assert (info.damaged_exif, info.orientation, info.problem) == (True, 1, "")


def test_pixels_without_a_file_are_raw() -> None:
    digits = read_dataset("digits").val
    info = inspect_image(digits.source, digits.ids[0])
    assert (info.kind, info.size, info.problem) == ("raw RGB", (8, 8), "")


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
    assert list(inspect_images("val", folder, workers=2)) == list(inspect_images("val", folder, workers=0))
    assert no_child()


@dataclass(frozen=True)
class Deadly(FolderSource):
    """A source whose arrival ends the process."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (7,)


@dataclass(frozen=True)
class Sleeping(FolderSource):
    """A source whose arrival keeps the process waiting, as a network disk may."""

    def __reduce__(self) -> tuple[object, ...]:
        return time.sleep, (60,)


def test_process_that_dies_is_an_error_naming_the_images_at_hand(folder: ImageSet) -> None:
    with pytest.raises(ResourceError) as caught:
        list(inspect_images("val", replace(folder, source=Deadly(Path("/data"))), workers=1))
    assert str(caught.value).startswith(
        "a process that decodes images of val died, at one of these or near them:\n  /data/a/000.png\n"
    )
    assert "and 59 more" in str(caught.value)
    assert no_child()


def test_process_that_hangs_is_given_up(folder: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_info, "_TASK_SECONDS", 1.0)
    with pytest.raises(ResourceError, match="hung for 1 s, at one of these or near them"):
        list(inspect_images("val", replace(folder, source=Sleeping(Path("/data"))), workers=1))
    assert no_child()


def test_interruption_leaves_no_process_behind(folder: ImageSet) -> None:
    def interrupt(what: str, done: int, total: int) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(inspect_images("val", folder, workers=1, on_progress=interrupt))
    assert no_child()


@pytest.mark.parametrize("workers", [0, 1])
def test_progress_ends_with_all_images(folder: ImageSet, workers: int) -> None:
    reports: list[tuple[str, int, int]] = []
    list(inspect_images("val", folder, workers=workers, on_progress=lambda *report: reports.append(report)))
    assert (reports[-1], reports == sorted(reports)) == (("val", 150, 150), True)


@pytest.mark.parametrize(("images", "cores", "workers"), [(511, 3, 0), (512, 3, 3), (512, 99, 16)])
def test_workers_follow_images_and_cores(
    memory_images: ImageSetMaker, monkeypatch: pytest.MonkeyPatch, images: int, cores: int, workers: int
) -> None:
    started: list[int] = []

    def inspect(split: str, images: ImageSet, workers: int) -> Iterator[ImageInfo]:
        started.append(workers)
        yield from ()

    monkeypatch.setattr(image_info, "usable_cores", lambda: cores)
    monkeypatch.setattr(image_info, "_inspect_in_processes", inspect)
    list(inspect_images("val", memory_images({f"a/{number}.png": b"" for number in range(images)})))
    assert started == ([workers] if workers else [])
