"""StoredRows: one split of a Hugging Face data set as it lies in Arrow files; which columns hold images and classes."""

import contextlib
import errno
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from msn_eval.data.hf_splits import HubName, first_line
from msn_eval.data.images import Stamp, decode_image, file_stamp
from msn_eval.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

_log = logging.getLogger(__name__)

_BATCH_ROWS = 10_000  # of names and labels, read at once
SHOWN = 5
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_HEAD_BYTES = 16
_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"BM"), "bmp"),
)


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Images in the rows of one split's Arrow files; a row that holds no bytes names a file instead.

    place_of_rows: what the rows are rows of, for errors
    table:         the split, with its image column alone
    rows:          the row of each id
    root:          the first Arrow file; a split has its own
    state:         the stamps of all of its Arrow files, as one number, and the newest of their times
    """

    place_of_rows: str
    table: "datasets.Dataset" = field(repr=False)
    column: str
    rows: Mapping[str, int] = field(repr=False)
    folder: Path | None
    root: Path
    state: tuple[int, int]

    def read(self, image_id: str) -> bytes:
        content, file = self._cell(image_id)
        return file.read_bytes() if file is not None else content

    def decode(self, content: bytes) -> Image.Image:
        return decode_image(content)

    def place(self, image_id: str) -> str:
        row = f"{self.place_of_rows}, row {self.rows[image_id]}"
        with contextlib.suppress(OSError):  # a row that cannot be read has no other place
            file = self._cell(image_id)[1]
            return row if file is None else f"{row}: {file}"
        return row

    def stamp(self, image_id: str) -> Stamp:
        content, file = self._cell(image_id)
        whole, newest = self.state
        if file is None:
            return len(content), newest, newest, whole, self.rows[image_id]
        return file_stamp(file.stat())

    def _cell(self, image_id: str) -> tuple[bytes, Path | None]:
        """Give the bytes of an image, or the file that holds them. Raises OSError."""
        from pyarrow import ArrowException

        try:
            cell = self.table[self.rows[image_id]][self.column][0].as_py()
        except ArrowException as error:
            raise OSError(f"the Arrow files are damaged: {first_line(error)}") from error
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        return (content, None) if content is not None else (b"", _local_file(path, self.folder))


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """One split as it is stored: the name of its class for each row, and what the images' ids can be made from.

    paths: the stored path of each row's image, None where it has none
    """

    source: RowSource
    classes: Sequence[str]
    labels: Sequence[int]
    paths: Sequence[str | None]


def read_rows(where: HubName, split: str, table: "datasets.Dataset") -> StoredRows:
    """Read the labels and paths of one split; the images stay where they are."""
    place = f"{where}, split {split}"
    image, label = _image_column(place, table.features), _label_column(place, table.features)
    files = [Path(entry["filename"]) for entry in table.cache_files]
    if not files or not len(table):
        raise DataError("has no rows", where=place, hint="Complete the data set.")
    labels: list[object] = []
    paths: list[str | None] = []
    for batch in table.select_columns([image, label]).with_format("arrow").iter(batch_size=_BATCH_ROWS):
        labels += batch[label].to_pylist()
        paths += _batch_paths(place, batch[image], len(paths), where.folder)
    names, numbers = _number_labels(place, table.features[label], labels)
    source = RowSource(
        place_of_rows=place,
        table=table.select_columns([image]).with_format("arrow"),
        column=image,
        rows={},
        folder=where.folder,
        root=files[0],
        state=_state(files),
    )
    _log.info("%s: %s rows, images by column %r, classes by column %r", place, f"{len(paths):,}", image, label)
    return StoredRows(source=source, classes=names, labels=numbers, paths=paths)


def _state(files: Sequence[Path]) -> tuple[int, int]:
    whole = hashlib.sha256()
    newest = 0
    for file in files:
        status = file.stat()
        whole.update(os.fsencode(f"{file.name}\t{file_stamp(status)}\n"))
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
    return int.from_bytes(whole.digest()[:6], "big"), newest


def _image_column(place: str, features: "datasets.Features") -> str:
    """Find the column of images: by its kind, and where several or none are of it, by its name."""
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not images:  # Parquet files that other libraries wrote state no kinds
        images = [name for name in _IMAGE_COLUMNS if name in features and _holds_bytes(features[name])]
    return _choose_column(place, features, "images", images, _IMAGE_COLUMNS)


def _holds_bytes(kind: object) -> bool:
    import datasets

    if isinstance(kind, dict):
        return "bytes" in kind and _holds_bytes(kind["bytes"])
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _label_column(place: str, features: "datasets.Features") -> str:
    """Find the column of classes: by its kind, or a string or integer column of a well-known name."""
    import datasets

    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not labels:
        values = {name: kind.dtype for name, kind in features.items() if isinstance(kind, datasets.Value)}
        plain = re.compile("(large_)?string|u?int(8|16|32|64)")
        labels = [name for name in _LABEL_COLUMNS if plain.fullmatch(values.get(name, ""))]
    return _choose_column(place, features, "classes", labels, _LABEL_COLUMNS)


def _choose_column(
    place: str, features: "datasets.Features", what: str, found: Sequence[str], preferred: Sequence[str]
) -> str:
    best = found if len(found) == 1 else [name for name in preferred if name in found][:1]
    if best:
        return best[0]
    if found:
        raise DataError(
            f"has several columns of {what}: {', '.join(found)}",
            where=place,
            hint=f"Call the one that is meant {preferred[0]!r}, or drop the others.",
        )
    shown = ", ".join(f"{name} ({_kind_name(kind)})" for name, kind in features.items())
    raise DataError(
        f"has no column of {what} (columns: {shown or 'none'})",
        where=place,
        hint="A data set has one Image column, and a ClassLabel column or one called label of names or numbers.",
    )


def _kind_name(kind: object) -> str:
    return str(getattr(kind, "dtype", type(kind).__name__))


def _number_labels(place: str, kind: object, stored: Sequence[object]) -> tuple[Sequence[str], Sequence[int]]:
    """Give the names of the classes that occur, and the index of each row's among them."""
    import datasets

    known = list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    bad = [
        row
        for row, value in enumerate(stored)
        if value is None or (isinstance(value, int) and (value < 0 or (known is not None and value >= len(known))))
    ]
    if bad:
        values = ", ".join(map(str, list(dict.fromkeys(stored[row] for row in bad))[:SHOWN]))
        raise DataError(
            f"{len(bad):,} of {len(stored):,} rows have no class (labels {values}; first row {bad[0]})",
            where=place,
            hint="Test splits are often published without labels: take a data set with labelled validation images.",
        )
    found = list(dict.fromkeys(stored))
    number = {value: position for position, value in enumerate(found)}
    names = [known[value] if known is not None and isinstance(value, int) else str(value) for value in found]
    return names, [number[value] for value in stored]


def _batch_paths(place: str, column: "pyarrow.ChunkedArray", first: int, folder: Path | None) -> list[str | None]:
    """Give the stored paths of some rows, and make sure that each row has an image."""
    contents, paths = _contents(column), _stored_paths(column)
    found: list[str | None] = paths.to_pylist() if paths is not None else [None] * len(column)
    if contents.null_count:
        for row, (has_bytes, path) in enumerate(zip(contents.is_valid().to_pylist(), found, strict=True)):
            if not has_bytes:
                _check_file(f"{place}, row {first + row}", path, folder)
    return found


def _contents(column: "pyarrow.ChunkedArray") -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _stored_paths(column: "pyarrow.ChunkedArray") -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    is_struct = pa.types.is_struct(column.type)
    return pc.struct_field(column, "path") if is_struct and column.type.get_field_index("path") >= 0 else None


def _check_file(place: str, path: str | None, folder: Path | None) -> None:
    """Raise DataError for a row without bytes whose path cannot lead to a file; whether there is one, reading tells."""
    try:
        _local_file(path, folder, must_exist=False)
    except OSError as error:
        raise DataError(
            f"has no image: {error}", where=place, hint="Store the images' bytes, as `push_to_hub` and `embed` do."
        ) from error


def _local_file(path: str | None, folder: Path | None, *, must_exist: bool = True) -> Path:
    """Give the file that a row names; a relative path starts at the data set's folder. Raises OSError."""
    if not path:
        raise OSError("neither bytes nor a path are stored")
    if "://" in path:
        raise OSError(f"only an address is stored, {path}, and addresses are not followed")
    if folder is None and not Path(path).is_absolute():
        raise OSError(f"only the relative path {path} is stored")
    file = (folder or Path()) / path
    if must_exist and not file.is_file():  # nor a device, which might never end
        raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
    return file


def row_names(stored: StoredRows) -> list[str]:
    """Give each image the number of its row for a name, the ending by its first bytes. Raises DataError."""
    import pyarrow.compute as pc

    source = stored.source
    names: list[str] = []
    for batch in source.table.iter(batch_size=_BATCH_ROWS):
        for head in pc.binary_slice(_contents(batch[source.column]), 0, _HEAD_BYTES).to_pylist():
            start = _file_head(source, stored.paths[len(names)], len(names)) if head is None else head
            ending = next((ending for magic, ending in _MAGIC if magic.match(start)), "img")
            names.append(f"{len(names):08d}.{ending}")
    return names


def _file_head(source: RowSource, path: str | None, row: int) -> bytes:
    try:
        with _local_file(path, source.folder).open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}",
            where=f"{source.place_of_rows}, row {row}",
            hint="Put it back, or store the images' bytes instead of their paths.",
        ) from error
