"""The classes of ImageNet's validation images, which are distributed flat: synset file, Kaggle's CSV, or devkit."""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msn_eval.errors import DataError

WNID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")
_SYNSET_FILES = ("*synset_labels*.txt", "val.txt")
_KAGGLE_FILE = "LOC_val_solution.csv"
_DEVKIT = "ILSVRC2012_devkit_t12"
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_MOST_BYTES = 1 << 26  # of a label file, or of the devkit unpacked; the real ones have a few million
_REMEDY = (
    f"Put {_DEVKIT}.tar.gz of the ImageNet site beside the images' folder or archive; or a synset file, one WNID a line "
    f"in the order of the images (imagenet_2012_validation_synset_labels.txt); or Kaggle's {_KAGGLE_FILE}."
)


@dataclass(frozen=True, kw_only=True)
class _Label:
    """What one line of a file says."""

    wnid: str
    line: int


@dataclass(frozen=True, kw_only=True)
class _LabelFile:
    """Labels of one file: of named images, or of all images in the order of their names.

    named: by file name without suffix; None where the order tells
    """

    where: str
    ordered: Sequence[_Label]
    named: Mapping[str, _Label] | None = None


def read_labels(files: Sequence[str], folders: Sequence[Path], *, where: str, known: Iterable[str] | None) -> list[str]:
    """Give the WNID of each validation image.

    files:   names of the images
    folders: where label files may stand; all that are there must agree
    where:   the place of the images, for errors
    known:   the classes that there are, or None to take any
    Raises DataError naming file and line for unknown classes, and for labels that do not fit the images.
    """
    sources = [*_find_synset_files(folders), *_find_kaggle_files(folders), *_find_devkits(folders)]
    if not sources:
        raise DataError(
            f"holds {len(files):,} images without class folders, and nothing tells their classes",
            where=where,
            hint=f"{_REMEDY} Of another data set, put the images of each class into a folder of its own.",
        )
    classes = None if known is None else frozenset(known)
    first, labels = sources[0], _match(sources[0], files, where, classes)
    for other in sources[1:]:
        _check_agreement(files, first, labels, other, _match(other, files, where, classes))
    return [label.wnid for label in labels]


def _match(source: _LabelFile, files: Sequence[str], where: str, known: frozenset[str] | None) -> list[_Label]:
    """Give the label of each image by one file."""
    found = (
        _by_name(source, source.named, files, where) if source.named is not None else _by_order(source, files, where)
    )
    for file, label in zip(files, found, strict=True):
        if known is not None and label.wnid not in known:
            raise DataError(
                f"line {label.line}: {label.wnid}, the class of {file}, is none of the {len(known):,} training classes",
                where=source.where,
                hint="Complete the training images, or pass --allow-class-mismatch to number the union of both.",
            )
    return found


def _by_name(source: _LabelFile, named: Mapping[str, _Label], files: Sequence[str], where: str) -> list[_Label]:
    without = [file for file in files if _stem(file) not in named]
    if without:
        raise DataError(
            f"names no class for {len(without):,} of the {len(files):,} images in {where}, {without[0]} first",
            where=source.where,
            hint="Complete it, or remove the images that are not ImageNet's.",
        )
    return [named[_stem(file)] for file in files]


def _by_order(source: _LabelFile, files: Sequence[str], where: str) -> list[_Label]:
    if len(source.ordered) != len(files):
        raise DataError(
            f"holds {len(source.ordered):,} labels, but there are {len(files):,} images in {where}",
            where=source.where,
            hint="Its lines follow the order of all images: complete the images, "
            f"or give labels by name (FILE WNID a line in val.txt, or {_KAGGLE_FILE}).",
        )
    order = sorted(range(len(files)), key=lambda row: os.fsencode(files[row]))
    numbers = [_NUMBERED.fullmatch(_stem(files[row])) for row in order]
    for place, (row, number) in enumerate(zip(order, numbers, strict=True), 1):
        if number is not None and int(number[1]) != place:
            raise DataError(
                f"image {place:,} in order is {files[row]}: another is missing, and labels would shift",
                where=where,
                hint=f"{source.where} tells labels by the order of all images: complete them, and remove strays.",
            )
    found = dict(zip(order, source.ordered, strict=True))
    return [found[row] for row in range(len(files))]


def _check_agreement(
    files: Sequence[str], one: _LabelFile, labels: Sequence[_Label], other: _LabelFile, others: Sequence[_Label]
) -> None:
    apart = [row for row in range(len(files)) if labels[row].wnid != others[row].wnid]
    if apart:
        row = apart[0]
        raise DataError(
            f"says {labels[row].wnid} in line {labels[row].line} of {files[row]}, where {other.where} says "
            f"{others[row].wnid} in line {others[row].line}; they differ on {len(apart):,} of {len(files):,} images",
            where=one.where,
            hint="Remove the one that is wrong.",
        )


def _find_synset_files(folders: Sequence[Path]) -> list[_LabelFile]:
    paths = {path: None for folder in folders for pattern in _SYNSET_FILES for path in sorted(folder.glob(pattern))}
    return [found for path in paths if path.is_file() and (found := _read_synset_file(path)) is not None]


def _read_synset_file(path: Path) -> _LabelFile | None:
    """Read lines `WNID` or `FILE WNID`; None for `FILE NUMBER`, whose numbers count classes in an order of their own."""
    rows = [(number, line.split()) for number, line in _lines(_content(path), str(path)) if line.strip()]
    if all(len(words) == 2 and words[1].isdecimal() for _, words in rows):
        return None
    ordered: list[_Label] = []
    named: dict[str, _Label] = {}
    for number, words in rows:
        if len(words) not in (1, 2) or len(words) != len(rows[0][1]):
            raise _bad_line(str(path), number, " ".join(words), "lines are all WNID, or all FILE WNID")
        label = _Label(wnid=_wnid(words[-1], str(path), number), line=number)
        ordered.append(label)
        if len(words) == 2:
            _name(named, words[0].rpartition("/")[2], label, str(path))
    return _LabelFile(where=str(path), ordered=ordered, named=named or None)


def _find_kaggle_files(folders: Sequence[Path]) -> list[_LabelFile]:
    paths = dict.fromkeys(folder / _KAGGLE_FILE for folder in folders)
    return [_read_kaggle_file(path) for path in paths if path.is_file()]


def _read_kaggle_file(path: Path) -> _LabelFile:
    """Read lines `IMAGE,WNID x y x y WNID x y x y ...`: boxes of objects that are all of one class."""
    where = str(path)
    named: dict[str, _Label] = {}
    for number, line in _lines(_content(path), where):
        image, comma, boxes = line.strip().partition(",")
        if not line.strip() or (number == 1 and image == "ImageId"):
            continue
        wnids = {word for word in boxes.split() if not _is_number(word)}
        if not comma or len(wnids) != 1:
            raise _bad_line(where, number, line.strip(), "a line is an image, a comma, and boxes of one class")
        _name(named, image, _Label(wnid=_wnid(wnids.pop(), where, number), line=number), where)
    return _LabelFile(where=where, ordered=list(named.values()), named=named)


def _find_devkits(folders: Sequence[Path]) -> list[_LabelFile]:
    found = []
    for folder in dict.fromkeys(folders):
        found += [_read_packed_devkit(path) for path in sorted(folder.glob(f"{_DEVKIT}*.t*")) if path.is_file()]
        for data in (folder / "data", *sorted(folder.glob("*/data"))):
            if (data / _META).is_file() and (data / _TRUTH).is_file():
                found.append(_read_devkit(_content(data / _META), _content(data / _TRUTH), data / _META, data / _TRUTH))
    return found


def _read_packed_devkit(path: Path) -> _LabelFile:
    """Read the devkit's two files out of its archive, in memory."""
    content = _content(path)
    try:
        if content.startswith(b"\x1f\x8b"):
            unpacking = zlib.decompressobj(wbits=31)
            content = unpacking.decompress(content, _MOST_BYTES)
            if not unpacking.eof:
                raise ValueError(f"it is cut short, or has more than {_MOST_BYTES:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = {member.name.rpartition("/")[2]: member for member in archive if member.isreg()}
            files = {name: archive.extractfile(members[name]) for name in (_META, _TRUTH) if name in members}
            contents = {name: file.read() for name, file in files.items() if file is not None}
    except (tarfile.TarError, zlib.error, ValueError, LookupError, OSError, EOFError, RecursionError) as error:
        raise DataError(f"the devkit cannot be read: {error}", where=str(path), hint="Download it again.") from error
    missing = [name for name in (_META, _TRUTH) if name not in contents]
    if missing:
        raise DataError(
            f"holds no {' and no '.join(missing)}",
            where=str(path),
            hint=f"It should be {_DEVKIT}.tar.gz; get it anew.",
        )
    return _read_devkit(contents[_META], contents[_TRUTH], path / "data" / _META, path / "data" / _TRUTH)


def _read_devkit(meta: bytes, truth: bytes, meta_path: Path, truth_path: Path) -> _LabelFile:
    """Read the class number of each image in order, and by `meta` the class of each number."""
    classes = _read_meta(meta, str(meta_path))
    where = str(truth_path)
    labels = []
    for line, text in _lines(truth, where):
        number = text.strip()
        if not number:
            continue
        if not number.isdecimal() or int(number) not in classes:
            raise _bad_line(where, line, number, f"it is no ILSVRC2012_ID of {meta_path}")
        labels.append(_Label(wnid=classes[int(number)], line=line))
    return _LabelFile(where=where, ordered=labels)


def _read_meta(content: bytes, where: str) -> dict[int, str]:
    """Give the WNID of each ILSVRC2012_ID."""
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])["synsets"])
        pairs = [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in synsets]
    except Exception as error:  # loadmat fails in a dozen ways on a damaged file
        raise DataError(
            f"holds no table of classes: {error or type(error).__name__}", where=where, hint="Get the devkit anew."
        ) from error
    classes = dict(pairs)
    if len(classes) != len(pairs) or not all(WNID.fullmatch(wnid) for wnid in classes.values()):
        raise DataError("an ILSVRC2012_ID stands twice, or has no WNID", where=where, hint="Get the devkit anew.")
    return classes


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}", where=str(path), hint="Check its permissions."
        ) from error
    if len(content) > _MOST_BYTES:
        raise DataError(
            f"has more than {_MOST_BYTES:,} bytes, too many for labels", where=str(path), hint="Move it elsewhere."
        )
    return content


def _lines(content: bytes, where: str) -> list[tuple[int, str]]:
    try:
        return list(enumerate(content.decode("utf-8-sig").split("\n"), 1))
    except UnicodeDecodeError as error:
        raise DataError(f"is no UTF-8 text: {error}", where=where, hint="Get it anew.") from error


def _wnid(word: str, where: str, line: int) -> str:
    if not WNID.fullmatch(word):
        raise _bad_line(where, line, word, "a class is an n and eight digits")
    return word


def _name(named: dict[str, _Label], file: str, label: _Label, where: str) -> None:
    stem = _stem(file)
    if stem in named:
        raise _bad_line(where, label.line, file, f"it stands in line {named[stem].line} already")
    named[stem] = label


def _stem(file: str) -> str:
    stem, dot, _ = file.rpartition(".")
    return stem if dot else file


def _is_number(word: str) -> bool:
    return word.removeprefix("-").replace(".", "", 1).isdecimal()


def _bad_line(where: str, line: int, text: str, why: str) -> DataError:
    return DataError(f"line {line}: {text!r}: {why}", where=where, hint="Correct the file, or get it anew.")
