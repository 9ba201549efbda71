"""WebDataset folders: `train-*.tar` and `val-*.tar` with a `.cls` beside each image, and `classes.txt`."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from msn_eval.data.dataset import DatasetListing, Listing, LoadOptions
from msn_eval.data.folder import check_is_folder, folder_name
from msn_eval.data.images import is_image_name, name_in_class, reading
from msn_eval.data.index import ContainerIndex, index_containers, make_index
from msn_eval.data.tar import TarMember, list_members, open_archives, read_members
from msn_eval.errors import DataError, format_count
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file

_log = logging.getLogger(__name__)
_ARCHIVE = re.compile(r"\.(tar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4))$")  # compressed ones are refused when read
_NUMBERED = re.compile(r"-(\d+)(?:-of-(\d+))?\.t")
_LONGEST_INDEX = 32  # bytes of a class index with its spaces and line end
_SHOWN = 5


def list_webdataset(place: str, options: LoadOptions) -> DatasetListing:
    """List the WebDataset in the folder `place`.

    A sample is the members of one archive that share a key, the path up to the first dot of the file's name: an image
    and `KEY.cls`, the decimal index of its class among the lines of `classes.txt`. An id is the class and the name of
    the image member, without the folders down to that of the class, or without all where none has the class's name.

    Raises:
        DataError: Naming the archive and member at fault.
    """
    root = Path(place)
    classes = _read_classes(root)
    splits = {split: _list_shards(root, split, classes, options.cache_dir) for split in options.splits}
    empty = sorted(set(classes).difference(*(listing.files for listing in splits.values())), key=os.fsencode)
    if empty:
        count = format_count(len(empty), "class", "classes")
        _log.info("%s: %s without an image left out, %s first", root, count, empty[0])
    return DatasetListing(name=folder_name(root), splits=splits)


def _list_shards(root: Path, split: str, classes: Sequence[str], cache_dir: Path | None) -> Listing:
    paths = _find_shards(root, split)
    archives = open_archives(paths)
    indexes = index_containers(paths, _scan_shard, root=paths[0], kind="webdataset", cache_dir=cache_dir)
    names, named = [], []
    for path, index in zip(paths, indexes, strict=True):
        labels = index.numbers[:, 2].tolist()
        for file, label in zip(index.names, labels, strict=True):
            if label >= len(classes):
                raise DataError(
                    f"the class index of {file} is {label}, but classes.txt has {len(classes)} lines, 0 the first",
                    where=str(path),
                    hint=f"{root / 'classes.txt'} must be the one that the archives were written with.",
                )
        names.append([classes[label] for label in labels])
        named.append(replace(index, names=tuple(map(name_in_class, index.names, names[-1]))))
    listing = list_members(archives, named, names, root=paths[0])
    if not listing.files:
        raise DataError(
            f"the {split} archives hold no images", where=str(paths[0]), hint="Write them again with their images."
        )
    return listing


def _find_shards(root: Path, split: str) -> list[Path]:
    """Return the archives of a split. A missing number among them is a lost file, which means fewer images."""
    prefix = f"{split}-"
    names = sorted((path.name for path in root.glob(f"{prefix}*")), key=os.fsencode)
    shards = [name for name in names if _ARCHIVE.search(name)]
    if not shards:
        raise DataError(
            f"holds no {prefix}*.tar", where=str(root), hint="A WebDataset has train-*.tar, val-*.tar, classes.txt."
        )
    matches = [match for name in shards if (match := _NUMBERED.match(name, len(split)))]
    numbers = {int(match[1]) for match in matches}
    if numbers:
        first = min(*numbers, 1)  # counted from 0 or from 1
        last = max([*numbers, *(int(match[2]) - 1 + first for match in matches if match[2])])
        missing = sorted(set(range(first, last + 1)) - numbers)
        if missing:
            shown = ", ".join(map(str, missing[:_SHOWN])) + (", …" if len(missing) > _SHOWN else "")
            raise DataError(
                f"missing between {shards[0]} and {shards[-1]}: {format_count(len(missing), 'archive')}, number {shown}",
                where=str(root),
                hint="Download what is missing, or rename the archives if all are there.",
            )
    return [root / name for name in shards]


def _scan_shard(path: Path) -> ContainerIndex:
    """List the images of one archive with their offsets, sizes and class indices."""
    samples: dict[str, list[TarMember]] = {}
    members = read_members(path)
    for member in members:
        folder, _, file = member.name.rpartition("/")
        stem, _, ending = file.partition(".")
        if stem and member.is_file and (ending == "cls" or is_image_name(file)):
            samples.setdefault(f"{folder}/{stem}", []).append(member)
    names, rows = [], []
    with path.open("rb", buffering=0) as archive:
        for key, sample in samples.items():
            labels = [member for member in sample if member.name.endswith(".cls")]
            images = [member for member in sample if member not in labels]
            for matches, what in ((images, "image"), (labels, "label")):
                if len(matches) != 1:
                    shown = ", ".join(member.file for member in matches[:_SHOWN])
                    raise DataError(
                        f"sample {key.removeprefix('/')} has "
                        + (f"{format_count(len(matches), what)}: {shown}" if matches else f"no {what}"),
                        where=str(path),
                        hint="A sample is one image and one KEY.cls with the index of its class.",
                    )
            (image,), (label,) = images, labels
            archive.seek(label.offset)
            index = _parse_class_index(path, label, archive.read(min(label.size, _LONGEST_INDEX)))
            names.append(image.name)
            rows.append((image.offset, image.size, index))
    return make_index(names, rows, columns=3, passed_over=len(members) - 2 * len(names))


def _parse_class_index(path: Path, label: TarMember, content: bytes) -> int:
    digits = content.strip()
    if label.size > _LONGEST_INDEX or not digits.isdigit() or len(digits) > 9:
        raise DataError(
            f"member {label.name} holds {content!r}, which is not a class index",
            where=str(path),
            hint="A .cls holds a decimal index into classes.txt, counted from 0.",
        )
    return int(digits)


def _read_classes(root: Path) -> tuple[str, ...]:
    check_is_folder(root, hint="Give --data wds:FOLDER with train-*.tar, val-*.tar and classes.txt.")
    path = root / "classes.txt"
    with reading(path, hint="Write one class name per line, that of index 0 first."):
        content = read_regular_file(path, most_bytes=MOST_TEXT_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"cannot be read: {error}", where=str(path), hint="Write it as UTF-8 text.") from error
    names = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    first_line: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip() or "/" in name or "\0" in name:
            raise DataError(
                f"line {number}: {name!r} is not a class name",
                where=str(path),
                hint="Each line is one class, not empty and without a slash, which ids have between class and file.",
            )
        if first_line.setdefault(name, number) != number:
            raise DataError(
                f"line {number}: {name} is already in line {first_line[name]}",
                where=str(path),
                hint="Give every class a name of its own.",
            )
    return tuple(names)
