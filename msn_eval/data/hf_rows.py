"""One split of a Hugging Face data set in its Arrow files: which columns hold images and classes, and the rows of images."""

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

from msn_eval.data.hf_splits import HubName
from msn_eval.data.images import Stamp, decode_image, file_stamp
from msn_eval.errors import DataError
from msn_eval.files.hf_hub import first_line

if TYPE_CHECKING:
    import datasets
    import pyarrow

_log = logging.getLogger(__name__)

_BATCH_ROWS = 10_000  # of names and labels, read at once
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_HEAD_BYTES = 16
_MAGIC = {
    "jpg": re.compile(rb"\xff\xd8\xff"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
    "bmp": re.compile(rb"BM"),
}


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Images in the rows of one split's Arrow files; a row without bytes names a file.

    Attributes:
        where: The data set and split, for errors.
        table: The split, with its image column alone.
        rows: The row of each id.
        folder: The data set's folder, where relative paths start; None on the hub.
        root: The first Arrow file; each split has its own.
        state: The stamps of all Arrow files, as one number, and the newest of their times.
    """

    where: str
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
        row = f"{self.where}, row {self.rows[image_id]}"
        with contextlib.suppress(OSError):  # of a row that cannot be read
            file = self._cell(image_id)[1]
            return row if file is None else f"{row}: {file}"
        return row

    def stamp(self, image_id: str) -> Stamp:
        content, file = self._cell(image_id)
        state, newest = self.state
        if file is None:
            return len(content), newest, newest, state, self.rows[image_id]
        return file_stamp(file.stat())

    def _cell(self, image_id: str) -> tuple[bytes, Path | None]:
        """Return the bytes of an image, or the file that holds them. Raises OSError."""
        from pyarrow import ArrowException

        try:
            cell = self.table[self.rows[image_id]][self.column][0].as_py()
        except ArrowException as error:
            raise OSError(f"the Arrow files are damaged: {first_line(error)}") from error
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        return (content, None) if content is not None else (b"", _local_file(path, self.folder))


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """One split as it is stored.

    Attributes:
        classes: Names of the classes that occur.
        labels: Index of each row's class.
        paths: Stored path of each row's image, None where it has none.
    """

    source: RowSource
    classes: Sequence[str]
    labels: Sequence[int]
    paths: Sequence[str | None]


def read_rows(name: HubName, split: str, table: "datasets.Dataset") -> StoredRows:
    """Read the labels and paths of one split; the images stay on the disk."""
    where = f"{name}, split {split}"
    image, label = _find_image_column(where, table.features), _find_label_column(where, table.features)
    files = [Path(entry["filename"]) for entry in table.cache_files]
    if not files or not len(table):
        raise DataError("No rows", where=where, hint="Complete the data set.")
    labels: list[object] = []
    paths: list[str | None] = []
    for batch in table.select_columns([image, label]).with_format("arrow").iter(batch_size=_BATCH_ROWS):
        labels += batch[label].to_pylist()
        paths += _read_paths(where, batch[image], len(paths), name.folder)
    classes, indices = _index_labels(where, table.features[label], labels)
    stamps = [(file.name, file_stamp(file.stat())) for file in files]
    digest = hashlib.sha256(b"".join(os.fsencode(f"{file}\t{stamp}\n") for file, stamp in stamps)).digest()
    source = RowSource(
        where=where,
        table=table.select_columns([image]).with_format("arrow"),
        column=image,
        rows={},
        folder=name.folder,
        root=files[0],
        state=(int.from_bytes(digest[:6], "big"), max(max(stamp[1:3]) for _, stamp in stamps)),
    )
    _log.info("%s: %s rows, images in column %r, classes in column %r", where, f"{len(paths):,}", image, label)
    return StoredRows(source=source, classes=classes, labels=indices, paths=paths)


def _find_image_column(where: str, features: "datasets.Features") -> str:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:  # Parquet files that other libraries wrote state no features
        images = [name for name in _IMAGE_COLUMNS if name in features and _holds_bytes(features[name])]
    return _choose_column(where, features, "images", images, _IMAGE_COLUMNS)


def _holds_bytes(feature: object) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _find_label_column(where: str, features: "datasets.Features") -> str:
    import datasets

    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels:
        plain = re.compile("(large_)?string|u?int(8|16|32|64)")
        values = {name: feature.dtype for name, feature in features.items() if isinstance(feature, datasets.Value)}
        labels = [name for name in _LABEL_COLUMNS if plain.fullmatch(values.get(name, ""))]
    return _choose_column(where, features, "classes", labels, _LABEL_COLUMNS)


def _choose_column(
    where: str, features: "datasets.Features", what: str, columns: Sequence[str], preferred: Sequence[str]
) -> str:
    best = columns if len(columns) == 1 else [name for name in preferred if name in columns]
    if best:
        return best[0]
    if columns:
        raise DataError(
            f"Several columns of {what}: {', '.join(columns)}",
            where=where,
            hint=f"Rename the right one to {preferred[0]!r}, or drop the others.",
        )
    shown = [f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items()]
    raise DataError(
        f"No column of {what} (columns: {', '.join(shown) or 'none'})",
        where=where,
        hint="A data set has one Image column, and a ClassLabel column or one called label of names or numbers.",
    )


def _index_labels(where: str, feature: object, stored: Sequence[object]) -> tuple[Sequence[str], Sequence[int]]:
    """Return the names of the classes that occur, and the index of each row's class among them."""
    import datasets

    known = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    values = list(dict.fromkeys(stored))
    bad = {
        value
        for value in values
        if value is None or (isinstance(value, int) and (value < 0 or (known is not None and value >= len(known))))
    }
    if bad:
        rows = [row for row, value in enumerate(stored) if value in bad]
        shown = ", ".join(str(value) for value in values if value in bad)
        raise DataError(
            f"{len(rows):,} of {len(stored):,} rows have no class (labels {shown:.60}; first row {rows[0]})",
            where=where,
            hint="Test splits are often published without labels: use a data set with labelled validation images.",
        )
    index = {value: position for position, value in enumerate(values)}
    names = [known[value] if known is not None and isinstance(value, int) else str(value) for value in values]
    return names, [index[value] for value in stored]


def _read_paths(where: str, column: "pyarrow.ChunkedArray", first: int, folder: Path | None) -> list[str | None]:
    """Return the stored paths of a batch of rows. Raises DataError for a row without bytes that names no local file."""
    import pyarrow.compute as pc

    contents = _contents(column)
    has_paths = contents is not column and column.type.get_field_index("path") >= 0
    paths: list[str | None] = pc.struct_field(column, "path").to_pylist() if has_paths else [None] * len(column)
    if contents.null_count:
        for row, (has_bytes, path) in enumerate(zip(contents.is_valid().to_pylist(), paths, strict=True), start=first):
            try:
                if not has_bytes:
                    _local_file(path, folder, must_exist=False)
            except OSError as error:
                hint = "Store the images' bytes, as `push_to_hub` and `embed` do."
                raise DataError(f"No image: {error}", where=f"{where}, row {row}", hint=hint) from error
    return paths


def _contents(column: "pyarrow.ChunkedArray") -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _local_file(path: str | None, folder: Path | None, *, must_exist: bool = True) -> Path:
    """Return the file that a row names; a relative path starts at the data set's folder. Raises OSError."""
    if not path:
        raise OSError("neither bytes nor a path are stored")
    if "://" in path:
        raise OSError(f"only an address is stored, {path}, and addresses are not followed")
    if folder is None and not Path(path).is_absolute():
        raise OSError(f"only the relative path {path} is stored")
    file = (folder or Path()) / path
    if must_exist and not file.is_file():  # reading a pipe or device might never end
        raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
    return file


def name_by_rows(stored: StoredRows) -> list[str]:
    """Name each image by the number of its row, with a suffix by its first bytes. Raises DataError."""
    import pyarrow.compute as pc

    source = stored.source
    names: list[str] = []
    for batch in source.table.iter(batch_size=_BATCH_ROWS):
        for head in pc.binary_slice(_contents(batch[source.column]), 0, _HEAD_BYTES).to_pylist():
            start = _read_head(source, stored.paths[len(names)], len(names)) if head is None else head
            suffix = next((suffix for suffix, magic in _MAGIC.items() if magic.match(start)), "img")
            names.append(f"{len(names):08d}.{suffix}")
    return names


def _read_head(source: RowSource, path: str | None, row: int) -> bytes:
    try:
        with _local_file(path, source.folder).open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}",
            where=f"{source.where}, row {row}",
            hint="Put it back, or store the images' bytes instead of their paths.",
        ) from error
