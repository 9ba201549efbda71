"""The splits of a data set, as the `datasets` library loads them from the hub, its cache or a local folder."""

import errno
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import DataError, MsnEvalError, StoreError, UsageError
from msn_eval.files.hf_hub import UnreachableError, first_line, offline_variable, translate_hub_errors

if TYPE_CHECKING:
    import datasets

    Table = tuple[str, datasets.Dataset]  # a split, by the data set's own name for it

_log = logging.getLogger(__name__)
_CONFIG_AND_REVISION = r"(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
_ON_THE_HUB = re.compile(rf"(?P<path>[\w-][\w.-]*/[\w.-]+){_CONFIG_AND_REVISION}", re.ASCII)
_TIMEOUT_SECONDS = 10.0
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR}
_SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}  # in the order of preference


@dataclass(frozen=True, kw_only=True)
class HubName:
    """The parts of a name after `hf:`. `folder` is None for a data set of the hub."""

    text: str
    path: str
    config: str | None = None
    revision: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return f"hf:{self.text}"


def parse_name(text: str) -> HubName:
    """Parse a name; an existing folder takes precedence over a data set of the hub with the same spelling."""
    head, _, tail = text.rpartition(":")
    for path, config in ((text, None), (head, tail)):
        folder = os.path.expanduser(path)  # noqa: PTH111 - Path raises on names too long for the disk
        if os.path.isdir(folder) and (config is None or re.fullmatch(r"[\w.+-]+", config, re.ASCII)):  # noqa: PTH112
            return HubName(text=text, path=path, config=config, folder=Path(folder).resolve())
    match = _ON_THE_HUB.fullmatch(text)
    if match is not None and ".." not in text:
        return HubName(text=text, path=match["path"], config=match["config"], revision=match["revision"])
    what = "Neither an existing folder nor OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME@REVISION on the hub"
    hint = "Write for example hf:uoft-cs/cifar10, or a folder of Parquet files. Give an image folder without hf:."
    raise DataError(what, where=f"hf:{text}", hint=hint)


def load_splits(name: HubName, splits: Sequence[str]) -> "dict[str, Table]":
    """Load splits, `train` or `val`, memory-mapped from the disk.

    Raises DataError where the data set or a split does not exist or cannot be loaded, StoreError where the library's cache
    cannot be written, and UsageError where the library is missing.
    """
    try:
        import datasets
    except ImportError as error:
        what, hint = f"Needs the `datasets` library ({error})", "Install it: pip install 'msn-eval[hf]'."
        raise UsageError(what, where=str(name), hint=hint) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if name.folder is None:
            return _load_from_hub(name, splits)
        if (name.folder / "dataset_dict.json").is_file():
            stored = datasets.DatasetDict.load_from_disk(name.folder, keep_in_memory=False)
            return {split: (own, stored[own]) for split, own in _choose_splits(name, splits, stored).items()}
        # An absolute path, because the library takes some relative ones for names of its own.
        return _prepare(name, datasets.load_dataset_builder(str(name.folder), name.config), splits)
    except MsnEvalError:
        raise
    except Exception as error:  # the library's errors have no common base
        raise _translate(error, name) from error


def _load_from_hub(name: HubName, splits: Sequence[str]) -> "dict[str, Table]":
    import datasets
    from huggingface_hub import HfApi

    commit, before = name.revision, datasets.config.HF_HUB_OFFLINE
    forbidden = offline_variable() or ("HF_DATASETS_OFFLINE" if before else None)
    reason = f"${forbidden} forbids to ask the hub" if forbidden else ""
    if not forbidden:
        try:
            # One short request; the library itself waits half a minute for a silent hub.
            with translate_hub_errors(str(name), DataError):
                commit = HfApi().dataset_info(name.path, revision=name.revision, timeout=_TIMEOUT_SECONDS).sha
        except UnreachableError as error:
            reason = f"the hub cannot be reached: {error}"
            _log.warning("%s: %s; using the cache", name, reason)
    try:
        datasets.config.HF_HUB_OFFLINE = before or bool(reason)  # else the library would ask the hub
        try:
            builder = datasets.load_dataset_builder(name.path, name.config, revision=commit)
        except Exception as error:
            if reason and _disk_error(error) is None:
                raise _not_cached(name, reason) from error
            raise
        # The library falls back to any cached version of this name, whatever its revision.
        if type(builder).__module__.endswith(".cache.cache") and commit is not None and builder.hash != commit:
            raise _not_cached(name, reason or "the hub stopped answering")
        return _prepare(name, builder, splits)
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _prepare(name: HubName, builder: "datasets.DatasetBuilder", splits: Sequence[str]) -> "dict[str, Table]":
    """Write Arrow files where the library's cache has none yet, and map them into memory."""
    _check_class_names(name, builder, splits)
    builder.download_and_prepare()
    chosen = _choose_splits(name, splits, builder.info.splits or {})
    return {split: (own, builder.as_dataset(split=own)) for split, own in chosen.items()}


def _check_class_names(name: HubName, builder: "datasets.DatasetBuilder", splits: Sequence[str]) -> None:
    """Raise DataError where files of the splits state different class names: the library takes those of the first for all."""
    import datasets

    data_files = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if not data_files:
        _log.warning("%s: class names that differ between its files would go unnoticed in the cache", name)
        return
    needed = [next(iter(data_files)), *_choose_splits(name, splits, data_files).values()]
    files = [file for split in needed for file in data_files[split] if file.endswith((".parquet", ".arrow"))]
    stated = dict(zip(files, map(_read_class_names, datasets.DownloadManager().download(files)), strict=True))
    for file, own in stated.items():
        in_readme = builder.info.features
        taken = stated[files[0]] if in_readme is None else _class_names(in_readme)
        for column in taken | own:
            ours, theirs = own.get(column, []), taken.get(column, [])
            if ours != theirs and (ours or in_readme is None):
                index, pair = next(row for row in enumerate(zip_longest(ours, theirs)) if len(set(row[1])) > 1)
                first = "README.md" if taken != stated[files[0]] else files[0]
                what = f"Class {index} of column {column!r} is {pair[0]!r} in this file, but {pair[1]!r} in {first}"
                hint = (
                    "Write all files with the same list of class names. Or load each split by itself, write them with "
                )
                raise DataError(what, where=file, hint=f"{hint}DatasetDict(...).save_to_disk(DIR), and give hf:DIR.")


def _read_class_names(file: str) -> dict[str, list[str]]:
    """Return the names of the classes that a Parquet or Arrow file states, by column."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.endswith(".parquet"):
        return _class_names(datasets.Features.from_arrow_schema(pq.read_schema(file)))
    with pa.memory_map(file) as source:
        try:
            schema = pa.ipc.open_stream(source).schema
        except pa.ArrowInvalid:
            schema = pa.ipc.open_file(source).schema
    return _class_names(datasets.Features.from_arrow_schema(schema))


def _class_names(features: "datasets.Features") -> dict[str, list[str]]:
    import datasets

    return {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def _choose_splits(name: HubName, splits: Sequence[str], existing: Mapping[str, object]) -> dict[str, str]:
    """Return the data set's own name for each split."""
    chosen = {split: own for split in splits for own in reversed(_SPLITS[split]) if own in existing}
    for split in splits:
        if split not in chosen:
            what = f"No split {' or '.join(map(repr, _SPLITS[split]))} (existing: {', '.join(existing) or 'none'})"
            hint = "Files of a local folder are assigned by their names: train-*.parquet and validation-*.parquet."
            raise DataError(what, where=str(name), hint=hint)
    return chosen


def _disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of the disk among an error and its causes, None where there is none."""
    if error is None or (isinstance(error, OSError) and error.errno in _DISK):
        return error
    return _disk_error(error.__cause__ or error.__context__)


def _translate(error: Exception, name: HubName) -> MsnEvalError:
    """Return an error of this package for what the library raised."""
    from datasets import config

    disk = _disk_error(error)
    if disk is not None:
        path = os.fsdecode(disk.filename) if isinstance(disk.filename, str | bytes) else str(config.HF_DATASETS_CACHE)
        if name.folder is not None and Path(path).is_relative_to(name.folder):
            return DataError(f"Cannot read it: {disk.strerror}", where=path, hint="Check its permissions.")
        what = f"Cannot write the cache of the `datasets` library: {disk.strerror}"
        hint = "Free space, or choose another folder: $HF_DATASETS_CACHE (and $HF_HUB_CACHE for downloads)."
        return StoreError(what, where=path, hint=hint)
    text = first_line(error)
    what = f"The `datasets` library cannot load it: {text}"
    hint = "It reads train-*.parquet and validation-*.parquet, and what `save_to_disk` wrote for a DatasetDict."
    if isinstance(error, ValueError) and "onfig" in text:  # several, and the name has none or an unknown one
        what, hint = " ".join(str(error).split())[:600], f"Choose one: hf:{name.path}:CONFIG."
    elif "scripts are no longer supported" in text:
        what = "The data set has code of its own, which is never run here"
        hint = f"Use Parquet files; many data sets have them in a branch: hf:{name.path}@refs/convert/parquet."
    return DataError(what, where=str(name), hint=hint)


def _not_cached(name: HubName, reason: str) -> DataError:
    from datasets import config

    option, commit = (f" --revision {name.revision}", f" at {name.revision}") if name.revision else ("", "")
    what = f"{reason}, and the cache {config.HF_DATASETS_CACHE} does not hold this data set{commit}"
    hint = f"On a machine with a network, run `hf download --repo-type dataset {name.path}{option} --local-dir DIR`, "
    hint += f"copy DIR here and give it: hf:DIR{f':{name.config}' if name.config else ''}."
    return DataError(what, where=str(name), hint=hint)
