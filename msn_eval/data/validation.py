"""DatasetCheck: the result of reading and decoding every image of a data set. Needs no torch."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from msn_eval.data.dataset import DataSet, class_map_sha256, find_look_alikes, join_look_alikes
from msn_eval.data.hashing import content_sha256
from msn_eval.data.image_info import ImageInfo, Progress, inspect_images
from msn_eval.data.imagenet_subsets import read_publication
from msn_eval.data.images import ImageSet, reading
from msn_eval.errors import DataError, format_count
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file

Hashes = Mapping[str, str]  # SHA-256 by `split/CLASS/FILE`
_IMAGENET_TRAIN_IMAGES = 1_281_167
_MANIFEST_LINE = re.compile(rb"([0-9a-fA-F]{64}) [ *](?:\./)?(.+?)\r?")


@dataclass(frozen=True, slots=True)
class ImageSize:
    """An image and its size in pixels."""

    image: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """Result for one split."""

    classes: int  # classes that have images
    images: int
    class_sizes: Mapping[str, int]  # in the order of the class map; 0 for a class that only the other split has
    passed_over: int  # files that were not taken for images
    kinds: Mapping[str, int]  # number of images per format and mode, the most frequent first
    turned: int  # images whose EXIF orientation is not 1, which the evaluation ignores
    damaged_exif: int  # images whose EXIF block cannot be read in full
    smallest: ImageSize | None  # by number of pixels, the first of several
    largest: ImageSize | None
    unreadable: tuple[Mapping[str, str], ...]  # `image`, `place` and `reason` of each that cannot be used
    duplicates: int  # images whose bytes an earlier image of the split has
    look_alikes: tuple[tuple[str, ...], ...]  # ids that differ only by case or by Unicode normalisation
    content_sha256: str | None  # as in records; None where an image could not be read
    hashes: dict[str, str]  # SHA-256 of each image that could be read


@dataclass(frozen=True, kw_only=True)
class DatasetCheck:
    """Result for a data set."""

    name: str
    splits: Mapping[str, SplitCheck]
    shared: tuple[tuple[str, str], ...]  # validation images whose bytes training has too, and its first such image
    class_map_sha256: str
    warnings: tuple[str, ...]  # other counts than those of ImageNet, which has these classes; look-alikes
    listed: int  # images of the manifest
    differences: Mapping[str, tuple[str, ...]] | None  # from the manifest, None where there is none

    @property
    def unreadable(self) -> int:
        return sum(len(split.unreadable) for split in self.splits.values())

    @property
    def sound(self) -> bool:
        return not self.unreadable and not any((self.differences or {}).values())


def check_dataset(
    data: DataSet, *, workers: int | None = None, manifest: Hashes | None = None, on_progress: Progress | None = None
) -> DatasetCheck:
    """Read and decode every image of both splits as `inspect_images` does, and compare with a manifest where given."""
    splits = {}
    for split, images in (("train", data.train), ("val", data.val)):
        splits[split] = check_split(images, inspect_images(split, images, workers=workers, on_progress=on_progress))
    first = {sha256: image for image, sha256 in reversed(splits["train"].hashes.items())}
    return DatasetCheck(
        name=data.name,
        splits=splits,
        shared=tuple((image, first[sha256]) for image, sha256 in splits["val"].hashes.items() if sha256 in first),
        class_map_sha256=class_map_sha256(data.classes),
        warnings=tuple(_list_warnings(data, splits)),
        listed=len(manifest or ()),
        differences=None if manifest is None else compare_manifest(manifest, splits),
    )


def check_split(images: ImageSet, infos: Iterable[ImageInfo]) -> SplitCheck:
    """Summarise what is known of each image, in the order of the set."""
    by_id = dict(zip(images.ids, infos, strict=True))
    sizes = [ImageSize(image, *info.size) for image, info in by_id.items() if info.size is not None]
    hashes = {image: info.sha256 for image, info in by_id.items() if info.sha256 is not None}
    kinds = Counter(info.kind for info in by_id.values() if info.kind)
    class_sizes, place = Counter(images.labels), images.source.place
    problems = ((image, info.problem) for image, info in by_id.items() if info.problem)
    return SplitCheck(
        classes=len(class_sizes),
        images=len(images),
        class_sizes={name: class_sizes[label] for label, name in enumerate(images.classes)},
        passed_over=images.passed_over,
        kinds=dict(sorted(kinds.items(), key=lambda entry: (-entry[1], entry[0]))),
        turned=sum(info.orientation != 1 for info in by_id.values()),
        damaged_exif=sum(info.damaged_exif for info in by_id.values()),
        smallest=min(sizes, key=lambda size: size.width * size.height, default=None),
        largest=max(sizes, key=lambda size: size.width * size.height, default=None),
        unreadable=tuple({"image": image, "place": place(image), "reason": reason} for image, reason in problems),
        duplicates=len(hashes) - len(set(hashes.values())),
        look_alikes=find_look_alikes(images.ids),
        content_sha256=content_sha256(images.ids, hashes) if len(hashes) == len(images) else None,
        hashes=hashes,
    )


def _list_warnings(data: DataSet, splits: Mapping[str, SplitCheck]) -> Iterator[str]:
    publication = read_publication()
    if class_map_sha256(data.classes) == publication.class_map_sha256:
        for split, expected in (("train", _IMAGENET_TRAIN_IMAGES), ("val", publication.val_images)):
            if splits[split].images != expected:
                images = format_count(splits[split].images, "image")
                yield f"these are ImageNet's classes, but {split} has {images} instead of {expected:,}"
    for split, check in splits.items():
        for group in check.look_alikes:
            yield f"{split}: {join_look_alikes(group)} differ only by case or Unicode normalisation"


def write_manifest(splits: Mapping[str, SplitCheck]) -> bytes:
    """Return the manifest of a data set: one line `HASH  split/CLASS/FILE` per image, as sha256sum writes it."""
    return b"".join(os.fsencode(f"{sha256}  {name}\n") for name, sha256 in _hash_by_name(splits).items())


def read_manifest(path: Path) -> Hashes:
    """Read the SHA-256 of each `split/CLASS/FILE` from a file that sha256sum or `write_manifest` wrote."""
    with reading(path, hint="Give --manifest a file of SHA-256 lines."):
        content = read_regular_file(path, most_bytes=MOST_TEXT_BYTES)
    manifest: dict[str, str] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None and line.strip(b"\r"):
            what = f"line {number} is not a SHA-256 with a name: {os.fsdecode(line[:80])}"
            hint = "Each line is `HASH  split/CLASS/FILE`, as `sha256sum` in the data folder writes it."
            raise DataError(what, where=str(path), hint=hint)
        if match is not None:
            name = os.fsdecode(match[2])
            if name in manifest:
                raise DataError(f"line {number} names {name} again", where=str(path), hint="Keep one of the lines.")
            manifest[name] = match[1].decode().lower()
    return manifest


def compare_manifest(manifest: Hashes, splits: Mapping[str, SplitCheck]) -> dict[str, tuple[str, ...]]:
    """Return the images that are `changed`, `missing` and `extra` beside a manifest. None of them is an unreadable one."""
    hashes = _hash_by_name(splits)
    unreadable = {f"{split}/{image['image']}" for split, check in splits.items() for image in check.unreadable}
    return {
        "changed": tuple(name for name, sha256 in hashes.items() if manifest.get(name, sha256) != sha256),
        "missing": tuple(sorted(manifest.keys() - hashes.keys() - unreadable, key=os.fsencode)),
        "extra": tuple(name for name in hashes if name not in manifest),
    }


def _hash_by_name(splits: Mapping[str, SplitCheck]) -> Hashes:
    return {f"{split}/{image}": sha256 for split, check in splits.items() for image, sha256 in check.hashes.items()}
