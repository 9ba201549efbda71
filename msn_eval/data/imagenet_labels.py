"""The classes of ImageNet's validation images, which are distributed flat: synset file, Kaggle's CSV, or devkit."""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msn_eval.errors import DataError

WNID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")
_NUMBER = re.compile(r"-?\d*\.?\d+")
_SYNSET_FILES = ("*synset_labels*.txt", "val.txt")
_KAGGLE_FILE = "LOC_val_solution.csv"
_DEVKIT = "ILSVRC2012_devkit_t12"
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_MOST_BYTES = 1 << 26  # of a label file or a file of the devkit; the real ones have a few million


class _Label(NamedTuple):
    """The class in one line of a file."""

    wnid: str
    line: int


@dataclass(frozen=True, kw_only=True)
class _LabelFile:
    """Labels of one file.

    Attributes:
        where: The file.
        ordered: Labels in the order of all images.
        named: Labels by file name without suffix; empty where the file has no names.
    """

    where: str
    ordered: list[_Label] = field(default_factory=list)
    named: dict[str, _Label] = field(default_factory=dict)

    def add(self, wnid: str, line: int, name: str | None = None) -> None:
        if not WNID.fullmatch(wnid):
            raise _line_error(self.where, line, wnid, "a class is an n and eight digits")
        self.ordered.append(_Label(wnid, line))
        if name is not None and self.named.setdefault(_stem(name), self.ordered[-1]).line != line:
            raise _line_error(self.where, line, name, f"it is already in line {self.named[_stem(name)].line}")


def read_labels(files: Sequence[str], folders: Sequence[Path], *, where: str, known: Iterable[str] | None) -> list[str]:
    """Return the WNID of each validation image.

    Args:
        files: Names of the images.
        folders: Folders that may hold label files. All label files must agree.
        where: The location of the images, for errors.
        known: The known classes, or None to accept any.

    Raises:
        DataError: A class is unknown, or labels do not fit the images. The text names file and line.
    """
    sources = [*_find_synset_files(folders), *_find_kaggle_files(folders), *_find_devkits(folders)]
    if not sources:
        raise DataError(
            f"holds {len(files):,} images without class folders, and no file with their classes was found",
            where=where,
            hint=f"Put {_DEVKIT}.tar.gz of the ImageNet site beside the images' folder or archive; or a synset file, one "
            "WNID per line in the order of the images (imagenet_2012_validation_synset_labels.txt); or Kaggle's "
            f"{_KAGGLE_FILE}. In a different data set, put the images of each class into a folder of its own.",
        )
    classes = None if known is None else frozenset(known)
    first, *others = [(source.where, _match(source, files, where, classes)) for source in sources]
    for other_where, other_labels in others:
        pairs = list(zip(files, first[1], other_labels, strict=True))
        different = [(file, label, other) for file, label, other in pairs if label.wnid != other.wnid]
        if different:
            file, label, other = different[0]
            raise DataError(
                f"has {label.wnid} in line {label.line} for {file}, where {other_where} has {other.wnid} "
                f"in line {other.line}; they differ on {len(different):,} of {len(files):,} images",
                where=first[0],
                hint="Remove the wrong one.",
            )
    return [label.wnid for label in first[1]]


def _match(source: _LabelFile, files: Sequence[str], where: str, known: frozenset[str] | None) -> list[_Label]:
    """Return the label of each image by one file."""
    labels = _match_by_name(source, files, where) if source.named else _match_by_order(source, files, where)
    for file, label in zip(files, labels, strict=True):
        if known is not None and label.wnid not in known:
            raise DataError(
                f"line {label.line}: {label.wnid}, the class of {file}, is not one of the {len(known):,} training classes",
                where=source.where,
                hint="Complete the training images, or pass --allow-class-mismatch to number the union of both.",
            )
    return labels


def _match_by_name(source: _LabelFile, files: Sequence[str], where: str) -> list[_Label]:
    missing = [file for file in files if _stem(file) not in source.named]
    if missing:
        raise DataError(
            f"names no class for {len(missing):,} of the {len(files):,} images in {where}, {missing[0]} first",
            where=source.where,
            hint="Complete it, or remove the images that are not ImageNet's.",
        )
    return [source.named[_stem(file)] for file in files]


def _match_by_order(source: _LabelFile, files: Sequence[str], where: str) -> list[_Label]:
    if len(source.ordered) != len(files):
        raise DataError(
            f"holds {len(source.ordered):,} labels, but there are {len(files):,} images in {where}",
            where=source.where,
            hint="Its lines follow the order of all images: complete the images, "
            f"or give labels by name (FILE WNID per line in val.txt, or {_KAGGLE_FILE}).",
        )
    labels = {}
    for position, file in enumerate(sorted(files, key=os.fsencode)):
        number = _NUMBERED.fullmatch(_stem(file))
        if number is not None and int(number[1]) != position + 1:
            raise DataError(
                f"image {position + 1:,} in order is {file}: another one is missing, and labels would shift",
                where=where,
                hint=f"{source.where} gives labels in the order of all images: complete them, and remove other files.",
            )
        labels[file] = source.ordered[position]
    return [labels[file] for file in files]


def _find_synset_files(folders: Sequence[Path]) -> Iterator[_LabelFile]:
    for path in {
        path: None for folder in folders for pattern in _SYNSET_FILES for path in sorted(folder.glob(pattern))
    }:
        # Lines `FILE NUMBER` count classes in an unknown order.
        if path.is_file() and not all(len(words) == 2 and words[1].isdecimal() for _, words in _read_rows(path)):
            yield _read_synset_file(path)


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    return [(number, line.split()) for number, line in _read_lines(_read_content(path), str(path))]


def _read_synset_file(path: Path) -> _LabelFile:
    """Read lines that are all `WNID` or all `FILE WNID`."""
    file = _LabelFile(where=str(path))
    rows = _read_rows(path)
    for number, words in rows:
        if len(words) not in (1, 2) or len(words) != len(rows[0][1]):
            raise _line_error(str(path), number, " ".join(words), "lines are all WNID, or all FILE WNID")
        file.add(words[-1], number, words[0].rpartition("/")[2] if len(words) == 2 else None)
    return file


def _find_kaggle_files(folders: Sequence[Path]) -> Iterator[_LabelFile]:
    """Read lines `IMAGE,WNID x y x y WNID x y x y ...`: boxes of objects of one class."""
    for path in dict.fromkeys(folder / _KAGGLE_FILE for folder in folders):
        if not path.is_file():
            continue
        file = _LabelFile(where=str(path))
        for number, line in _read_lines(_read_content(path), str(path)):
            image, comma, boxes = line.partition(",")
            if number == 1 and image == "ImageId":
                continue
            wnids = {word for word in boxes.split() if not _NUMBER.fullmatch(word)}
            if not comma or len(wnids) != 1:
                raise _line_error(str(path), number, line, "a line is an image, a comma, and boxes of one class")
            file.add(wnids.pop(), number, image)
        yield file


def _find_devkits(folders: Sequence[Path]) -> Iterator[_LabelFile]:
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob(f"{_DEVKIT}*.t*")):
            if path.is_file():
                yield _read_packed_devkit(path)
        for data in (folder / "data", *sorted(folder.glob("*/data"))):
            if (data / _META).is_file() and (data / _TRUTH).is_file():
                yield _read_devkit(_read_content(data / _META), _read_content(data / _TRUTH), data)


def _read_packed_devkit(path: Path) -> _LabelFile:
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in (_META, _TRUTH) and member.size <= _MOST_BYTES and (file := archive.extractfile(member)):
                    contents[name] = file.read()
    except (tarfile.TarError, zlib.error, ValueError, LookupError, OSError, EOFError, RecursionError) as error:
        raise DataError(f"the devkit cannot be read: {error}", where=str(path), hint="Download it again.") from error
    missing = [name for name in (_META, _TRUTH) if name not in contents]
    if missing:
        raise DataError(
            f"holds no {' and no '.join(missing)}",
            where=str(path),
            hint=f"It should be {_DEVKIT}.tar.gz; download it again.",
        )
    return _read_devkit(contents[_META], contents[_TRUTH], path / "data")


def _read_devkit(meta: bytes, truth: bytes, folder: Path) -> _LabelFile:
    """Read the class number of each image in order, and from `meta` the class of each number."""
    classes = _read_meta(meta, str(folder / _META))
    file = _LabelFile(where=str(folder / _TRUTH))
    for line, number in _read_lines(truth, file.where):
        if not number.isdecimal() or int(number) not in classes:
            raise _line_error(file.where, line, number, f"it is not an ILSVRC2012_ID of {folder / _META}")
        file.add(classes[int(number)], line)
    return file


def _read_meta(content: bytes, where: str) -> dict[int, str]:
    """Return the WNID of each ILSVRC2012_ID."""
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])["synsets"])
        pairs = [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in synsets]
    except Exception as error:  # loadmat raises many kinds of errors on a damaged file
        raise DataError(
            f"holds no table of classes: {error or type(error).__name__}",
            where=where,
            hint="Download the devkit again.",
        ) from error
    classes = dict(pairs)
    if len(classes) != len(pairs) or not all(WNID.fullmatch(wnid) for wnid in classes.values()):
        raise DataError(
            "an ILSVRC2012_ID is not unique, or has no WNID", where=where, hint="Download the devkit again."
        )
    return classes


def _read_content(path: Path) -> bytes:
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


def _read_lines(content: bytes, where: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the stripped text of each line that is not empty."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text: {error}", where=where, hint="Download it again.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _stem(file: str) -> str:
    stem, dot, _ = file.rpartition(".")
    return stem if dot else file


def _line_error(where: str, line: int, text: str, why: str) -> DataError:
    return DataError(f"line {line}: {text!r}: {why}", where=where, hint="Correct the file, or download it again.")
