"""ImageSet: named, labelled images, and how their bytes become the pixels that the protocols define."""

import errno
import io
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from msn_eval.errors import DataError, ResourceError
from msn_eval.process import describe_exhausted_resource

NO_CLASSES = ("",)  # of images without labels, whose ids are paths
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Those of torchvision's ImageFolder, and GIF.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
# Only these formats: Pillow's other parsers (EPS, FITS, PSD, ...) are not safe for untrusted files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_READ_DELAYS_SECONDS = (0.2, 1.0, 5.0)  # between attempts on a network disk that stalls
_TRANSIENT = frozenset({errno.EIO, errno.ESTALE})
_TIFF_BITS = 258  # the tag with the bits of each channel
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# Pillow would clip these to 8 bits silently: 16-bit images turn white, float images black.
_REFUSED_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
# Resizing the shorter side of a longer image would need hundreds of megabytes. The rule depends on the image alone, so that
# every network skips the same ones.
_LONGEST_ASPECT = 500


@contextmanager
def reading(path: Path, hint: str = "Check its permissions and its disk.") -> Iterator[None]:
    """Raise OSError as DataError that names the file or folder at `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path), hint=hint) from error


class BadImageError(Exception):
    """Why one image cannot be used; collected over a pass and reported together."""


class BadImagesError(DataError):
    """Images that cannot be used.

    Attributes:
        failures: Where each of them is, and why.
    """

    def __init__(self, failures: Sequence[str]) -> None:
        self.failures = tuple(sorted(failures))
        listed = "\n".join(f"  {failure}" for failure in self.failures)
        super().__init__(
            f"{len(failures)} image{'s' if len(failures) > 1 else ''} cannot be used:\n{listed}",
            hint="Repair or remove them, or pass --on-bad-image skip to evaluate without them (they are counted).",
        )


# The image's size in bytes; nanoseconds since 1970 of the last change of its file's content, and of anything about the file,
# which cannot be set back; the file's inode; and the image's offset in a file that it shares.
Stamp = tuple[int, ...]


def file_stamp(status: os.stat_result) -> Stamp:
    """Return the stamp of an image with a file of its own."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class ImageSource(Protocol):
    """Where the images of a set are stored. It must be picklable, since loader workers receive it."""

    @property
    def root(self) -> Path | None:
        """The folder or archive that holds the images, None where they are embedded in a package. Names caches."""
        ...

    def read(self, image_id: str) -> bytes:
        """Return the bytes of one image, which content hashes cover. Raises OSError."""
        ...

    def decode(self, content: bytes) -> Image.Image:
        """Decode these bytes to an RGB image. Raises BadImageError."""
        ...

    def place(self, image_id: str) -> str:
        """Return where one image is, for errors: its file, or its archive and its name there."""
        ...

    def stamp(self, image_id: str) -> Stamp:
        """Return numbers that change when the image's bytes do, without reading them. Raises OSError."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one split, in the byte order of their ids.

    Attributes:
        ids: `CLASS/FILE`, or `CLASS/SUB/FILE` of an image in a folder below that of its class; unique.
        labels: For each image an index into `classes`.
        classes: Names in byte order, those of the complete data set.
        source: Reads and decodes the images.
        passed_over: Number of files that were not taken for images (dotfiles, other suffixes).
    """

    ids: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    source: ImageSource
    passed_over: int = 0

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            image_id = next(first for first, second in pairwise(self.ids) if first == second)
            raise DataError(
                f"two images have the id {image_id}",
                where=self.source.place(image_id),
                hint="Remove or rename one of them: an id is a class and the name of a file in it.",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, object]:
        """Return the fields without cached properties, ids as one string: ranks and workers receive a million of them."""
        state: dict[str, object] = {field.name: getattr(self, field.name) for field in fields(self)}
        return state | {"ids": "\0".join(self.ids), "labels": np.array(self.labels, dtype=np.int64)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ids = tuple(state["ids"].split("\0")) if len(state["labels"]) else ()
        self.__dict__.update(state, ids=ids, labels=tuple(state["labels"].tolist()))

    @property
    def is_labelled(self) -> bool:
        """Whether the images have classes."""
        return self.classes != NO_CLASSES

    @cached_property
    def position(self) -> dict[str, int]:
        """The row of each id."""
        return {image_id: row for row, image_id in enumerate(self.ids)}

    @cached_property
    def ids_by_class(self) -> tuple[tuple[str, ...], ...]:
        """The ids of each class, in order."""
        grouped: list[list[str]] = [[] for _ in self.classes]
        for image_id, label in zip(self.ids, self.labels, strict=True):
            grouped[label].append(image_id)
        return tuple(tuple(group) for group in grouped)

    @cached_property
    def ids_by_file(self) -> dict[str, tuple[str, ...]]:
        """The ids with each file name; one, where names are unique over classes as ImageNet's are."""
        grouped: dict[str, tuple[str, ...]] = {}
        for image_id in self.ids:
            file = image_id.rpartition("/")[2]
            grouped[file] = (*grouped.get(file, ()), image_id)
        return grouped

    def only(self, image_ids: Sequence[str]) -> "ImageSet":
        """Return the named images, in the order of this set."""
        rows = sorted(self.position[image_id] for image_id in image_ids)
        return replace(self, ids=tuple(self.ids[row] for row in rows), labels=tuple(self.labels[row] for row in rows))

    def first_of_each_class(self, count: int) -> "ImageSet":
        """Return at most `count` images per class, the first by order."""
        return self.only([image_id for group in self.ids_by_class for image_id in group[:count]])


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """RGB; shorter side to `resize` (bilinear, antialiased); centre crop; then [0, 1], mean and std on the device.

    Attributes:
        resize: Pixels of the shorter side.
        crop: Pixels of the square crop.
        mean: One value per channel, on the [0, 1] scale.
        std: One value per channel, on the [0, 1] scale.
        interpolation: Of the resize.
        positions: How the network's position embeddings are interpolated for `crop`, None where they are used as they are.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"
    positions: str | None = None


def make_eval_transform(
    image_pixels: int,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> EvalTransform:
    """Return the transform rule for a network of native size S = `image_pixels`: resize to S * 256/224, crop S."""
    return EvalTransform(resize=round(image_pixels * 256 / 224), crop=image_pixels, mean=mean, std=std)


def read_image(source: ImageSource, image_id: str) -> bytes:
    """Read an image's bytes, with retries for a network disk that stalls.

    Raises:
        OSError: The image cannot be read.
        ResourceError: Memory or open files ran out, which is no fault of the image.
    """
    delays = iter(_READ_DELAYS_SECONDS)
    while True:
        try:
            return source.read(image_id)
        except (OSError, MemoryError) as error:
            if (exhausted := make_resource_error(error, source.place(image_id))) is not None:
                raise exhausted from error
            delay = next(delays, None)
            if delay is None or not isinstance(error, OSError) or error.errno not in _TRANSIENT:
                raise
        time.sleep(delay)


def make_resource_error(error: BaseException, place: str) -> ResourceError | None:
    """Return the error to report where an image could not be used because a resource ran out, None for other reasons."""
    exhausted = describe_exhausted_resource(error)
    if exhausted is None:
        return None
    resource, hint = exhausted
    return ResourceError(f"out of {resource}: {error or type(error).__name__}", where=place, hint=hint)


def is_image_name(name: str) -> bool:
    """Whether a file of this name, or of this path below its class, is taken for an image: dotfiles are not."""
    return "/." not in f"/{name}" and Path(name).suffix.lower() in SUFFIXES


def name_in_class(path: str, class_name: str) -> str:
    """Return the path below the folder of an image's class; the file name where no folder has the name of the class."""
    if "/" not in path:
        return path
    *folders, file = path.split("/")
    start = folders.index(class_name) + 1 if class_name in folders else len(folders)
    return "/".join([*(name for name in folders[start:] if name not in ("", ".", "..")), file])


def decode_image(content: bytes) -> Image.Image:
    """Decode an image file to RGB by Pillow. EXIF orientation is ignored, as the published protocols do.

    Grey, palette, CMYK and images with alpha are converted by Pillow's `convert("RGB")` (alpha is dropped). Of an
    animation the first frame is used; of 16-bit colour in PNG and PPM the high bytes.

    Raises:
        BadImageError: The image is damaged, truncated or over-large; has 16-bit or 32-bit grey, which Pillow would clip; or is
            a TIFF of more than 8 bits per channel or of several pages.
    """
    with _translate_errors(content):
        image = _open_image(content)
        image.load()
        # Converting RGB to RGB is a copy, a twentieth of all work on a photograph.
        return image if image.mode == "RGB" else image.convert("RGB")


def read_header(content: bytes) -> ImageFile.ImageFile:
    """Return an image whose pixels are not decoded yet.

    Raises:
        BadImageError: `decode_image` refuses it by the header: other formats, more than 8 bits of grey, over-large and
            over-long images.
    """
    with _translate_errors(content):
        return _open_image(content)


class _DecodingWarnings:
    """Warning filters for decoding, in place while any thread decodes: Python has one list of filters for all threads."""

    def __init__(self) -> None:
        self.threads = 0
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.threads += 1
            if self.threads == 1:
                self.saved = warnings.catch_warnings()
                self.saved.__enter__()
                # Damaged EXIF blocks are common in ImageNet and do not affect the pixels.
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads == 0:
                self.saved.__exit__(None, None, None)


_decoding_warnings = _DecodingWarnings()


@contextmanager
def _translate_errors(content: bytes) -> Iterator[None]:
    """Raise what Pillow raises on a file as BadImageError."""
    try:
        with _decoding_warnings:
            yield
    except UnidentifiedImageError:
        raise BadImageError(_describe_unknown_format(content)) from None
    except (OSError, SyntaxError, ValueError, EOFError, *_BOMBS) as error:
        raise BadImageError(str(error) or type(error).__name__) from error


def _open_image(content: bytes) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.mode in _REFUSED_MODES:
        raise BadImageError(f"mode {image.mode} has more than 8 bits per channel; convert it to 8-bit RGB")
    if isinstance(image, TiffImageFile):
        _check_tiff(image)
    if max(image.size) > _LONGEST_ASPECT * min(image.size):
        raise BadImageError(f"{image.size[0]} x {image.size[1]} pixels: longer than {_LONGEST_ASPECT} : 1")
    return image


def _check_tiff(image: TiffImageFile) -> None:
    """Refuse what scientific TIFFs hold: 12 bits in 16, of which Pillow would take the high bytes; several pages."""
    bits = max(image.tag_v2.get(_TIFF_BITS, (1,)))
    if bits > 8:
        raise BadImageError(f"a TIFF of {bits} bits per channel; convert it to 8-bit RGB")
    if image.n_frames > 1:
        raise BadImageError(f"a TIFF of {image.n_frames} pages; save the one to use in a file of its own")


def _describe_unknown_format(content: bytes) -> str:
    if not content:
        return "the file is empty"
    if content.startswith(b"\x1f\x8b"):
        return "a gzip file under an image name; unpack it"
    if content.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; run git lfs pull"
    return f"not an image in the formats {', '.join(FORMATS)} (first bytes {content[:4].hex(' ')})"


def resize_and_crop(image: Image.Image, transform: EvalTransform) -> NDArray[np.uint8]:
    """Return the (crop, crop, 3) uint8 pixels of Pillow's bilinear resize and centre crop."""
    # Resizing only the box under the crop, or one direction after the other, is faster but gives different pixels: Pillow
    # rounds boxes to float32, and chooses by the shape which direction comes first.
    size = compute_resized_size(*image.size, transform)
    left, top = compute_crop_corner(*size, transform)
    resized = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + transform.crop, top + transform.crop)))


def compute_resized_size(width: int, height: int, transform: EvalTransform) -> tuple[int, int]:
    """Return the width and height to resize to. The longer side is rounded down, as in torchvision's Resize."""
    long_side = int(transform.resize * max(width, height) / min(width, height))
    return (transform.resize, long_side) if width <= height else (long_side, transform.resize)


def compute_crop_corner(width: int, height: int, transform: EvalTransform) -> tuple[int, int]:
    """Return the left and top of the centre crop, halves rounded to even, as in torchvision's CenterCrop."""
    return round((width - transform.crop) / 2), round((height - transform.crop) / 2)
