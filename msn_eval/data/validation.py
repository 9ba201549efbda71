"""DatasetCheck: what was found in a data set when every image of it was read and decoded. Needs no torch."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msn_eval.data.dataset import DataSet, class_map_sha256
from msn_eval.data.hashing import content_sha256
from msn_eval.data.image_info import ImageInfo, Progress, inspect_images
from msn_eval.data.imagenet_subsets import read_publication
from msn_eval.data.images import ImageSet
from msn_eval.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Sized:
    """An image and its size in pixels."""

    image: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An image that cannot be used, where it stands, and why."""

    image: str
    place: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """What was found in one split.

    class_sizes:    images of each class, in the order of the class map; 0 for a class of the other split alone
    kinds:          how many images are of each format and mode, the most first
    turned:         images whose EXIF orientation is not 1, which the evaluation ignores
    smallest:       the image of fewest pixels, and `largest` that of most; the first of several
    duplicates:     images whose bytes another image of the split has before them
    look_alikes:    ids, or classes, that differ only by case or by Unicode normalisation
    content_sha256: as records show it; None where an image could not be read
    digests:        SHA-256 of each image that could be read
    """

    split: str
    images: int
    class_sizes: Mapping[str, int]
    passed_over: int
    kinds: Mapping[str, int]
    turned: int
    damaged_exif: int
    smallest: Sized | None
    largest: Sized | None
    unreadable: tuple[Unreadable, ...]
    duplicates: int
    look_alikes: tuple[tuple[str, ...], ...]
    content_sha256: str | None
    digests: Mapping[str, bytes]


def check_split(split: str, images: ImageSet, facts: Iterable[ImageInfo]) -> SplitCheck:
    """Put together what was found out about each image, in the order of the set."""
    kinds: Counter[str] = Counter()
    turned = damaged_exif = 0
    smallest: Sized | None = None
    largest: Sized | None = None
    unreadable: list[Unreadable] = []
    digests: dict[str, bytes] = {}
    for image_id, fact in zip(images.ids, facts, strict=True):
        if fact.digest is not None:
            digests[image_id] = fact.digest
        if fact.problem:
            place = images.source.place(image_id)
            unreadable.append(Unreadable(image=image_id, place=place, reason=fact.problem))
        if fact.kind:
            kinds[fact.kind] += 1
        turned += fact.orientation != 1
        damaged_exif += fact.damaged_exif
        if fact.size is not None:
            this = Sized(image=image_id, width=fact.size[0], height=fact.size[1])
            smallest = this if smallest is None or _pixels(this) < _pixels(smallest) else smallest
            largest = this if largest is None or _pixels(this) > _pixels(largest) else largest
    class_counts = Counter(images.labels)
    whole = len(digests) == len(images)
    return SplitCheck(
        split=split,
        images=len(images),
        class_sizes={name: class_counts[label] for label, name in enumerate(images.classes)},
        passed_over=images.passed_over,
        kinds=dict(sorted(kinds.items(), key=lambda entry: (-entry[1], entry[0]))),
        turned=turned,
        damaged_exif=damaged_exif,
        smallest=smallest,
        largest=largest,
        unreadable=tuple(unreadable),
        duplicates=len(digests) - len(set(digests.values())),
        look_alikes=(*look_alikes(images.classes), *look_alikes(images.ids)),
        content_sha256=content_sha256(images.ids, {key: value.hex() for key, value in digests.items()})
        if whole
        else None,
        digests=digests,
    )


def _pixels(image: Sized) -> int:
    return image.width * image.height


def look_alikes(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Group the names that some file systems would hold for one: equal but for case or Unicode normalisation."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())].append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


# As sha256sum writes it: a backslash first where the name has some of its own, or line ends, spelled out.
_MANIFEST_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}


@dataclass(frozen=True, kw_only=True)
class ManifestCheck:
    """How a data set differs from a manifest, by `split/CLASS/FILE`; images that could not be read are told elsewhere."""

    listed: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return not (self.changed or self.missing or self.extra)


def write_manifest(splits: Iterable[SplitCheck]) -> bytes:
    """Give the manifest of a data set: a line `HASH  split/CLASS/FILE` an image, as sha256sum writes it."""
    return b"".join(
        _manifest_line(digest.hex(), f"{split.split}/{image_id}")
        for split in splits
        for image_id, digest in split.digests.items()
    )


def _manifest_line(digest: str, name: str) -> bytes:
    plain = os.fsencode(name)
    escaped = re.sub(rb"[\\\n\r]", lambda found: _ESCAPES[found.group()], plain)
    return (b"\\" if escaped != plain else b"") + f"{digest}  ".encode() + escaped + b"\n"


def read_manifest(path: Path) -> dict[str, str]:
    """Read the SHA-256 of each `split/CLASS/FILE` from a file that sha256sum or `write_manifest` wrote.

    Raises DataError naming the first line that is none of it, and a name that stands there twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            hint="Give --manifest a file of SHA-256 lines.",
        ) from error
    found: dict[str, str] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if not line:
            continue
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"line {number} is no SHA-256 with a name: {os.fsdecode(line[:80])}",
                where=str(path),
                hint="Each line is `HASH  split/CLASS/FILE`, as `sha256sum` in the data folder writes them.",
            )
        escaped, digest, raw = match.groups()
        plain = re.sub(rb"\\([\\nr])", _unescape, raw) if escaped else raw
        name = os.fsdecode(plain).removeprefix("./")
        if name in found:
            raise DataError(f"line {number} names {name} again", where=str(path), hint="Keep one of the lines.")
        found[name] = digest.decode().lower()
    return found


def _unescape(found: re.Match[bytes]) -> bytes:
    return {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}[found.group(1)]


def compare_manifest(manifest: Mapping[str, str], splits: Iterable[SplitCheck]) -> ManifestCheck:
    """Say which images are not those that a manifest lists."""
    changed: list[str] = []
    extra: list[str] = []
    there: set[str] = set()
    for split in splits:
        there |= {f"{split.split}/{entry.image}" for entry in split.unreadable}
        for image_id, digest in split.digests.items():
            name = f"{split.split}/{image_id}"
            there.add(name)
            if name not in manifest:
                extra.append(name)
            elif manifest[name] != digest.hex():
                changed.append(name)
    missing = sorted(manifest.keys() - there, key=os.fsencode)
    return ManifestCheck(listed=len(manifest), changed=tuple(changed), missing=tuple(missing), extra=tuple(extra))


_IMAGENET_TRAIN_IMAGES = 1_281_167


@dataclass(frozen=True, kw_only=True)
class DatasetCheck:
    """What was found in a data set.

    shared:      a validation image and the first training image of the same bytes, for each validation image that has one
    warnings:    how the counts differ from those of the known data set that has these classes
    """

    name: str
    splits: tuple[SplitCheck, ...]
    shared: tuple[tuple[str, str], ...]
    class_map_sha256: str
    warnings: tuple[str, ...]
    manifest: ManifestCheck | None = None

    @property
    def sound(self) -> bool:
        return not any(split.unreadable for split in self.splits) and (self.manifest is None or self.manifest.agrees)


def check_dataset(
    data: DataSet,
    *,
    workers: int | None = None,
    manifest: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> DatasetCheck:
    """Read and decode every image of both splits.

    workers:  processes; 0 does it here, None as many as there are cores
    manifest: SHA-256 of each `split/CLASS/FILE` that is expected
    Raises ResourceError where a process dies or hangs, naming the images that it was at.
    """
    splits = tuple(
        check_split(name, images, inspect_images(name, images, workers=workers, on_progress=on_progress))
        for name, images in (("train", data.train), ("val", data.val))
    )
    train, val = splits
    hashed = class_map_sha256(data.classes)
    return DatasetCheck(
        name=data.name,
        splits=splits,
        shared=shared_images(train.digests, val.digests),
        class_map_sha256=hashed,
        warnings=tuple(_count_warnings(hashed, train_images=train.images, val_images=val.images)),
        manifest=None if manifest is None else compare_manifest(manifest, splits),
    )


def shared_images(train: Mapping[str, bytes], val: Mapping[str, bytes]) -> tuple[tuple[str, str], ...]:
    """Give each validation image whose bytes a training image has too, with the first such image."""
    wanted = set(val.values())
    first: dict[bytes, str] = {}
    for image_id, digest in train.items():
        if digest in wanted:
            first.setdefault(digest, image_id)
    return tuple((image_id, first[digest]) for image_id, digest in val.items() if digest in first)


def _count_warnings(hashed: str, *, train_images: int, val_images: int) -> Iterator[str]:
    """Say how the counts differ from those of the data set that has these classes, where it is a known one."""
    known = read_publication()
    if hashed != known.class_map_sha256:
        return
    for split, found, expected in (
        ("train", train_images, _IMAGENET_TRAIN_IMAGES),
        ("val", val_images, known.val_images),
    ):
        if found != expected:
            yield f"these are ImageNet's classes, but {split} has {found:,} images instead of {expected:,}"
