"""Data sets of the Hugging Face hub, and folders that its `datasets` library understands: rows of images and labels.

The library turns what it loads into Arrow files of its cache, which are mapped into memory: images are read row by row, as
the bytes that were stored. Nothing of a data set is ever run.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from msn_eval.data.dataset import DatasetListing, Listing, LoadOptions
from msn_eval.data.hf_rows import SHOWN, StoredRows, read_rows, row_names
from msn_eval.data.hf_splits import HubName, load_splits, parse_name
from msn_eval.errors import DataError

_log = logging.getLogger(__name__)

# A class is one folder's name in an id, and one line of a class map.
_UNFIT = re.compile("[/\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def list_hub(place: str, options: LoadOptions) -> DatasetListing:
    """List the data set `OWNER/NAME[:CONFIG][@REVISION]` of the hub, or a local folder `DIR[:CONFIG]`.

    A folder holds Parquet files (`train-*.parquet`, `validation-*.parquet`), what `save_to_disk` wrote, or anything else
    that `load_dataset` reads. Validation images are those of the split `validation`, else `val`, else `test`.

    An image's id is `CLASS/FILE`. FILE is the last part of its stored path, if every row of the split has one and no two of
    a class are the same; otherwise, for the whole split, its row, such as `00000012.png`, the ending by its first bytes.
    In class names `/` and control characters become `_`. Integers without names are classes called by their decimals.
    Raises DataError naming split, column or rows at fault, StoreError where the library's cache cannot be written.
    """
    where = parse_name(place)
    loaded = load_splits(where, options.splits)
    stored = {wanted: read_rows(where, split, table) for wanted, (split, table) in loaded.items()}
    names = _class_names(where, [name for rows in stored.values() for name in rows.classes])
    return DatasetListing(name=where.short, splits={split: _list_rows(rows, names) for split, rows in stored.items()})


def _class_names(where: HubName, stored: Sequence[str]) -> dict[str, str]:
    """Give each class the name that it has in ids: one part of a path, one line. Refuse where two would become one."""
    names: dict[str, str] = {}
    for name in stored:
        fit = _UNFIT.sub("_", name)
        names[name] = "_" * max(1, len(fit)) if fit in ("", ".", "..") else fit
    counts = Counter(names.values())
    merged = [name for name, fit in names.items() if counts[fit] > 1]
    if merged:
        raise DataError(
            f"classes {', '.join(map(repr, merged[:SHOWN]))} would have the same name {names[merged[0]]!r} in ids",
            where=str(where),
            hint="Rename one of them.",
        )
    renamed = [f"{name!r} as {fit!r}" for name, fit in names.items() if name != fit]
    if renamed:
        _log.info("%s: %d classes are written otherwise in ids: %s", where, len(renamed), ", ".join(renamed[:SHOWN]))
    return names


def _list_rows(stored: StoredRows, names: Mapping[str, str]) -> Listing:
    """Give the images of one split by class, under file names that are unique within it."""
    files = _base_names(stored)
    if files is None:
        _log.info("%s: images are called by their rows", stored.source.place_of_rows)
        files = row_names(stored)
    listed: dict[str, list[str]] = {names[name]: [] for name in stored.classes}
    rows: dict[str, int] = {}
    classes = [names[name] for name in stored.classes]
    for row, (label, file) in enumerate(zip(stored.labels, files, strict=True)):
        listed[classes[label]].append(file)
        rows[f"{classes[label]}/{file}"] = row
    return Listing(files=listed, source=replace(stored.source, rows=rows))


def _base_names(stored: StoredRows) -> list[str] | None:
    """Give the last part of each stored path, or None where one is missing, unfit, or there twice in a class."""
    files = [
        (path or "").partition("::")[0].rpartition("/")[2] for path in stored.paths
    ]  # a/b.jpg::c.zip is in an archive
    if any(file in ("", ".", "..") or _UNFIT.search(file) for file in files):
        return None
    return files if len(set(zip(stored.labels, files, strict=True))) == len(files) else None
