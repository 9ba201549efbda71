"""The classes of validation images that are distributed flat: synset file, Kaggle's CSV, devkit, or Tiny ImageNet's file."""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msn_eval.data.images import reading
from msn_eval.errors import DataError
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file

WNID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")
_COORDINATE = re.compile(r"-?\d*\.?\d+")
_SYNSET_FILES = ("*synset_labels*.txt", "val.txt")
TINY_LABELS = "val_annotations.txt"
_KAGGLE_FILE = "LOC_val_solution.csv"
_DEVKIT = "ILSVRC2012_devkit_t12"
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


class _Label(NamedTuple):
    """The class in one line of a file. `name` is the image's file without suffix, empty where lines follow their order."""

    name: str
    wnid: str
    line: int


_LabelFile = tuple[Path, list[_Label]]


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
    sources = [
        *_find_synset_files(folders),
        *_find_kaggle_files(folders),
        *_find_tiny_files(folders),
        *_find_devkits(folders),
    ]
    if not sources:
        raise DataError(
            f"holds {len(files):,} images without class folders, and no file with their classes was found",
            where=where,
            hint=f"Put {_DEVKIT}.tar.gz of the ImageNet site beside the images' folder or archive; or a synset file, one "
            "WNID per line in the order of the images (imagenet_2012_validation_synset_labels.txt); or Kaggle's "
            f"{_KAGGLE_FILE}. In a different data set, put the images of each class into a folder of its own.",
        )
    (path, labels), *others = [(path, _match(path, listed, files, where)) for path, listed in sources]
    for other_path, other_labels in others:
        pairs = zip(files, labels, other_labels, strict=True)
        different = [(file, label, other) for file, label, other in pairs if label.wnid != other.wnid]
        if different:
            file, label, other = different[0]
            raise DataError(
                f"has {label.wnid} in line {label.line} for {file}, where {other_path} has {other.wnid} "
                f"in line {other.line}; they differ on {len(different):,} of {len(files):,} images",
                where=str(path),
                hint="Remove the wrong one.",
            )
    found = {label.wnid for label in labels}
    classes = found if known is None else set(known)
    allow = "or pass --allow-class-mismatch to number the union of both" if found & classes else "or use their labels"
    for file, label in zip(files, labels, strict=True):
        if label.wnid not in classes:
            raise DataError(
                f"line {label.line}: {label.wnid}, the class of {file}, is not one of the {len(classes):,} training classes",
                where=str(path),
                hint=f"Complete the training images, {allow}.",
            )
    return [label.wnid for label in labels]


def _match(path: Path, labels: list[_Label], files: Sequence[str], where: str) -> list[_Label]:
    """Return the label of each image by one file."""
    if labels and labels[0].name:
        by_name = {label.name: label for label in labels}
        missing = [file for file in files if _stem(file) not in by_name]
        if missing:
            raise DataError(
                f"names no class for {len(missing):,} of the {len(files):,} images in {where}, {missing[0]} first",
                where=str(path),
                hint="Complete it, or remove the images that are not ImageNet's.",
            )
        return [by_name[_stem(file)] for file in files]
    if len(labels) != len(files):
        raise DataError(
            f"holds {len(labels):,} labels, but there are {len(files):,} images in {where}",
            where=str(path),
            hint="Its lines follow the order of all images: complete the images, "
            f"or give labels by name (FILE WNID per line in val.txt, or {_KAGGLE_FILE}).",
        )
    ordered = sorted(files, key=os.fsencode)
    for position, file in enumerate(ordered, 1):
        number = _NUMBERED.fullmatch(_stem(file))
        if number is not None and int(number[1]) != position:
            raise DataError(
                f"image {position:,} in order is {file}: another one is missing, and labels would shift",
                where=where,
                hint=f"{path} gives labels in the order of all images: complete them, and remove other files.",
            )
    by_file = dict(zip(ordered, labels, strict=True))
    return [by_file[file] for file in files]


def _find_synset_files(folders: Sequence[Path]) -> Iterator[_LabelFile]:
    """Read files whose lines are all `WNID` or all `FILE WNID`."""
    paths = [path for folder in folders for pattern in _SYNSET_FILES for path in sorted(folder.glob(pattern))]
    for path in filter(Path.is_file, dict.fromkeys(paths)):
        rows = [(number, line.split()) for number, line in _read_lines(_read_content(path), path)]
        if all(len(row) == 2 and row[1].isdecimal() for _, row in rows):
            continue  # lines `FILE NUMBER` count classes in an unknown order
        for number, row in rows:
            if len(row) not in (1, 2) or len(row) != len(rows[0][1]):
                raise _line_error(path, number, " ".join(row), "lines are all WNID, or all FILE WNID")
        yield path, _check_labels(path, [_Label(_stem("".join(row[:-1])), row[-1], number) for number, row in rows])


def _find_kaggle_files(folders: Sequence[Path]) -> Iterator[_LabelFile]:
    """Read lines `IMAGE,WNID x y x y WNID x y x y ...`: boxes of objects of one class."""
    for path in filter(Path.is_file, dict.fromkeys(folder / _KAGGLE_FILE for folder in folders)):
        labels = []
        for number, line in _read_lines(_read_content(path), path):
            image, _, boxes = line.partition(",")
            wnids = {item for item in boxes.split() if not _COORDINATE.fullmatch(item)}
            if len(wnids) != 1:
                raise _line_error(path, number, line, "a line is an image, a comma, and boxes of one class")
            if image != "ImageId":
                labels.append(_Label(_stem(image), wnids.pop(), number))
        yield path, _check_labels(path, labels)


def _find_tiny_files(folders: Sequence[Path]) -> Iterator[_LabelFile]:
    """Read lines `FILE WNID x y x y` of Tiny ImageNet."""
    for path in filter(Path.is_file, dict.fromkeys(folder / TINY_LABELS for folder in folders)):
        labels = []
        for number, line in _read_lines(_read_content(path), path):
            file, *rest = line.split("\t")
            if not rest:
                raise _line_error(path, number, line, "a line is an image, a tab, its class, and a box")
            labels.append(_Label(_stem(file), rest[0], number))
        yield path, _check_labels(path, labels)


def _find_devkits(folders: Sequence[Path]) -> Iterator[_LabelFile]:
    for folder in dict.fromkeys(folders):
        for path in filter(Path.is_file, sorted(folder.glob(f"{_DEVKIT}*.t*"))):
            yield _read_devkit(_unpack_devkit(path), path / "data")
        for data in (folder / "data", *sorted(folder.glob("*/data"))):
            if (data / _META).is_file() and (data / _TRUTH).is_file():
                yield _read_devkit({name: _read_content(data / name) for name in (_META, _TRUTH)}, data)


def _unpack_devkit(path: Path) -> dict[str, bytes]:
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in (_META, _TRUTH) and (file := archive.extractfile(member)):
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
    return contents


def _read_devkit(contents: dict[str, bytes], folder: Path) -> _LabelFile:
    """Read the class number of each image in order, and from `meta.mat` the class of each number."""
    path = folder / _TRUTH
    classes = _read_meta(contents[_META], folder / _META)
    labels = []
    for line, number in _read_lines(contents[_TRUTH], path):
        if not number.isdecimal() or int(number) not in classes:
            raise _line_error(path, line, number, f"it is not an ILSVRC2012_ID of {folder / _META}")
        labels.append(_Label("", classes[int(number)], line))
    return path, labels


def _read_meta(content: bytes, path: Path) -> dict[int, str]:
    """Return the WNID of each ILSVRC2012_ID."""
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])["synsets"])
        pairs = [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in synsets]
        classes = dict(pairs)
        if len(classes) != len(pairs) or not all(map(WNID.fullmatch, classes.values())):
            raise ValueError("an ILSVRC2012_ID is not unique, or has no WNID")
    except Exception as error:  # loadmat raises many kinds of errors on a damaged file
        raise DataError(
            f"holds no table of classes: {error or type(error).__name__}",
            where=str(path),
            hint="Download the devkit again.",
        ) from error
    return classes


def _read_content(path: Path) -> bytes:
    with reading(path):
        return read_regular_file(path, most_bytes=MOST_TEXT_BYTES)


def _read_lines(content: bytes, path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the stripped text of each line that is not empty."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text: {error}", where=str(path), hint="Download it again.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _check_labels(path: Path, labels: list[_Label]) -> list[_Label]:
    first: dict[str, _Label] = {}
    for label in labels:
        if not WNID.fullmatch(label.wnid):
            raise _line_error(path, label.line, label.wnid, "a class is an n and eight digits")
        if label.name and first.setdefault(label.name, label) is not label:
            raise _line_error(path, label.line, label.name, f"it is already in line {first[label.name].line}")
    return labels


def _stem(file: str) -> str:
    """Return the name of an image without its folders and suffix."""
    name = file.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def _line_error(path: Path, line: int, text: str, why: str) -> DataError:
    return DataError(f"line {line}: {text!r}: {why}", where=str(path), hint="Correct the file, or download it again.")
