"""DatasetCheck: what was found in a data set when every image of it was read and decoded.

Needs no torch. Images are looked at in worker processes; what they say of each is folded into counts in the order of ids.
"""

import hashlib
import io
import multiprocessing
import os
import re
import signal
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from msn_eval.datasets.dataset import DataSet, class_map_sha256
from msn_eval.errors import DataError, ResourceError
from msn_eval.file_hashes import content_sha256
from msn_eval.host import usable_cores
from msn_eval.images import FORMATS, BadImageError, ImageSet, ImageSource, read_image
from msn_eval.published_lists import read_publication

Progress = Callable[[str, int, int], None]  # the split, images done, images in all

_FEW_IMAGES = 512  # below, starting workers costs more than they save
_MOST_WORKERS = 16
_IMAGES_A_TASK = 64
_TASKS_A_WORKER = 3  # handed out ahead
_TASK_SECONDS = 600.0
_SHOWN = 5
_ORIENTATION = 0x0112  # EXIF's tag
_IMAGENET_TRAIN_IMAGES = 1_281_167
# As sha256sum writes it: a backslash first where the name has some of its own, or line ends, spelled out.
_MANIFEST_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What one image turned out to be.

    digest:       SHA-256 of its bytes, None where they could not be read
    kind:         format and mode, such as `JPEG RGB`; empty where there is no telling
    size:         width and height in pixels
    orientation:  EXIF's, 1 where there is none
    damaged_exif: whether its EXIF block cannot be read in full
    problem:      why it cannot be used; empty where it can
    """

    digest: bytes | None = None
    kind: str = ""
    size: tuple[int, int] | None = None
    orientation: int = 1
    damaged_exif: bool = False
    problem: str = ""


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
        check_split(name, images, look_at_images(name, images, workers=workers, on_progress=on_progress))
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


def look_at_image(source: ImageSource, image_id: str) -> ImageFacts:
    """Read and decode one image, and say what it is."""
    try:
        content = read_image(source, image_id)
    except OSError as error:
        return ImageFacts(problem=f"cannot be read: {error.strerror or error}")
    digest = hashlib.sha256(content).digest()
    kind, size, orientation, damaged_exif = _read_header(content)
    problem = ""
    try:
        decoded = source.decode(content)
        if not kind:  # pixels without a file around them
            kind, size = f"raw {decoded.mode}", decoded.size
    except BadImageError as error:
        problem = str(error)
    return ImageFacts(
        digest=digest, kind=kind, size=size, orientation=orientation, damaged_exif=damaged_exif, problem=problem
    )


def _read_header(content: bytes) -> tuple[str, tuple[int, int] | None, int, bool]:
    """Give kind, size, EXIF orientation and whether EXIF is damaged, as far as they can be told without the pixels."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            return "", None, 1, False
        damaged = False
        orientation: object = 1
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # its parser has no common base for what it raises on damaged blocks
            damaged = True
        damaged = damaged or any("exif" in str(warning.message).lower() for warning in said)
        turned = orientation if isinstance(orientation, int) else 1
        return f"{image.format} {image.mode}", image.size, turned, damaged


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


def look_at_images(
    split: str, images: ImageSet, *, workers: int | None = None, on_progress: Progress | None = None
) -> Iterator[ImageFacts]:
    """Give what each image is, in the order of the set, from `workers` processes, or this one where that is 0."""
    tell = on_progress or _tell_nobody
    if workers is None:
        workers = automatic_workers(len(images))
    if workers == 0:
        for done, image_id in enumerate(images.ids):
            tell(split, done, len(images))
            yield look_at_image(images.source, image_id)
    else:
        yield from _look_in_processes(split, images, workers, tell)
    tell(split, len(images), len(images))


def automatic_workers(images: int) -> int:
    """Give the number of processes: none for few images, else one a core."""
    if images < _FEW_IMAGES:
        return 0
    return min(_MOST_WORKERS, usable_cores())


def _tell_nobody(split: str, done: int, total: int) -> None:
    """Take the news where nobody wants them."""


def _look_in_processes(split: str, images: ImageSet, workers: int, tell: Progress) -> Iterator[ImageFacts]:
    # Fresh processes, not forks: a progress bar and Arrow have threads of their own, whose locks a fork would inherit.
    fresh = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, fresh, initializer=_become_worker, initargs=(images.source,))
    tasks = iter([images.ids[first : first + _IMAGES_A_TASK] for first in range(0, len(images), _IMAGES_A_TASK)])
    ahead: deque[tuple[Sequence[str], Future[list[ImageFacts]]]] = deque()
    done, ended = 0, False
    try:
        while True:
            while len(ahead) < workers * _TASKS_A_WORKER and (task := next(tasks, None)) is not None:
                ahead.append((task, pool.submit(_look_at_some, task)))
            if not ahead:
                break
            found = ahead[0][1].result(timeout=_TASK_SECONDS)
            ahead.popleft()
            yield from found
            done += len(found)
            tell(split, done, len(images))
        ended = True
    except (BrokenProcessPool, TimeoutError) as error:
        raise _worker_error(
            split, images, error, [task for task, future in ahead if not _is_finished(future)]
        ) from error
    finally:
        crew = set(multiprocessing.active_children()) - before
        if not ended:  # one of them may hang; what they have found is of no use any more
            for child in crew:
                child.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _is_finished(future: "Future[list[ImageFacts]]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _worker_error(split: str, images: ImageSet, error: Exception, unfinished: Sequence[Sequence[str]]) -> ResourceError:
    places = [images.source.place(image_id) for task in unfinished for image_id in task]
    more = f"\n  and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    shown = "\n".join(f"  {place}" for place in places[:_SHOWN])
    what = f"hung for {_TASK_SECONDS:.0f} s" if isinstance(error, TimeoutError) else "died"
    return ResourceError(
        f"a process that decodes images of {split} {what}, at one of these or near them:\n{shown}{more}",
        remedy="Host memory may be short, or the disk may have gone: try fewer --workers, or 0 to see which image it is.",
    )


_source: ImageSource | None = None  # of a worker process


def _become_worker(source: ImageSource) -> None:
    """Take the images' source once, and leave it to the parent to act upon Ctrl-C."""
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _look_at_some(image_ids: Sequence[str]) -> list[ImageFacts]:
    assert _source is not None
    return [look_at_image(_source, image_id) for image_id in image_ids]


def write_manifest(check: DatasetCheck) -> bytes:
    """Give the manifest of a data set: a line `HASH  split/CLASS/FILE` an image, as sha256sum writes it."""
    return b"".join(
        _manifest_line(digest.hex(), f"{split.split}/{image_id}")
        for split in check.splits
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
            remedy="Give --manifest a file of SHA-256 lines.",
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
                remedy="Each line is `HASH  split/CLASS/FILE`, as `sha256sum` in the data folder writes them.",
            )
        escaped, digest, raw = match.groups()
        plain = re.sub(rb"\\([\\nr])", _unescape, raw) if escaped else raw
        name = os.fsdecode(plain).removeprefix("./")
        if name in found:
            raise DataError(f"line {number} names {name} again", where=str(path), remedy="Keep one of the lines.")
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
