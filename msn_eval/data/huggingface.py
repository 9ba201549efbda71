"""Data sets of the Hugging Face hub, and folders that its `datasets` library reads: rows of images and labels.

The library writes what it loads to Arrow files in its cache, which are memory-mapped: images are read row by row, as the
bytes that were stored. No code of a data set is ever run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from msn_eval.data.dataset import DatasetListing, Listing, LoadOptions
from msn_eval.data.hf_rows import FORBIDDEN, read_rows
from msn_eval.data.hf_splits import HubName, load_splits, parse_name
from msn_eval.errors import DataError


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
    stored = {wanted: read_rows(hub_name, split, table) for wanted, (split, table) in tables.items()}
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
    names = {name: FORBIDDEN.sub("_", name) for name in stored}
    names |= {name: "_" * max(1, len(name)) for name in names if name in ("", ".", "..")}
    counts = Counter(names.values())
    merged = [name for name, safe in names.items() if counts[safe] > 1]
    if merged:
        what = f"Classes {', '.join(map(repr, merged[:5]))} would have the same name {names[merged[0]]!r} in ids"
        raise DataError(what, where=str(hub_name), hint="Rename one of them.")
    return names
