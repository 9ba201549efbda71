"""ImageSet: named, labelled images and how their bytes become the pixels that the protocols define."""

import errno
import io
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from msn_eval.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
# Parsers for these formats only: the rest of Pillow's (EPS, FITS, PSD, ...) is not for strangers' files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_READ_DELAYS_SECONDS = (0.2, 1.0, 5.0)  # a network disk that stalls deserves some patience
_PASSING = frozenset({errno.EIO, errno.ESTALE})
# Pillow would clip these to 8 bits in silence: 16-bit images turn white, float images black.
_REFUSED_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
# Resizing the shorter side would make the longer one hundreds of megabytes long. A rule of the image alone, so that every
# network skips the same ones.
_LONGEST_ASPECT = 500


class BadImageError(Exception):
    """Why one image cannot be used; collected over a whole pass and reported together."""


# The image's bytes; nanoseconds since 1970 of the last change of its file's content, and of anything about the file, which
# nobody can set back; the file's inode; and the image's place in the file if it shares it.
Stamp = tuple[int, ...]


def file_stamp(status: os.stat_result) -> Stamp:
    """Give the stamp of an image with a file of its own."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class ImageSource(Protocol):
    """Where the images of a set are kept. Picklable: loader workers carry it."""

    @property
    def root(self) -> Path | None:
        """Give the folder or archive that holds the images, or None where they are embedded in a package."""
        ...

    def read(self, image_id: str) -> bytes:
        """Give the bytes of one image, those that content hashes cover."""
        ...

    def decode(self, content: bytes) -> Image.Image:
        """Turn those bytes into an RGB image; raises BadImageError."""
        ...

    def place(self, image_id: str) -> str:
        """Say where one image stands: its file, or its archive and its name there."""
        ...

    def stamp(self, image_id: str) -> Stamp:
        """Give what changes when one image's bytes do, without reading them; raises OSError."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one split, in the byte order of their ids.

    ids:         `CLASS/FILE`, unique
    labels:      indices into `classes`, one an image
    classes:     names in byte order, those of the whole data set
    passed_over: dotfiles and files of other suffixes that were not taken for images
    """

    ids: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    source: ImageSource
    passed_over: int = 0

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.ids):
            raise DataError(f"{len(self.ids)} images but {len(self.labels)} labels")
        if len(set(self.ids)) != len(self.ids):
            raise DataError("an image id stands twice")
        if self.labels and not (min(self.labels) >= 0 and max(self.labels) < len(self.classes)):
            raise DataError(f"a label is outside 0 to {len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def position(self) -> dict[str, int]:
        """Give the row of each id."""
        return {image_id: row for row, image_id in enumerate(self.ids)}

    @cached_property
    def ids_by_class(self) -> tuple[tuple[str, ...], ...]:
        """Give the ids of each class, in order."""
        grouped: list[list[str]] = [[] for _ in self.classes]
        for image_id, label in zip(self.ids, self.labels, strict=True):
            grouped[label].append(image_id)
        return tuple(tuple(group) for group in grouped)

    @cached_property
    def ids_by_file(self) -> dict[str, tuple[str, ...]]:
        """Give the ids that end in each file name; one, where names are unique over classes as ImageNet's are."""
        grouped: dict[str, tuple[str, ...]] = {}
        for image_id in self.ids:
            file = image_id.rpartition("/")[2]
            grouped[file] = (*grouped.get(file, ()), image_id)
        return grouped

    def only(self, image_ids: Sequence[str]) -> "ImageSet":
        """Give the named images, in the order of this set. Raises DataError for a name it does not have."""
        try:
            rows = sorted(self.position[image_id] for image_id in image_ids)
        except KeyError as missing:
            raise DataError(f"no image {missing.args[0]!r} in this data set") from missing
        return replace(self, ids=tuple(self.ids[row] for row in rows), labels=tuple(self.labels[row] for row in rows))

    def first_of_each_class(self, count: int) -> "ImageSet":
        """Give at most `count` images a class, the first by order."""
        return self.only([image_id for group in self.ids_by_class for image_id in group[:count]])


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """RGB; shorter side to `resize` (bilinear, antialiased); centre crop; then [0, 1], mean and std on the device.

    resize, crop: pixels
    mean, std:    a value a channel, on the [0, 1] scale
    """

    resize: int
    crop: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"


def eval_transform(
    image_pixels: int,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> EvalTransform:
    """Give the transform rule for a network of native size `image_pixels`: resize to S * 256/224, crop S."""
    return EvalTransform(resize=round(image_pixels * 256 / 224), crop=image_pixels, mean=mean, std=std)


def read_image(source: ImageSource, image_id: str) -> bytes:
    """Read an image's bytes, with some patience for a network disk that stalls. Raises OSError."""
    for delay in _READ_DELAYS_SECONDS:
        try:
            return source.read(image_id)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(delay)
    return source.read(image_id)


def is_image_name(name: str) -> bool:
    """Tell by its name whether a file is taken for an image."""
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def decode_image(content: bytes) -> Image.Image:
    """Decode an image file to RGB by Pillow. EXIF orientation is ignored, as the published protocols do.

    Grey, palette, CMYK and images with alpha go by Pillow's `convert("RGB")` (alpha is dropped); of an animation the
    first frame is taken; 16-bit colour gives its high bytes. Raises BadImageError for damaged, truncated and over-large
    images, and for 16-bit or 32-bit grey, which Pillow would clip.
    """
    with _faults_named(content):
        image = _opened(content)
        image.load()
        # A conversion from RGB to RGB is a copy, a twentieth of the whole work on a photograph.
        return image if image.mode == "RGB" else image.convert("RGB")


def read_header(content: bytes) -> ImageFile.ImageFile:
    """Give an image whose pixels are not decoded yet. Raises BadImageError for all that `decode_image` refuses by the
    header: other formats, more than 8 bits of grey, over-large and over-long images."""
    with _faults_named(content):
        return _opened(content)


@dataclass
class _SettledWarnings:
    """Python's warnings as decoding wants them, for as long as some thread decodes: the filters are one for all threads."""

    threads: int = 0
    filters: "warnings.catch_warnings[None] | None" = None
    lock: "threading.Lock" = field(default_factory=threading.Lock)

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            self.threads += 1
            if self.threads == 1:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                # Damaged EXIF blocks are common in ImageNet and do not touch the pixels.
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        finally:
            with self.lock:
                self.threads -= 1
                if self.threads == 0 and self.filters is not None:
                    self.filters.__exit__(None, None, None)


_warnings_settled = _SettledWarnings()


@contextmanager
def _faults_named(content: bytes) -> Iterator[None]:
    """Turn what Pillow raises over a file into BadImageError."""
    try:
        with _warnings_settled.held():
            yield
    except UnidentifiedImageError:
        raise BadImageError(_unknown_format(content)) from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadImageError(str(error) or type(error).__name__) from error
    except Image.DecompressionBombWarning as error:
        raise BadImageError(str(error)) from error


def _opened(content: bytes) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.mode in _REFUSED_MODES:
        raise BadImageError(f"mode {image.mode} has more than 8 bits a channel; convert it to 8-bit RGB")
    if max(image.size) > _LONGEST_ASPECT * min(image.size):
        raise BadImageError(f"{image.size[0]} x {image.size[1]} pixels: longer than {_LONGEST_ASPECT} : 1")
    return image


def _unknown_format(content: bytes) -> str:
    if not content:
        return "the file is empty"
    if content.startswith(b"\x1f\x8b"):
        return "a gzip file under an image name; unpack it"
    if content.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; run git lfs pull"
    return f"no {', '.join(FORMATS)} image (first bytes {content[:4].hex(' ')})"


def resize_and_crop(image: Image.Image, transform: EvalTransform) -> NDArray[np.uint8]:
    """Give the (crop, crop, 3) uint8 pixels of Pillow's bilinear resize and centre crop."""
    # Resizing the box under the crop alone, or one direction after the other, is faster but not the same: Pillow rounds
    # boxes to float32, and chooses by the shape which direction comes first.
    size = resized_size(*image.size, transform)
    left, top = crop_corner(*size, transform)
    resized = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + transform.crop, top + transform.crop)))


def resized_size(width: int, height: int, transform: EvalTransform) -> tuple[int, int]:
    """Give the width and height to resize to: the shorter side as the transform says, the longer one rounded down as
    torchvision's Resize does."""
    long_side = int(transform.resize * max(width, height) / min(width, height))
    return (transform.resize, long_side) if width <= height else (long_side, transform.resize)


def crop_corner(width: int, height: int, transform: EvalTransform) -> tuple[int, int]:
    """Give the left and top of the centre crop, halves rounded to even as torchvision's CenterCrop does."""
    return round((width - transform.crop) / 2), round((height - transform.crop) / 2)
