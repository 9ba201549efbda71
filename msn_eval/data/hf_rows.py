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
from typing import TYPE_CHECKING

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
        file = None
        with contextlib.suppress(OSError):  # of a row that cannot be read
            _, file = self._cell(image_id)
        return f"{self.where}, row {self.rows[image_id]}" + (f": {file}" if file else "")

    def stamp(self, image_id: str) -> Stamp:
        content, file = self._cell(image_id)
        state, newest = self.state
        row = len(content), newest, newest, state, self.rows[image_id]
        return row if file is None else file_stamp(file.stat())

    def _cell(self, image_id: str) -> tuple[bytes, Path | None]:
        """Return the bytes of an image, or the file that holds them. Raises OSError."""
        from pyarrow import ArrowException

        try:
            content, path = self.table[self.rows[image_id]][self.column][0].as_py().values()
        except ArrowException as error:
            raise OSError(f"the Arrow files are damaged: {first_line(error)}") from error
        return (content, None) if content is not None else (b"", _local_file(path, self.folder))


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """One split as it is stored.

    Attributes:
        classes: Names of the classes that occur; `labels` has the index of each row's class.
        paths: Stored path of each row's image, None where it has none.
    """

    source: RowSource
    classes: Sequence[str]
    labels: Sequence[int]
    paths: Sequence[str | None]


def read_rows(name: HubName, split: str, table: "datasets.Dataset") -> StoredRows:
    """Read the labels and paths of one split; the images stay on the disk."""
    import datasets

    where = f"{name}, split {split}"
    image, label = _find_image_column(where, table.features), _find_label_column(where, table.features)
    files = [Path(entry["filename"]) for entry in table.cache_files]
    if not files or not len(table):
        raise DataError("No rows", where=where, hint="Complete the data set.")
    # Every cell becomes bytes and a path, whatever the column of other libraries holds.
    table = table.select_columns([image, label]).cast_column(image, datasets.Image(decode=False)).with_format("arrow")
    labels: list[object] = []
    paths: list[str | None] = []
    for batch in table.iter(batch_size=_BATCH_ROWS):
        labels += batch[label].to_pylist()
        paths += _read_paths(where, batch[image], len(paths), name.folder)
    classes, indices = _index_labels(where, table.features[label], labels)
    stamps = [(file.name, file_stamp(file.stat())) for file in files]
    digest = hashlib.sha256(b"".join(os.fsencode(f"{file}\t{stamp}\n") for file, stamp in stamps)).digest()
    source = RowSource(
        where=where,
        table=table.select_columns([image]),
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
        contents = {name: kind.get("bytes") if isinstance(kind, dict) else kind for name, kind in features.items()}
        binary = ("binary", "large_binary")
        images = [name for name in _IMAGE_COLUMNS if getattr(contents.get(name), "dtype", None) in binary]
    return _choose_column(where, features, "images", images, _IMAGE_COLUMNS)


def _find_label_column(where: str, features: "datasets.Features") -> str:
    import datasets

    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels:
        plain = re.compile("(large_)?string|u?int(8|16|32|64)")
        labels = [name for name in _LABEL_COLUMNS if plain.fullmatch(getattr(features.get(name), "dtype", ""))]
    return _choose_column(where, features, "classes", labels, _LABEL_COLUMNS)


def _choose_column(
    where: str, features: "datasets.Features", what: str, columns: Sequence[str], preferred: Sequence[str]
) -> str:
    best = columns if len(columns) == 1 else [name for name in preferred if name in columns]
    if best:
        return best[0]
    shown = [f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items()]
    raise DataError(
        f"{'Several columns' if columns else 'No column'} of {what} (columns: {', '.join(shown) or 'none'})",
        where=where,
        hint=f"Name the right one {preferred[0]!r}: an Image column for images, a ClassLabel, names or numbers for classes.",
    )


def _index_labels(where: str, feature: object, stored: Sequence[object]) -> tuple[Sequence[str], Sequence[int]]:
    """Return the names of the classes that occur, and the index of each row's class among them."""
    import datasets

    known = dict(enumerate(feature.names)) if isinstance(feature, datasets.ClassLabel) else None
    index = {value: number for number, value in enumerate(dict.fromkeys(stored))}
    bad = [
        value
        for value in index
        if value is None or (value not in known if known is not None else isinstance(value, int) and value < 0)
    ]
    if bad:
        rows = [row for row, value in enumerate(stored) if value in bad]
        shown = ", ".join(map(str, bad))
        raise DataError(
            f"{len(rows):,} of {len(stored):,} rows have no class (labels {shown:.60}; first row {rows[0]})",
            where=where,
            hint="Test splits are often published without labels: use a data set with labelled validation images.",
        )
    return [str(known[value] if known is not None else value) for value in index], [index[value] for value in stored]


def _read_paths(where: str, column: "pyarrow.ChunkedArray", first: int, folder: Path | None) -> list[str | None]:
    """Return the stored paths of a batch of rows. Raises DataError for a row without bytes that names no local file."""
    import pyarrow.compute as pc

    paths: list[str | None] = pc.struct_field(column, "path").to_pylist()
    for row in pc.indices_nonzero(pc.struct_field(column, "bytes").is_null()).to_pylist():
        try:
            _local_file(paths[row], folder, must_exist=False)
        except OSError as error:
            hint = "Store the images' bytes, as `push_to_hub` and `embed` do."
            raise DataError(f"No image: {error}", where=f"{where}, row {first + row}", hint=hint) from error
    return paths


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
    """Name each image by the number of its row, with a suffix by its first bytes."""
    import pyarrow.compute as pc

    source = stored.source
    names: list[str] = []
    for batch in source.table.iter(batch_size=_BATCH_ROWS):
        for head in pc.binary_slice(pc.struct_field(batch[source.column], "bytes"), 0, _HEAD_BYTES).to_pylist():
            if head is None:
                with contextlib.suppress(OSError):
                    head = _local_file(stored.paths[len(names)], source.folder).read_bytes()[:_HEAD_BYTES]
            suffix = next((suffix for suffix, magic in _MAGIC.items() if magic.match(head or b"")), "img")
            names.append(f"{len(names):08d}.{suffix}")
    return names
