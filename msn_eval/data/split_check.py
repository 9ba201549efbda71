"""SplitCheck: what was found in one split, what its images turned out to be folded into counts in the order of ids."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from msn_eval.data.hashing import content_sha256
from msn_eval.data.image_info import ImageFacts
from msn_eval.data.images import ImageSet


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


def check_split(split: str, images: ImageSet, facts: Iterable[ImageFacts]) -> SplitCheck:
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
