"""Data sets of the Hugging Face hub, and folders that its `datasets` library understands: rows of images and labels.

The library turns what it loads into Arrow files of its cache, which are mapped into memory: images are read row by row, as
the bytes that were stored. Nothing of a data set is ever run.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from msn_eval.datasets.dataset import DataSet
from msn_eval.datasets.listing import Listing, make_dataset, make_split
from msn_eval.errors import CheckpointError, DataError, MsnEvalError, StoreError, UsageError
from msn_eval.images import ImageSet, Stamp, decode_image, file_stamp
from msn_eval.weights.hub_library import UnreachableError, ask_hub
from msn_eval.weights.msn_release import offline_variable

if TYPE_CHECKING:
    import datasets
    import pyarrow

    _Table = tuple[str, datasets.Dataset]  # a split by the data set's own name for it

_log = logging.getLogger(__name__)
_ANSWER_SECONDS = 10.0
_BARS_VARIABLE = "HF_DATASETS_DISABLE_PROGRESS_BARS"  # goes before what a program says
_BATCH_ROWS = 10_000  # of names and labels, read at once
_SHOWN = 5
_CONFIG_AND_REVISION = r"(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
_ON_THE_HUB = re.compile(rf"(?P<place>[\w.-]+/[\w.-]+){_CONFIG_AND_REVISION}", re.ASCII)
_IN_A_FOLDER = re.compile(r"(?P<place>.+):(?P<config>[\w.+-]+)", re.ASCII)
_SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}  # in the order of preference
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
# A class is one folder's name in an id, and one line of a class map.
_UNFIT = re.compile("[/\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_HEAD_BYTES = 16
_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"BM"), "bmp"),
)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR}
_WEB_CLIENTS = ("httpx", "requests", "urllib3", "aiohttp", "huggingface_hub", "fsspec")


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
            raise OSError(f"the Arrow files are damaged: {_first_line(error)}") from error
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        return (content, None) if content is not None else (b"", _local_file(path, self.folder))


@dataclass(frozen=True, kw_only=True)
class _Name:
    """What stands behind `hf:`, taken apart. `folder` is None for a data set of the hub."""

    text: str
    place: str
    config: str | None
    revision: str | None
    folder: Path | None

    def __str__(self) -> str:
        return f"hf:{self.text}"

    @property
    def short(self) -> str:
        if self.folder is None:
            return self.text
        return f"{self.folder.name}:{self.config}" if self.config else self.folder.name


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """One split as it is stored: the name of its class for each row, and what the images' ids can be made from.

    paths: the stored path of each row's image, None where it has none
    """

    source: RowSource
    classes: Sequence[str]
    labels: Sequence[int]
    paths: Sequence[str | None]


def read_hub(name: str, *, allow_class_mismatch: bool) -> DataSet:
    """Read the data set `OWNER/NAME[:CONFIG][@REVISION]` of the hub, or a local folder `DIR[:CONFIG]`.

    A folder holds Parquet files (`train-*.parquet`, `validation-*.parquet`), what `save_to_disk` wrote, or anything else
    that `load_dataset` reads. Validation images are those of the split `validation`, else `val`, else `test`.

    An image's id is `CLASS/FILE`. FILE is the last part of its stored path, if every row of the split has one and no two of
    a class are the same; otherwise, for the whole split, its row, such as `00000012.png`, the ending by its first bytes.
    In class names `/` and control characters become `_`. Integers without names are classes called by their decimals.
    Raises DataError naming split, column or rows at fault, StoreError where the library's cache cannot be written.
    """
    where = _parse_name(name)
    loaded = _load_splits(where, ("train", "val"))
    stored = {wanted: _read_rows(where, split, table) for wanted, (split, table) in loaded.items()}
    names = _class_names(where, [one for rows in stored.values() for one in rows.classes])
    return make_dataset(
        where.short,
        where=str(where),
        train=_list_rows(stored["train"], names),
        val=_list_rows(stored["val"], names),
        allow_class_mismatch=allow_class_mismatch,
    )


def read_hub_split(name: str, split: str) -> ImageSet:
    """Read the `train` or `val` images alone, with their own classes; for extraction, which compares nothing."""
    where = _parse_name(name)
    rows = _read_rows(where, *_load_splits(where, (split,))[split])
    return make_split(_list_rows(rows, _class_names(where, rows.classes)))


def _parse_name(text: str) -> _Name:
    """Take a name apart; a folder that exists goes before the hub's name of the same spelling."""
    for place, config in ((text, None), *((found["place"], found["config"]) for found in _matches(_IN_A_FOLDER, text))):
        folder = os.path.expanduser(place)  # noqa: PTH111 - Path knows no folder of a name too long for the disk
        if os.path.isdir(folder):  # noqa: PTH112
            return _Name(text=text, place=place, config=config, revision=None, folder=Path(folder).resolve())
    for found in _matches(_ON_THE_HUB, text):
        if ".." not in text and not text.startswith("."):
            return _Name(text=text, folder=None, **found.groupdict())
    raise DataError(
        "is neither a folder that exists nor OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME@REVISION on the hub",
        where=f"hf:{text}",
        remedy="Write for example hf:uoft-cs/cifar10, or the path of a folder with train-*.parquet and "
        "validation-*.parquet. An image folder is given by its path, without hf:.",
    )


def _matches(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    found = pattern.fullmatch(text)
    return [] if found is None else [found]


def _load_splits(where: _Name, wanted: Sequence[str]) -> "dict[str, _Table]":
    """Load the wanted splits, `train` or `val`, mapped into memory from the disk."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"data sets called hf: need the `datasets` library ({error})",
            where=str(where),
            remedy="Install it: pip install 'msn-eval[hf]'.",
        ) from error
    unwanted = (
        not datasets.are_progress_bars_disabled() and not sys.stderr.isatty() and _BARS_VARIABLE not in os.environ
    )
    if unwanted:
        datasets.disable_progress_bars()
    try:
        if where.folder is None:
            return _load_from_hub(where, wanted)
        return _load_folder(where, where.folder, wanted)
    except (MsnEvalError, KeyboardInterrupt):
        raise
    except Exception as error:  # the library has no common base for what it raises
        raise _translate(error, where) from error
    finally:
        if unwanted:
            datasets.enable_progress_bars()


def _load_folder(where: _Name, folder: Path, wanted: Sequence[str]) -> "dict[str, _Table]":
    import datasets

    if (folder / "dataset_dict.json").is_file():
        stored = datasets.DatasetDict.load_from_disk(folder, keep_in_memory=False)
        names = {split: _choose_split(where, split, list(stored)) for split in wanted}
        return {split: (name, stored[name]) for split, name in names.items()}
    if (folder / "state.json").is_file():
        raise DataError(
            "is a single split that `save_to_disk` wrote",
            where=str(where),
            remedy="Save a DatasetDict of train and validation, and give its folder, which holds a dataset_dict.json.",
        )
    # An absolute path, since the library takes some relative ones for names of its own.
    return _prepare(where, datasets.load_dataset_builder(str(folder), where.config), wanted)


def _load_from_hub(where: _Name, wanted: Sequence[str]) -> "dict[str, _Table]":
    import datasets

    commit, why = where.revision, ""
    forbidden = offline_variable()
    if forbidden is not None or datasets.config.HF_HUB_OFFLINE:
        why = f"${forbidden or 'HF_DATASETS_OFFLINE'} forbids to ask the hub"
    else:
        try:
            commit = _ask_commit(where)
            _log.info("%s is at commit %s", where, commit)
        except UnreachableError as error:
            why = f"the hub cannot be reached: {error}"
            _log.warning("%s: %s; taking what the cache holds", where, why)
    with _unplugged() if why else contextlib.nullcontext():
        try:
            builder = datasets.load_dataset_builder(where.place, where.config, revision=commit)
        except Exception as error:
            raise (
                _not_cached(where, why) if why and not _is_disk_error(error) else _translate(error, where)
            ) from error
        # The library falls back to whatever its cache holds of this name, without a look at the revision.
        if type(builder).__module__.endswith(".cache.cache") and commit is not None and builder.hash != commit:
            raise _not_cached(where, why or "the hub stopped answering")
        return _prepare(where, builder, wanted)


def _ask_commit(where: _Name) -> str:
    """Ask once and shortly which commit is meant: the library itself would ask a silent hub for half a minute."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        info = ask_hub(
            lambda: api.dataset_info(where.place, revision=where.revision, timeout=_ANSWER_SECONDS),
            str(where),
            _cache(),
        )
    except CheckpointError as error:
        raise DataError(error.what, where=error.where, remedy=error.remedy) from error
    return str(info.sha)


@contextlib.contextmanager
def _unplugged() -> Iterator[None]:
    """Keep the library from asking a hub that is known to be silent."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _prepare(where: _Name, builder: "datasets.DatasetBuilder", wanted: Sequence[str]) -> "dict[str, _Table]":
    """Have the library write its Arrow files where the cache has none yet, and map them."""
    builder.download_and_prepare()
    names = {split: _choose_split(where, split, list(builder.info.splits or ())) for split in wanted}
    return {split: (name, builder.as_dataset(split=name)) for split, name in names.items()}


def _choose_split(where: _Name, wanted: str, there: Sequence[str]) -> str:
    for name in _SPLITS[wanted]:
        if name in there:
            return name
    raise DataError(
        f"has no split {' or '.join(map(repr, _SPLITS[wanted]))} (it has: {', '.join(there) or 'none'})",
        where=str(where),
        remedy="Files of a local folder are told apart by their names: train-*.parquet and validation-*.parquet.",
    )


def _read_rows(where: _Name, split: str, table: "datasets.Dataset") -> _Rows:
    """Read the labels and paths of one split; the images stay where they are."""
    place = f"{where}, split {split}"
    image, label = _image_column(place, table.features), _label_column(place, table.features)
    files = [Path(entry["filename"]) for entry in table.cache_files]
    if not files or not len(table):
        raise DataError("has no rows", where=place, remedy="Complete the data set.")
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
    return _Rows(source=source, classes=names, labels=numbers, paths=paths)


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
            remedy=f"Call the one that is meant {preferred[0]!r}, or drop the others.",
        )
    shown = ", ".join(f"{name} ({_kind_name(kind)})" for name, kind in features.items())
    raise DataError(
        f"has no column of {what} (columns: {shown or 'none'})",
        where=place,
        remedy="A data set has one Image column, and a ClassLabel column or one called label of names or numbers.",
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
        values = ", ".join(map(str, list(dict.fromkeys(stored[row] for row in bad))[:_SHOWN]))
        raise DataError(
            f"{len(bad):,} of {len(stored):,} rows have no class (labels {values}; first row {bad[0]})",
            where=place,
            remedy="Test splits are often published without labels: take a data set with labelled validation images.",
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
            f"has no image: {error}", where=place, remedy="Store the images' bytes, as `push_to_hub` and `embed` do."
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


def _class_names(where: _Name, stored: Sequence[str]) -> dict[str, str]:
    """Give each class the name that it has in ids: one part of a path, one line. Refuse where two would become one."""
    names: dict[str, str] = {}
    for name in stored:
        fit = _UNFIT.sub("_", name)
        names[name] = "_" * max(1, len(fit)) if fit in ("", ".", "..") else fit
    counts = Counter(names.values())
    merged = [name for name, fit in names.items() if counts[fit] > 1]
    if merged:
        raise DataError(
            f"classes {', '.join(map(repr, merged[:_SHOWN]))} would have the same name {names[merged[0]]!r} in ids",
            where=str(where),
            remedy="Rename one of them.",
        )
    renamed = [f"{name!r} as {fit!r}" for name, fit in names.items() if name != fit]
    if renamed:
        _log.info("%s: %d classes are written otherwise in ids: %s", where, len(renamed), ", ".join(renamed[:_SHOWN]))
    return names


def _list_rows(stored: _Rows, names: Mapping[str, str]) -> Listing:
    """Give the images of one split by class, under file names that are unique within it."""
    files = _base_names(stored)
    if files is None:
        _log.info("%s: images are called by their rows", stored.source.place_of_rows)
        files = _row_names(stored)
    listed: dict[str, list[str]] = {names[name]: [] for name in stored.classes}
    rows: dict[str, int] = {}
    classes = [names[name] for name in stored.classes]
    for row, (label, file) in enumerate(zip(stored.labels, files, strict=True)):
        listed[classes[label]].append(file)
        rows[f"{classes[label]}/{file}"] = row
    return Listing(files=listed, source=replace(stored.source, rows=rows))


def _base_names(stored: _Rows) -> list[str] | None:
    """Give the last part of each stored path, or None where one is missing, unfit, or there twice in a class."""
    files = [
        (path or "").partition("::")[0].rpartition("/")[2] for path in stored.paths
    ]  # a/b.jpg::c.zip is in an archive
    if any(file in ("", ".", "..") or _UNFIT.search(file) for file in files):
        return None
    return files if len(set(zip(stored.labels, files, strict=True))) == len(files) else None


def _row_names(stored: _Rows) -> list[str]:
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
            remedy="Put it back, or store the images' bytes instead of their paths.",
        ) from error


def _cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


def _chain(error: BaseException) -> list[BaseException]:
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def _is_disk_error(error: BaseException) -> bool:
    return any(isinstance(one, OSError) and one.errno in _DISK for one in _chain(error))


def _translate(error: Exception, where: _Name) -> MsnEvalError:
    """Tell in words of ours what the library raised."""
    chain = _chain(error)
    for one in chain:
        if isinstance(one, OSError) and one.errno in _DISK:
            place = os.fsdecode(one.filename) if isinstance(one.filename, str | bytes) else str(_cache())
            if where.folder is not None and Path(place).is_relative_to(where.folder):
                return DataError(f"cannot be read: {one.strerror}", where=place, remedy="Check its permissions.")
            return StoreError(
                f"the cache of the `datasets` library cannot be written: {one.strerror}",
                where=place,
                remedy="Free space, or name a folder of your own: $HF_DATASETS_CACHE (and $HF_HUB_CACHE for downloads). "
                "What `save_to_disk` wrote is read where it is and needs no cache.",
            )
    if where.folder is None and any(_is_of_the_web(one) for one in chain):
        return _not_cached(where, f"the hub cannot be reached: {_first_line(error)}")
    text = _first_line(error)
    if "onfig" in text and isinstance(error, ValueError):  # several, and none or an unknown one was named
        listed = " ".join(str(error).split())[:600]
        return DataError(listed, where=str(where), remedy=f"Choose one: hf:{where.place}:CONFIG.")
    if "scripts are no longer supported" in text:
        return DataError(
            "comes with code of its own, which is never run here",
            where=str(where),
            remedy="Take a version of it in Parquet files; many have one in their branch refs/convert/parquet: "
            f"hf:{where.place}@refs/convert/parquet.",
        )
    return DataError(
        f"the `datasets` library cannot load it: {type(error).__name__}: {text}",
        where=str(where),
        remedy="It reads folders of train-*.parquet and validation-*.parquet, what `save_to_disk` wrote, and most layouts "
        "of the hub. An image folder is given by its path, without hf:.",
    )


def _is_of_the_web(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or type(error).__module__.startswith(_WEB_CLIENTS)


def _not_cached(where: _Name, why: str) -> DataError:
    revision = f" --revision {where.revision}" if where.revision else ""
    return DataError(
        f"{why}, and the cache {_cache()} does not hold this data set"
        + (f" at a commit known to be {where.revision}" if where.revision else ""),
        where=str(where),
        remedy=f"Where there is a network, run `hf download --repo-type dataset {where.place}{revision} --local-dir DIR`, "
        f"copy DIR here and give it: hf:DIR{f':{where.config}' if where.config else ''}.",
    )


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text[:300]
