"""DatasetCheck: the result of reading and decoding every image of a data set. Needs no torch."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from msn_eval.data.dataset import DataSet, class_map_sha256, find_look_alikes
from msn_eval.data.hashing import content_sha256
from msn_eval.data.image_info import ImageInfo, Progress, inspect_images
from msn_eval.data.imagenet_subsets import read_publication
from msn_eval.data.images import ImageSet, reading
from msn_eval.errors import DataError
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file

_IMAGENET_TRAIN_IMAGES = 1_281_167


@dataclass(frozen=True, slots=True)
class ImageSize:
    """An image and its size in pixels."""

    image: str
    width: int
    height: int

    def pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class UnreadableImage:
    """An image that cannot be used, where it is, and why."""

    image: str
    place: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """Result for one split.

    Attributes:
        images: Number of images.
        class_sizes: Images per class, in the order of the class map; 0 for a class that only the other split has.
        passed_over: Files that were not taken for images.
        kinds: Number of images per format and mode, the most frequent first.
        turned: Images whose EXIF orientation is not 1, which the evaluation ignores.
        damaged_exif: Images whose EXIF block cannot be read in full.
        smallest: The image with the fewest pixels, and `largest` the one with the most; the first of several.
        unreadable: Images that cannot be used.
        duplicates: Images whose bytes an earlier image of the split has.
        look_alikes: Ids that differ only by case or by Unicode normalisation.
        content_sha256: As in records; None where an image could not be read.
        digests: SHA-256 of each image that could be read.
    """

    images: int
    class_sizes: Mapping[str, int]
    passed_over: int
    kinds: Mapping[str, int]
    turned: int
    damaged_exif: int
    smallest: ImageSize | None
    largest: ImageSize | None
    unreadable: tuple[UnreadableImage, ...]
    duplicates: int
    look_alikes: tuple[tuple[str, ...], ...]
    content_sha256: str | None
    digests: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class ManifestCheck:
    """How a data set differs from a manifest, by `split/CLASS/FILE`. Unreadable images are reported elsewhere."""

    listed: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetCheck:
    """Result for a data set.

    Attributes:
        name: Of the data set.
        splits: The check of `train` and of `val`.
        shared: Each validation image whose bytes a training image has too, with the first such image.
        class_map_sha256: Hash of the class map.
        warnings: How the counts differ from those of the known data set that has these classes.
        manifest: The differences from a manifest, None without one.
    """

    name: str
    splits: Mapping[str, SplitCheck]
    shared: tuple[tuple[str, str], ...]
    class_map_sha256: str
    warnings: tuple[str, ...]
    manifest: ManifestCheck | None = None

    @property
    def unreadable(self) -> int:
        """Number of images that cannot be used."""
        return sum(len(split.unreadable) for split in self.splits.values())

    @property
    def matches_manifest(self) -> bool:
        differences = self.manifest and (self.manifest.changed or self.manifest.missing or self.manifest.extra)
        return not differences


def check_dataset(
    data: DataSet,
    *,
    workers: int | None = None,
    manifest: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> DatasetCheck:
    """Read and decode every image of both splits.

    Args:
        data: The data set.
        workers: Processes; 0 decodes in this one, None uses as many as there are cores.
        manifest: Expected SHA-256 of each `split/CLASS/FILE`.
        on_progress: Called with the split, the images done and the images in all.

    Raises:
        ResourceError: A process died or hangs.
    """
    splits = {
        split: check_split(images, inspect_images(split, images, workers=workers, on_progress=on_progress))
        for split, images in (("train", data.train), ("val", data.val))
    }
    val = splits["val"].digests
    val_digests = set(val.values())
    first: dict[bytes, str] = {}
    for image_id, digest in splits["train"].digests.items():
        if digest in val_digests:
            first.setdefault(digest, image_id)
    return DatasetCheck(
        name=data.name,
        splits=splits,
        shared=tuple((image_id, first[digest]) for image_id, digest in val.items() if digest in first),
        class_map_sha256=class_map_sha256(data.classes),
        warnings=tuple(_count_warnings(data)),
        manifest=None if manifest is None else compare_manifest(manifest, splits),
    )


def check_split(images: ImageSet, infos: Iterable[ImageInfo]) -> SplitCheck:
    """Summarise what is known of each image, in the order of the set."""
    by_id = dict(zip(images.ids, infos, strict=True))
    sizes = [ImageSize(image, *info.size) for image, info in by_id.items() if info.size is not None]
    problems = [(image, info.problem) for image, info in by_id.items() if info.problem]
    digests = {image: info.digest for image, info in by_id.items() if info.digest is not None}
    hashes = {image: digest.hex() for image, digest in digests.items()}
    kinds = Counter(info.kind for info in by_id.values() if info.kind)
    class_sizes = Counter(images.labels)
    return SplitCheck(
        images=len(images),
        class_sizes={name: class_sizes[label] for label, name in enumerate(images.classes)},
        passed_over=images.passed_over,
        kinds=dict(sorted(kinds.items(), key=lambda entry: (-entry[1], entry[0]))),
        turned=sum(info.orientation != 1 for info in by_id.values()),
        damaged_exif=sum(info.damaged_exif for info in by_id.values()),
        smallest=min(sizes, key=ImageSize.pixels, default=None),
        largest=max(sizes, key=ImageSize.pixels, default=None),
        unreadable=tuple(UnreadableImage(image, images.source.place(image), reason) for image, reason in problems),
        duplicates=len(digests) - len(set(digests.values())),
        look_alikes=find_look_alikes(images.ids),
        content_sha256=content_sha256(images.ids, hashes) if len(hashes) == len(images) else None,
        digests=digests,
    )


def _count_warnings(data: DataSet) -> Iterator[str]:
    publication = read_publication()
    counts = {"train": (len(data.train), _IMAGENET_TRAIN_IMAGES), "val": (len(data.val), publication.val_images)}
    if class_map_sha256(data.classes) == publication.class_map_sha256:
        for split, (count, expected) in counts.items():
            if count != expected:
                yield f"these are ImageNet's classes, but {split} has {count:,} images instead of {expected:,}"


_MANIFEST_LINE = re.compile(rb"([0-9a-fA-F]{64}) [ *](.+)")


def write_manifest(splits: Mapping[str, SplitCheck]) -> bytes:
    """Return the manifest of a data set: one line `HASH  split/CLASS/FILE` per image, as sha256sum writes it."""
    return b"".join(os.fsencode(f"{digest}  {name}\n") for name, digest in _hash_by_name(splits).items())


def read_manifest(path: Path) -> dict[str, str]:
    """Read the SHA-256 of each `split/CLASS/FILE` from a file that sha256sum or `write_manifest` wrote.

    Raises:
        DataError: The file cannot be read, has a line of another form, or names an image twice.
    """
    with reading(path, hint="Give --manifest a file of SHA-256 lines."):
        content = read_regular_file(path, most_bytes=MOST_TEXT_BYTES)
    manifest: dict[str, str] = {}
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = raw.removesuffix(b"\r")
        if not line:
            continue
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"line {number} is not a SHA-256 with a name: {os.fsdecode(line[:80])}",
                where=str(path),
                hint="Each line is `HASH  split/CLASS/FILE`, as `sha256sum` in the data folder writes it.",
            )
        name = os.fsdecode(match[2]).removeprefix("./")
        if name in manifest:
            raise DataError(f"line {number} names {name} again", where=str(path), hint="Keep one of the lines.")
        manifest[name] = match[1].decode().lower()
    return manifest


def compare_manifest(manifest: Mapping[str, str], splits: Mapping[str, SplitCheck]) -> ManifestCheck:
    """Return the differences of a data set from a manifest."""
    hashes = _hash_by_name(splits)
    unreadable = {f"{split}/{image.image}" for split, check in splits.items() for image in check.unreadable}
    missing = sorted(manifest.keys() - hashes.keys() - unreadable, key=os.fsencode)
    return ManifestCheck(
        listed=len(manifest),
        changed=tuple(name for name, digest in hashes.items() if manifest.get(name, digest) != digest),
        missing=tuple(missing),
        extra=tuple(name for name in hashes if name not in manifest),
    )


def _hash_by_name(splits: Mapping[str, SplitCheck]) -> dict[str, str]:
    return {
        f"{split}/{image_id}": digest.hex()
        for split, check in splits.items()
        for image_id, digest in check.digests.items()
    }
