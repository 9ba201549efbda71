"""Data sets of the Hugging Face hub, and folders that its `datasets` library reads: rows of images and labels.

The library writes what it loads to Arrow files in its cache, which are memory-mapped: images are read row by row, as the
bytes that were stored. No code of a data set is ever run.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from msn_eval.data.dataset import DatasetListing, Listing, LoadOptions
from msn_eval.data.hf_splits import HubName, load_splits, parse_name
from msn_eval.data.images import Stamp, decode_image, file_stamp, name_in_class
from msn_eval.errors import DataError, format_count
from msn_eval.files.hf_hub import first_line
from msn_eval.files.regular import read_regular_file

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)

# A class is one folder name in an id, and one line of a class map.
_FORBIDDEN = re.compile("[/\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UNUSABLE = re.compile(r"(?:^|/)\.{0,2}\Z|" + _FORBIDDEN.pattern.replace("/", ""))  # path below a class
_BATCH_ROWS = 10_000  # of names and labels, read at once
_HEAD_BYTES = 16
_MAGIC = {
    "jpg": re.compile(rb"\xff\xd8\xff"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
    "bmp": re.compile(rb"BM"),
    "tif": re.compile(rb"II\*\0|MM\0\*"),
}


def list_hub(place: str, options: LoadOptions) -> DatasetListing:
    """List the data set `OWNER/NAME[:CONFIG][@REVISION]` of the hub, or a local folder `DIR[:CONFIG]`.

    A folder holds Parquet files (`train-*.parquet`, `validation-*.parquet`), what `save_to_disk` wrote, or anything else
    that `load_dataset` reads. Validation images are those of the split `validation`, else `val`, else `test`.

    An image's id is `CLASS/FILE`. FILE is the last part of its stored path, with the folders below that of its class, if
    every row of the split has one and no two of a class are the same; otherwise, for the entire split, its row, such as
    `00000012.png`, with the suffix by its first bytes. In class names `/` and control characters become `_`. Integers
    without names are classes named by their decimals.
    Raises DataError with the split, column or rows at fault, and StoreError where the library's cache cannot be written.
    """
    hub_name = parse_name(place)
    tables = load_splits(hub_name, options.splits)
    stored = {wanted: _read_rows(hub_name, split, table) for wanted, (split, table) in tables.items()}
    names = _name_classes(hub_name, [name for _, classes, _, _ in stored.values() for name in classes])
    splits = {}
    for split, (source, classes, labels, files) in stored.items():
        listed: dict[str, list[str]] = {names[name]: [] for name in classes}
        row_of_id: dict[str, int] = {}
        for row, (label, file) in enumerate(zip(labels, files, strict=True)):
            name = names[classes[label]]
            listed[name].append(file)
            row_of_id[f"{name}/{file}"] = row
        splits[split] = Listing(files=listed, source=replace(source, rows=row_of_id))
    folder, config = hub_name.folder, f":{hub_name.config}" if hub_name.config else ""
    return DatasetListing(name=hub_name.text if folder is None else f"{folder.name}{config}", splits=splits)


def _name_classes(hub_name: HubName, stored: Sequence[str]) -> dict[str, str]:
    """Return the name of each class in ids: one part of a path, on one line. Raises DataError where two become one."""
    names = {name: _FORBIDDEN.sub("_", name) for name in stored}
    names |= {name: "_" * max(1, len(name)) for name in names if name in ("", ".", "..")}
    counts = Counter(names.values())
    merged = [name for name, safe in names.items() if counts[safe] > 1]
    if merged:
        what = f"Classes {', '.join(map(repr, merged[:5]))} would have the same name {names[merged[0]]!r} in ids"
        raise DataError(what, where=str(hub_name), hint="Rename one of them.")
    return names


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Images in the rows of one split's Arrow files; a row without bytes names a file."""

    where: str  # the data set and split, for errors
    table: "datasets.Dataset" = field(repr=False)  # the split, with its image column alone
    column: str
    rows: Mapping[str, int] = field(repr=False)  # by id
    folder: Path | None  # the data set's, where relative paths start; None on the hub
    root: Path  # the first Arrow file; each split has its own
    state: tuple[int, int]  # the stamps of all Arrow files, as one number, and the newest of their times

    def read(self, image_id: str) -> bytes:
        content, file = self._cell(image_id)
        return read_regular_file(file) if file is not None else content

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


def _read_rows(
    name: HubName, split: str, table: "datasets.Dataset"
) -> tuple[RowSource, Sequence[str], Sequence[int], Sequence[str]]:
    """Read one split; the images stay on the disk.

    Returns the source, without the rows of ids yet; the names of the classes that occur; the index of each row's class; and
    a file name for each row, unique within its class: the last part of its path, where every row has one, or its number.
    """
    import datasets
    import pyarrow.compute as pc

    where = f"{name}, split {split}"
    image = _find_column(where, table.features, "images", datasets.Image, ("image", "img"), "(large_)?binary")
    usual, dtypes = ("label", "labels", "fine_label", "class"), "(large_)?string|u?int(8|16|32|64)"
    label = _find_column(where, table.features, "classes", datasets.ClassLabel, usual, dtypes)
    arrow_files = [Path(entry["filename"]) for entry in table.cache_files]
    if not arrow_files or not len(table):
        raise DataError("No rows", where=where, hint="Complete the data set.")
    # Every cell becomes bytes and a path, whatever the column of other libraries holds.
    table = table.select_columns([image, label]).cast_column(image, datasets.Image(decode=False)).with_format("arrow")
    labels: list[object] = []
    paths: list[str | None] = []
    for batch in table.iter(batch_size=_BATCH_ROWS):
        labels += batch[label].to_pylist()
        paths += pc.struct_field(batch[image], "path").to_pylist()
    classes, indices = _index_labels(where, table.features[label], labels)
    stamps = [(file.name, file_stamp(file.stat())) for file in arrow_files]
    digest = hashlib.sha256(b"".join(os.fsencode(f"{file}\t{stamp}\n") for file, stamp in stamps)).digest()
    source = RowSource(
        where=where,
        table=table.select_columns([image]),
        column=image,
        rows={},
        folder=name.folder,
        root=arrow_files[0],
        state=(int.from_bytes(digest[:6], "big"), max(max(stamp[1:3]) for _, stamp in stamps)),
    )
    rows = format_count(len(paths), "row")
    _log.info("%s: %s, images in column %r, classes in column %r", where, rows, image, label)
    # In an archive, the path of an image is a/b.jpg::c.zip.
    cells = zip(((path or "").partition("::")[0] for path in paths), indices, strict=True)
    files = [name_in_class(path, classes[index]) for path, index in cells]
    if any(map(_UNUSABLE.search, files)) or len(set(zip(indices, files, strict=True))) < len(files):
        _log.info("%s: images are named by their rows", where)
        files = _name_by_rows(source, paths)
    return source, classes, indices, files


def _find_column(
    where: str, features: "datasets.Features", what: str, kind: type, usual: Sequence[str], dtypes: str
) -> str:
    """Return the column of a kind; in Parquet files of other libraries, which state none, one of a usual name and dtype."""

    def dtype_of(name: str) -> str:
        feature = features.get(name)
        return str(getattr(feature.get("bytes") if isinstance(feature, dict) else feature, "dtype", ""))

    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    columns = columns or [name for name in usual if re.fullmatch(dtypes, dtype_of(name))]
    best = columns if len(columns) == 1 else [name for name in usual if name in columns]
    if best:
        return best[0]
    shown = ", ".join(f"{name} ({dtype_of(name)})" for name in features)
    problem = f"{'Several columns' if columns else 'No column'} of {what} (columns: {shown})"
    hint = f"Name the right one {usual[0]!r}: an Image column for images; names, numbers or a ClassLabel for classes."
    raise DataError(problem, where=where, hint=hint)


def _index_labels(where: str, feature: object, stored: Sequence[object]) -> tuple[Sequence[str], Sequence[int]]:
    """Return the names of the classes that occur, and the index of each row's class among them."""
    import datasets

    index = {value: number for number, value in enumerate(dict.fromkeys(stored))}
    known: dict[object, str] = {value: str(value) for value in index if not isinstance(value, int) or value >= 0}
    if isinstance(feature, datasets.ClassLabel):
        known = dict(enumerate(feature.names))
    bad = [value for value in index if value is None or value not in known]
    if bad:
        rows = [row for row, value in enumerate(stored) if value in bad]
        labels = f"labels {', '.join(map(str, bad)):.60}; first row {rows[0]}"
        hint = "Test splits are often published without labels: use a data set with labelled validation images."
        what = f"no class for {len(rows):,} of {format_count(len(stored), 'row')} ({labels})"
        raise DataError(what, where=where, hint=hint)
    return [known[value] for value in index], [index[value] for value in stored]


def _local_file(path: str | None, folder: Path | None) -> Path:
    """Return the file that a row names; a relative path starts at the data set's folder. Raises OSError."""
    if not path:
        raise OSError("neither bytes nor a path are stored")
    if "://" in path:
        raise OSError(f"only an address is stored, {path}, and addresses are not followed")
    if folder is None and not Path(path).is_absolute():
        raise OSError(f"only the relative path {path} is stored")
    file = (folder or Path()) / path
    if not file.is_file():  # reading a pipe or device might never end
        raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
    return file


def _name_by_rows(source: RowSource, paths: Sequence[str | None]) -> list[str]:
    """Name each image by the number of its row, with a suffix by its first bytes."""
    import pyarrow.compute as pc

    names: list[str] = []
    for batch in source.table.iter(batch_size=_BATCH_ROWS):
        for head in pc.binary_slice(pc.struct_field(batch[source.column], "bytes"), 0, _HEAD_BYTES).to_pylist():
            path = paths[len(names)]
            if head is None:
                with contextlib.suppress(OSError), _local_file(path, source.folder).open("rb") as file:
                    head = file.read(_HEAD_BYTES)
            suffix = next((suffix for suffix, magic in _MAGIC.items() if magic.match(head or b"")), "img")
            names.append(f"{len(names):08d}.{suffix}")
    return names
