"""CSV files that list images: the columns image, label and split, with paths relative to the folder of the file."""

import csv
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from msn_eval.data.dataset import VAL_NAMES, DatasetListing, Listing, LoadOptions
from msn_eval.data.images import Stamp, decode_image, file_stamp, name_in_class, reading
from msn_eval.errors import DataError, format_count
from msn_eval.files.atomic import write_atomically
from msn_eval.files.regular import read_regular_file

_log = logging.getLogger(__name__)
_COLUMNS = ("image", "label", "split")
_MOST_BYTES = 1 << 30  # ten times what ImageNet needs
_CLASS = re.compile("(?!\\.{1,2}$)[^/\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # one folder of an id, one line of a class map
_HINT = "The first line is `image,label,split`; each further line is the path of an image, its class, and train or val."


@dataclass(frozen=True, kw_only=True)
class CsvSource:
    """Image files that the lines of a CSV file name.

    Attributes:
        table: The CSV file.
        split: The split of the images.
        rows: By id, the line and the path.
    """

    table: Path
    split: str
    rows: Mapping[str, tuple[int, str]] = field(repr=False)

    @property
    def root(self) -> Path:
        return self.table / self.split  # both splits are in one file, and each has a cache of its own

    def read(self, image_id: str) -> bytes:
        return read_regular_file(self._path(image_id))

    def decode(self, content: bytes) -> Image.Image:
        return decode_image(content)

    def place(self, image_id: str) -> str:
        line, path = self.rows[image_id]
        return f"{self.table}, line {line}: {path}"

    def stamp(self, image_id: str) -> Stamp:
        return file_stamp(self._path(image_id).stat())

    def _path(self, image_id: str) -> Path:
        return self.table.parent / self.rows[image_id][1]


def list_csv(place: str, options: LoadOptions) -> DatasetListing:
    """List the images of a CSV file. An image's FILE is its path below the folder of its class, else its file name.

    The rows of val have the split `val`, `valid`, `validation` or `test`; of several, the first of these counts.

    Raises:
        DataError: Naming the line at fault.
    """
    table = Path(place)
    rows_by_split: dict[str, dict[str, tuple[int, str]]] = {}
    lines: dict[str, int] = {}  # by path
    for line, path, label, split in _read_rows(table):
        if split not in ("train", *VAL_NAMES):
            raise _line_error(table, line, f"the split {split!r} is none of train, {', '.join(VAL_NAMES)}")
        if not _CLASS.fullmatch(label):
            raise _line_error(table, line, f"{label!r} is not the name of a class")
        if not path or "\0" in path:
            raise _line_error(table, line, f"{path!r} is not the path of an image")
        if lines.setdefault(path, line) != line:
            raise _line_error(table, line, f"{path} is already in line {lines[path]}")
        rows, image_id = rows_by_split.setdefault(split, {}), f"{label}/{name_in_class(path, label)}"
        if image_id in rows:
            raise _line_error(table, line, f"the id {image_id} is already that of line {rows[image_id][0]}")
        rows[image_id] = line, path
    val = next((name for name in VAL_NAMES if name in rows_by_split), "val")
    if val != "val" or len(rows_by_split.keys() - {"train"}) > 1:
        _log.info("%s: validation images are the rows of the split %s", table, val)
    splits = {}
    for split in options.splits:
        rows = rows_by_split.get("train" if split == "train" else val, {})
        if not rows:
            raise DataError(f"has no rows of the split {split}", where=str(table), hint=_HINT)
        files: dict[str, list[str]] = {}
        for image_id in rows:
            label, _, file = image_id.partition("/")
            files.setdefault(label, []).append(file)
        splits[split] = Listing(files=files, source=CsvSource(table=table, split=split, rows=rows))
    return DatasetListing(name=table.stem if val == "val" else f"{table.stem} ({val})", splits=splits)


def write_csv(table: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write the path, class and split of images as a CSV file that `list_csv` reads. Raises StoreError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(rows)
    write_atomically(table, os.fsencode(text.getvalue()))


def _read_rows(table: Path) -> Iterator[tuple[int, str, str, str]]:
    """Yield the line, path, class and split of each row. A byte-order mark, CRLF, quotes and empty lines are allowed."""
    with reading(table, hint=f"Check the path. {_HINT}"):
        text = (
            read_regular_file(table, most_bytes=_MOST_BYTES)
            .removeprefix(b"\xef\xbb\xbf")
            .decode("utf-8", "surrogateescape")
        )
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[int] = []
    n_fields, end = 0, 0
    try:
        for row in reader:
            line, end = end + 1, reader.line_num
            if not any(text.strip() for text in row):
                continue
            if not columns:
                columns, n_fields = _find_columns(table, line, [name.strip() for name in row]), len(row)
                continue
            if len(row) != n_fields:
                fields = format_count(len(row), "field")
                raise _line_error(table, line, f"{fields} instead of {n_fields}; a path with a comma needs quotes")
            image, label, split = (row[column] for column in columns)
            yield line, image, label, split.strip()
    except csv.Error as error:
        raise _line_error(table, reader.line_num, str(error)) from error
    if not columns:
        raise DataError("is empty", where=str(table), hint=_HINT)


def _find_columns(table: Path, line: int, header: list[str]) -> list[int]:
    names = [name.lower() for name in header]
    for name in _COLUMNS:
        if names.count(name) != 1:
            shown = ", ".join(header)
            raise _line_error(
                table, line, f"{'two columns are' if name in names else 'no column is'} called {name} ({shown})"
            )
    return [names.index(name) for name in _COLUMNS]


def _line_error(table: Path, line: int, why: str) -> DataError:
    return DataError(f"line {line}: {why}", where=str(table), hint=_HINT)
