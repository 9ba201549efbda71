"""Data sets of the Hugging Face hub, and folders that its `datasets` library reads: rows of images and labels.

The library writes what it loads to Arrow files in its cache, which are memory-mapped: images are read row by row, as the
bytes that were stored. No code of a data set is ever run.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from msn_eval.data.dataset import DatasetListing, Listing, LoadOptions
from msn_eval.data.hf_rows import StoredRows, name_by_rows, read_rows
from msn_eval.data.hf_splits import HubName, load_splits, parse_name
from msn_eval.errors import DataError

_log = logging.getLogger(__name__)

# A class is one folder name in an id, and one line of a class map.
_FORBIDDEN = re.compile("[/\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def list_hub(place: str, options: LoadOptions) -> DatasetListing:
    """List the data set `OWNER/NAME[:CONFIG][@REVISION]` of the hub, or a local folder `DIR[:CONFIG]`.

    A folder holds Parquet files (`train-*.parquet`, `validation-*.parquet`), what `save_to_disk` wrote, or anything else
    that `load_dataset` reads. Validation images are those of the split `validation`, else `val`, else `test`.

    An image's id is `CLASS/FILE`. FILE is the last part of its stored path, if every row of the split has one and no two
    of a class are the same; otherwise, for the entire split, its row, such as `00000012.png`, with the suffix by its first
    bytes. In class names `/` and control characters become `_`. Integers without names are classes named by their decimals.

    Raises:
        DataError: Names the split, column or rows at fault.
        StoreError: The library's cache cannot be written.
    """
    hub_name = parse_name(place)
    tables = load_splits(hub_name, options.splits)
    stored = {wanted: read_rows(hub_name, split, table) for wanted, (split, table) in tables.items()}
    names = _name_classes(hub_name, [name for rows in stored.values() for name in rows.classes])
    splits = {split: _list_rows(rows, names) for split, rows in stored.items()}
    folder, config = hub_name.folder, f":{hub_name.config}" if hub_name.config else ""
    return DatasetListing(name=hub_name.text if folder is None else f"{folder.name}{config}", splits=splits)


def _name_classes(hub_name: HubName, stored: Sequence[str]) -> dict[str, str]:
    """Return the name of each class in ids: one part of a path, on one line. Raises DataError where two become one."""
    names = {name: _FORBIDDEN.sub("_", name) for name in stored}
    names |= {name: "_" * max(1, len(name)) for name in names if name in ("", ".", "..")}
    counts = Counter(names.values())
    merged = [name for name, safe in names.items() if counts[safe] > 1]
    if merged:
        raise DataError(
            f"Classes {', '.join(map(repr, merged[:5]))} would have the same name {names[merged[0]]!r} in ids",
            where=str(hub_name),
            hint="Rename one of them.",
        )
    renamed = [f"{name!r} as {safe!r}" for name, safe in names.items() if name != safe]
    if renamed:
        _log.info("%s: %d classes are renamed in ids: %s", hub_name, len(renamed), ", ".join(renamed[:5]))
    return names


def _list_rows(rows: StoredRows, names: Mapping[str, str]) -> Listing:
    """List the images of one split by class, under file names that are unique within it."""
    files = _base_names(rows)
    if files is None:
        _log.info("%s: images are named by their rows", rows.source.where)
        files = name_by_rows(rows)
    classes = [names[name] for name in rows.classes]
    listed: dict[str, list[str]] = {name: [] for name in classes}
    row_of_id: dict[str, int] = {}
    for row, (label, file) in enumerate(zip(rows.labels, files, strict=True)):
        listed[classes[label]].append(file)
        row_of_id[f"{classes[label]}/{file}"] = row
    return Listing(files=listed, source=replace(rows.source, rows=row_of_id))


def _base_names(rows: StoredRows) -> list[str] | None:
    """Return the last part of each stored path, None where one is missing, not usable, or occurs twice in a class."""
    # In an archive, the path of an image is a/b.jpg::c.zip.
    files = [(path or "").partition("::")[0].rpartition("/")[2] for path in rows.paths]
    if any(file in ("", ".", "..") or _FORBIDDEN.search(file) for file in files):
        return None
    return files if len(set(zip(rows.labels, files, strict=True))) == len(files) else None
