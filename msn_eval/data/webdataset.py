"""WebDataset folders: `train-*.tar` and `val-*.tar` with a `.cls` beside each image, and `classes.txt`."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from msn_eval.data.dataset import DataSet, Listing, make_dataset, make_split
from msn_eval.data.folder import list_entries
from msn_eval.data.images import ImageSet, is_image_name
from msn_eval.data.index import Part, list_parts, make_part
from msn_eval.data.tar import TarMember, list_members, open_archives, read_members
from msn_eval.errors import DataError

_log = logging.getLogger(__name__)
_NUMBERED = re.compile(r"-(\d+)(?:-of-(\d+))?\.tar")
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4))$")
_LONGEST_INDEX = 32  # bytes of a class index with its spaces and line end
_SHOWN = 5


def read_webdataset(name: str, *, allow_class_mismatch: bool = False, cache_dir: Path | None = None) -> DataSet:
    """Read the WebDataset in the folder `name`.

    A sample is the members of one archive that share a key, the path up to the first dot of the file's name: an image
    and `KEY.cls`, the decimal index of its class among the lines of `classes.txt`. An id is the class and the name of
    the image member without its folders. Raises DataError naming the archive and member at fault.
    """
    root = Path(name)
    classes = _read_classes(root)
    data = make_dataset(
        root.resolve().name or str(root),
        where=str(root),
        train=_list_shards(root, "train", classes, cache_dir),
        val=_list_shards(root, "val", classes, cache_dir),
        allow_class_mismatch=allow_class_mismatch,
    )
    left_out = sorted(set(classes) - set(data.classes), key=os.fsencode)
    if left_out:
        _log.info("%s: %d classes have no image and are left out, %s first", root, len(left_out), left_out[0])
    return data


def read_webdataset_split(name: str, split: str, *, cache_dir: Path | None = None) -> ImageSet:
    """Read one split of a WebDataset alone, with its own classes."""
    root = Path(name)
    return make_split(_list_shards(root, split, _read_classes(root), cache_dir))


def _list_shards(root: Path, split: str, classes: Sequence[str], cache_dir: Path | None) -> Listing:
    paths = _find_shards(root, split)
    archives = open_archives(paths)
    parts = list_parts(paths, _scan_shard, root=paths[0], kind="webdataset", cache_dir=cache_dir)
    for path, part in zip(paths, parts, strict=True):
        for file, index in zip(part.names, part.numbers[:, 2].tolist(), strict=True):
            if index >= len(classes):
                raise DataError(
                    f"the class index of {file} is {index}, but classes.txt has {len(classes)} lines, 0 the first",
                    where=str(path),
                    hint=f"{root / 'classes.txt'} must be the one that the archives were written with.",
                )
    names = [[classes[index] for index in part.numbers[:, 2].tolist()] for part in parts]
    listing = list_members(archives, parts, names, root=paths[0])
    if not listing.files:
        raise DataError(
            f"the {split} archives hold no images", where=str(paths[0]), hint="Write them again with their images."
        )
    return listing


def _find_shards(root: Path, split: str) -> list[Path]:
    """Give the archives of a split. A number that is missing among them is a lost file, and so fewer images."""
    beginning = f"{split}-"
    names = sorted((entry.name for entry in list_entries(root) if entry.name.startswith(beginning)), key=os.fsencode)
    packed = [name for name in names if _COMPRESSED.search(name)]
    if packed:
        raise DataError(
            "is compressed; images are read in place, which takes plain tars",
            where=str(root / packed[0]),
            hint="Decompress the archives once and remove the compressed ones.",
        )
    shards = [name for name in names if name.endswith(".tar")]
    if not shards:
        raise DataError(
            f"holds no {beginning}*.tar",
            where=str(root),
            hint="A WebDataset has train-*.tar, val-*.tar, classes.txt.",
        )
    found = [match for name in shards if (match := _NUMBERED.fullmatch(name, len(split)))]
    numbers = sorted({int(match[1]) for match in found})
    if numbers:
        first = min(numbers[0], 1)  # counted from 0 or from 1
        counts = {int(match[2]) for match in found if match[2]}
        last = max([numbers[-1], *(count - 1 + first for count in counts)])
        missing = sorted(set(range(first, last + 1)) - set(numbers))
        if missing:
            shown = ", ".join(map(str, missing[:_SHOWN])) + (", …" if len(missing) > _SHOWN else "")
            raise DataError(
                f"{len(missing)} of the {split} archives are missing between {shards[0]} and {shards[-1]}: "
                f"number {shown}",
                where=str(root),
                hint="Download what is missing, or rename the archives if all are there.",
            )
    return [root / name for name in shards]


def _scan_shard(path: Path) -> Part:
    """Give the images of one archive with their offsets, sizes and class indices."""
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
            image, label = _pair(path, key.removeprefix("/"), sample)
            index = _class_index(path, label, os.pread(archive.fileno(), _LONGEST_INDEX, label.offset)[: label.size])
            names.append(image.file)
            rows.append((image.offset, image.size, index))
    return make_part(names, rows, columns=3, passed_over=len(members) - 2 * len(names))


def _pair(path: Path, key: str, sample: Sequence[TarMember]) -> tuple[TarMember, TarMember]:
    labels = [member for member in sample if member.name.endswith(".cls")]
    images = [member for member in sample if not member.name.endswith(".cls")]
    for found, what in ((images, "image"), (labels, "label")):
        if len(found) != 1:
            shown = ", ".join(member.file for member in found[:_SHOWN])
            raise DataError(
                f"sample {key} has {len(found)} {what}s: {shown}" if found else f"sample {key} has no {what}",
                where=str(path),
                hint="A sample is one image and one KEY.cls with the index of its class.",
            )
    return images[0], labels[0]


def _class_index(path: Path, label: TarMember, content: bytes) -> int:
    digits = content.strip()
    if label.size > _LONGEST_INDEX or not digits.isdigit() or len(digits) > 9:
        raise DataError(
            f"member {label.name} holds {content!r}, which is no class index",
            where=str(path),
            hint="A .cls holds a decimal index into classes.txt, counted from 0.",
        )
    return int(digits)


def _read_classes(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        state = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(
            f"the data folder {state}",
            where=str(root),
            hint="Give --data wds:FOLDER with train-*.tar, val-*.tar and classes.txt.",
        )
    path = root / "classes.txt"
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(
            "has no classes.txt", where=str(root), hint="Write one class name a line, that of index 0 first."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), hint="Write it as UTF-8 text.") from error
    names = [line.removesuffix("\r") for line in lines]
    while names and not names[-1]:
        names.pop()
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip() or "/" in name or "\0" in name:
            raise DataError(
                f"line {number}: {name!r} is no class name",
                where=str(path),
                hint="Each line is one class, not empty and without a slash, which ids set between class and file.",
            )
        if name in seen:
            raise DataError(
                f"line {number}: {name} stands in line {seen[name]} already",
                where=str(path),
                hint="Give every class a name of its own.",
            )
        seen[name] = number
    return tuple(names)
