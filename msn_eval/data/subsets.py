"""Subset: the labelled training images of one draw. Its size is counted, never taken from a file name."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msn_eval.data.dataset import class_map_sha256
from msn_eval.data.imagenet_subsets import read_publication, read_published_list
from msn_eval.data.images import ImageSet, reading
from msn_eval.errors import DataError, NumericalError, UsageError, did_you_mean, format_count
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file

LOW_SHOT = ("1img", "2imgs", "5imgs", "1pct")
SUBSETS = ("1img", "2imgs", "5imgs", "Nimgs", "1pct", "10pct", "Npct", "full")  # N is any number
DRAWS = (1, 2, 3)
# Images per class, and percent of the images of each class. One name for each size: no leading zeros, `1img` but `2imgs`.
_SHOTS = re.compile(r"(1)img|([2-9]|[1-9][0-9]{1,8})imgs")
_SHARE = re.compile(r"([1-9][0-9]?|100)pct")
_OTHER_SIZE = re.compile(r"([0-9]*\.?[0-9]{1,9})(imgs?|pct|%)")
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One draw of labelled training images.

    Attributes:
        name: As requested, such as `5imgs`; for a list its file name.
        draw: 1-based.
        rule: How the images were chosen: `published`, `nested`, `full`, or `list:` and a hash of the list.
        image_ids: Unique, in the order of the data set.
        skipped: Unreadable images that some draw of this subset had to do without, in byte order.
    """

    name: str
    draw: int
    rule: str
    image_ids: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)


def make_subsets(names: Sequence[str], train: ImageSet) -> tuple[Subset, ...]:
    """Return every draw of the requested subsets, each once, in the order of the request.

    Args:
        names: `1img`, `Nimgs`, `Npct`, `full`, `low-shot`, each optionally with `@DRAW`, or list files.
        train: The training images.

    Raises:
        UsageError: A name or draw is unknown.
        DataError: Images are missing.
    """
    subsets: dict[tuple[str, int, str], Subset] = {}
    for name in names:
        base, at, draw = name.partition("@")
        for member in [f"{size}{at}{draw}" for size in LOW_SHOT] if base == "low-shot" else [name]:
            for subset in _make_draws(member, train):
                subsets.setdefault((subset.name, subset.draw, subset.rule), subset)
    return tuple(subsets.values())


def merge_subsets(subsets: Sequence[Subset], train: ImageSet) -> ImageSet:
    """Return every image that any of the subsets needs, once: draws and sizes overlap heavily."""
    return train.only(list({image_id: None for subset in subsets for image_id in subset.image_ids}))


def check_subset_names(names: Iterable[str]) -> None:
    """Raise UsageError for a name that no data set can have, before anything is read."""
    known = (*SUBSETS, "low-shot")
    for name in names:
        base, _, draw = name.partition("@")
        if base == "low-shot" or _has_size(base):
            if draw and draw not in map(str, DRAWS):
                raise UsageError(f"--subset {name}: there is no draw {draw!r}", hint="Draws are 1, 2 and 3.")
        elif not os.path.lexists(name) or Path(name).is_dir():  # what else cannot be read is said when it is read
            if (size := _OTHER_SIZE.fullmatch(base)) and not size[1].isdecimal():
                raise UsageError(
                    f"--subset {name}: a subset has a whole number of images per class, or a whole percentage from 1 to 100",
                    hint=f"Use {_name_size(size)}, or a list file, one image per line, which may hold any images.",
                )
            suggestion = f" Did you mean {_name_size(size)}?" if size else did_you_mean(base, known)
            raise UsageError(
                f"--subset {name}: no subset and no list file has this name.{suggestion}",
                hint=f"Known: {', '.join(known)}, or the path of a list, one image per line.",
            )


def _has_size(name: str) -> bool:
    return name == "full" or bool(_SHOTS.fullmatch(name) or _SHARE.fullmatch(name))


def _name_size(size: re.Match[str]) -> str:
    """Return the name of the subset whose size is nearest to a number of images or percent."""
    is_share = not size[2].startswith("img")
    nearest = round(min(max(float(size[1]), 1), 100 if is_share else 10**9 - 1))
    return f"{nearest}pct" if is_share else f"{nearest}imgs" if nearest > 1 else "1img"


def _make_draws(name: str, train: ImageSet) -> tuple[Subset, ...]:
    check_subset_names([name])
    base, _, wanted = name.partition("@")
    if not _has_size(base):
        return (read_list(Path(name), train),)
    publication = read_publication()
    published = publication.lists_of(base) if class_map_sha256(train.classes) == publication.class_map_sha256 else ()
    draws = [entry.draw for entry in published] or ([1] if base == "full" else list(DRAWS))
    if wanted and int(wanted) not in draws:
        raise UsageError(f"--subset {name}: {base} has only draw {draws[0]} here", hint=f"Use {base}.")
    chosen = [draw for draw in draws if not wanted or draw == int(wanted)]
    if not published:
        return tuple(draw_subset(base, draw, train) for draw in chosen)
    lists = {entry.draw: read_published_list(entry) for entry in published if entry.draw in chosen}
    return tuple(
        Subset(name=base, draw=draw, rule="published", image_ids=_match_lines(text, path, train))
        for draw, (path, text) in lists.items()
    )


def draw_subset(name: str, draw: int, train: ImageSet) -> Subset:
    """Draw a nested subset: within each class the first k images in the order of SHA-256 of `DRAW:CLASS/FILE`.

    Classes without any training image (only with --allow-class-mismatch) are left out.

    Raises:
        DataError: A class has fewer than k images.
    """
    if name == "full":
        return Subset(name=name, draw=draw, rule="full", image_ids=train.ids)
    chosen: list[str] = []
    for class_name, ids in zip(train.classes, train.ids_by_class, strict=True):
        count = count_images(name, len(ids))
        if ids and len(ids) < count:
            raise DataError(
                f"class {class_name!r} has {format_count(len(ids), 'training image')}, {name} needs {count}",
                hint="Add images to the class, or choose a smaller subset.",
            )
        chosen += sort_by_draw(ids, draw)[:count]
    return Subset(name=name, draw=draw, rule="nested", image_ids=train.only(chosen).ids)


def count_images(name: str, of: int) -> int:
    """Return how many of the `of` images of a class a subset of this name has: N, or N percent, rounded up."""
    if shots := _SHOTS.fullmatch(name):
        return int(shots[1] or shots[2])
    share = _SHARE.fullmatch(name)
    assert share is not None
    return -(-of * int(share[1]) // 100)


def sort_by_draw(ids: Iterable[str], draw: int) -> list[str]:
    """Return ids in the order of a draw: by the SHA-256 of `DRAW:CLASS/FILE`."""

    def key(image_id: str) -> tuple[bytes, bytes]:
        name = os.fsencode(image_id)
        return hashlib.sha256(b"%d:%b" % (draw, name)).digest(), name

    return sorted(ids, key=key)


def make_readable_subsets(
    names: Sequence[str], train: ImageSet, undecodable: Callable[[ImageSet], Collection[str]]
) -> tuple[Subset, ...]:
    """Return the requested subsets without images that cannot be decoded.

    In a draw, the next readable image of its order replaces a bad one; `full` and the user's own lists only lose theirs.
    Every draw of a subset is checked even if only one was requested, so that `skipped` depends on the subset and not on
    the request.

    Args:
        names: As for `make_subsets`.
        train: The training images.
        undecodable: Returns the images of a set that cannot be used.

    Raises:
        DataError: A class runs out of images.
    """
    requested = make_subsets(names, train)
    subsets: list[Subset] = []
    for name in dict.fromkeys(subset.name for subset in requested):
        wanted = [subset for subset in requested if subset.name == name]
        draws = wanted if wanted[0].rule.startswith("list:") else make_subsets([name], train)
        bad: set[str] = set()
        readable = tuple(draws)
        while newly_bad := set(undecodable(merge_subsets(readable, train))):
            bad |= newly_bad
            readable = tuple(replace_images(subset, train, bad) for subset in draws)
        numbers = {subset.draw for subset in wanted}
        skipped = tuple(sorted(bad, key=os.fsencode))
        subsets += [replace(subset, skipped=skipped) for subset in readable if subset.draw in numbers]
    return tuple(subsets)


def replace_images(subset: Subset, train: ImageSet, bad: set[str]) -> Subset:
    """Return a draw without the `bad` images, each replaced by the next of the draw's order; `full` and lists only lose.

    Raises:
        DataError: A class runs out of images.
    """
    kept = set(subset.image_ids) - bad
    if subset.rule in ("nested", "published"):
        lost = Counter(train.labels[train.position[image_id]] for image_id in subset.image_ids if image_id in bad)
        for label, count in lost.items():
            spare = [image_id for image_id in train.ids_by_class[label] if image_id not in kept and image_id not in bad]
            if len(spare) < count:
                raise DataError(
                    f"class {train.classes[label]!r} has too few readable images for {subset.name}",
                    hint="Repair its images, or choose a smaller subset.",
                )
            kept.update(sort_by_draw(spare, subset.draw)[:count])
    if not kept:
        raise DataError(f"no image of subset {subset.name} can be read", hint="Repair the files.")
    return replace(subset, image_ids=train.only(list(kept)).ids)


def read_list(path: Path, train: ImageSet) -> Subset:
    """Read a list file: one id or file name per line. A byte-order mark, CRLF and empty lines are allowed.

    Raises:
        DataError: Lines are unknown, ambiguous or repeated.
        NumericalError: A class has no image in the list.
    """
    with reading(path, hint="Give --subset a text file with one image per line."):
        text = read_regular_file(path, most_bytes=MOST_TEXT_BYTES).decode("utf-8-sig", "surrogateescape")
    image_ids = _match_lines(text, path, train)
    counts = Counter(train.labels[train.position[image_id]] for image_id in image_ids)
    empty = [name for label, name in enumerate(train.classes) if not counts[label]]
    if empty:
        raise NumericalError(
            f"no image of {len(empty)} of {len(train.classes)} classes in this list ({', '.join(empty[:_SHOWN])}); "
            "their validation images could never be classified correctly",
            where=str(path),
            hint="Add images of these classes to the list, or evaluate on a data set without them.",
        )
    content = hashlib.sha256(b"".join(os.fsencode(image_id) + b"\n" for image_id in image_ids)).hexdigest()
    return Subset(name=path.name, draw=1, rule=f"list:{content[:16]}", image_ids=image_ids)


def _match_lines(text: str, path: Path, train: ImageSet) -> tuple[str, ...]:
    """Return the ids that the lines of a list name, in the order of the data set."""
    first_line: dict[str, int] = {}
    faults: list[str] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line:
            continue
        matches = (line,) if line in train.position else train.ids_by_file.get(line, ())
        if not matches:
            faults.append(f"line {number}: {line}: no such training image")
        elif len(matches) > 1:
            faults.append(f"line {number}: {line}: {len(matches)} images have this file name; write CLASS/FILE")
        elif first_line.setdefault(matches[0], number) != number:
            faults.append(f"line {number}: {line}: already on line {first_line[matches[0]]}")
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:_SHOWN])
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError(
            f"{format_count(len(faults), 'line does', 'lines do')} not fit the training images:\n{shown}{more}",
            where=str(path),
            hint="Complete the data set, or use the list that belongs to it.",
        )
    if not first_line:
        raise DataError("the list is empty", where=str(path), hint="Write one image per line.")
    return train.only(list(first_line)).ids
