"""Data sets by name. To add one, write a module with a `Loader` and add its line to `DATASETS`.

Installed distributions add loaders by entry points of the group `msn_eval.datasets`; see `msn_eval.data.dataset.Loader`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from msn_eval.data.dataset import (
    SPLITS,
    VAL_NAMES,
    DataSet,
    DatasetListing,
    Loader,
    LoadOptions,
    UnknownLayoutError,
    make_dataset,
    make_split,
)
from msn_eval.data.folder import list_tree
from msn_eval.data.images import ImageSet
from msn_eval.errors import DataError, UsageError
from msn_eval.registry import Entry, find_entry, read_registry

__all__ = [
    "DATASETS",
    "DATA_VARIABLE",
    "DataSet",
    "NamedSplit",
    "describe_datasets",
    "find_data_name",
    "list_datasets",
    "read_dataset",
    "read_named_split",
    "read_split",
    "read_training_images",
]

DATASETS = (
    Entry(
        name="DIR",
        summary="an image folder: train/<class>/* and val/<class>/* (or valid, validation, test; the first of these counts); "
        "or ImageNet as distributed: train tars read in place, flat val with devkit, synset file or LOC_val_solution.csv; "
        "or Tiny ImageNet as distributed",
        target="msn_eval.data.imagenet:list_directory",
    ),
    Entry(
        name="wds",
        summary="wds:DIR, a WebDataset: train-*.tar and val-*.tar with a .cls beside each image, and classes.txt",
        target="msn_eval.data.webdataset:list_webdataset",
    ),
    Entry(
        name="csv",
        summary="csv:FILE, a CSV file with the columns image (paths, relative to its folder), label, and split (train or val)",
        target="msn_eval.data.csv_list:list_csv",
    ),
    Entry(
        name="tv",
        summary="tv:NAME, a data set of torchvision with its official splits, downloaded once: cifar10, cifar100, stl10, svhn, "
        "mnist, fashionmnist, flowers102, oxfordpets, dtd, food101, aircraft, gtsrb, pcam, imagenette",
        target="msn_eval.data.torchvision_sets:list_torchvision",
    ),
    Entry(
        name="hf",
        summary="hf:NAME_OR_DIR, a Hugging Face data set: its splits train and validation, else test",
        target="msn_eval.data.huggingface:list_hub",
    ),
    Entry(
        name="digits",
        summary="scikit-learn's handwritten digits, embedded: 1,000 train, 797 val, 10 classes",
        target="msn_eval.data.digits:list_digits",
    ),
)
DATA_VARIABLE = "MSN_EVAL_DATA"
_PLACE_REQUIRED = ("wds", "csv", "tv", "hf")
_SCHEME = re.compile(r"[A-Za-z][\w+-]+")  # at least two characters: `C:` starts a path on Windows


def list_datasets() -> dict[str, str]:
    """Return the known data sets, plug-ins included, and a line about each."""
    return {name: entry.summary for name, entry in read_registry("datasets", DATASETS).items()}


def describe_datasets() -> str:
    """Return the known data sets as the lines of a hint."""
    lines = [f"  {name}: {summary}" for name, summary in list_datasets().items()]
    return "\n".join(["Data sets that can be read:", *lines])


def find_data_name(given: str | None) -> str:
    """Return the given name of a data set, else that of $MSN_EVAL_DATA. Raises UsageError where there is none."""
    name = given or os.environ.get(DATA_VARIABLE)
    if not name:
        raise UsageError("no data set given", hint=f"Pass --data or set ${DATA_VARIABLE}.\n{describe_datasets()}")
    return name


def read_dataset(name: str, *, allow_class_mismatch: bool = False, cache_dir: Path | None = None) -> DataSet:
    """Read both splits of a data set.

    Args:
        name: `SCHEME:PLACE` or `SCHEME` for a data set of the registry, else the path of a folder.
        allow_class_mismatch: Number the union of the classes where the splits differ in them.
        cache_dir: Folder that caches long listings, or None to list everything again.

    Raises:
        UsageError: No data set has this scheme.
        DataError: It is missing or empty, or its splits differ in their classes.
    """
    options = LoadOptions(allow_class_mismatch=allow_class_mismatch, cache_dir=cache_dir)
    entry, listing = _load(name, options)
    return make_dataset(listing, where=name, allow_class_mismatch=allow_class_mismatch, distribution=entry.distribution)


def read_split(name: str, split: str, *, cache_dir: Path | None = None) -> ImageSet:
    """Read the `train` or `val` images of a data set, with their own classes; the other split need not exist.

    A folder whose subfolders hold images directly, without `train` and `val`, is read as `val`: so ImageNet-V2, -A, -R and
    -Sketch are distributed.
    """
    return read_named_split(name, split, cache_dir=cache_dir).images


@dataclass(frozen=True, kw_only=True)
class NamedSplit:
    """The images of one split; the name of its data set, and the distribution whose plug-in read it, as in `DataSet`."""

    name: str
    images: ImageSet
    distribution: str | None


def read_named_split(name: str, split: str, *, cache_dir: Path | None = None) -> NamedSplit:
    """Read one split as `read_split` does, with the name of its data set."""
    if split not in SPLITS:
        raise UsageError(f"split {split!r}: a data set has the splits train and val")
    entry, listing = _load(name, LoadOptions(splits=(split,), cache_dir=cache_dir))
    images = make_split(listing.splits[split], where=name)
    return NamedSplit(name=listing.name, images=images, distribution=entry.distribution)


def read_training_images(name: str, *, cache_dir: Path | None = None) -> ImageSet:
    """Read the `train` images of a data set; of a folder without classes every image in and below it, or its `train`.

    Raises:
        DataError: There are no images; or only those of val, on which nothing may be trained.
    """
    try:
        return read_split(name, "train", cache_dir=cache_dir)
    except DataError as error:
        root = Path(name)
        has_val_alone = not (root / "train").is_dir() and any((root / split).is_dir() for split in VAL_NAMES)
        if not isinstance(error.__cause__, UnknownLayoutError) or not root.is_dir() or has_val_alone:
            raise
        return list_tree(root / "train" if (root / "train").is_dir() else root)


def _load(name: str, options: LoadOptions) -> tuple[Entry, DatasetListing]:
    registry = read_registry("datasets", DATASETS)
    scheme, colon, place = name.partition(":")
    is_known = scheme in registry and scheme != "DIR"
    if is_known or (colon and _SCHEME.fullmatch(scheme) and not os.path.exists(name)):  # noqa: PTH110 - any text
        entry = find_entry(registry, scheme, what="data set")
        if not place and scheme in _PLACE_REQUIRED:
            raise UsageError(
                f"--data {name}: a folder or a name is missing after the colon",
                hint=f"Write {entry.summary.partition(',')[0]}, or ./{scheme} for a folder of that name.",
            )
    else:
        entry, place = registry["DIR"], name
    try:
        return entry, cast(Loader, entry.load())(place, options)
    except UnknownLayoutError as error:
        raise DataError(error.what, where=error.where, hint=f"{error.hint}\n{describe_datasets()}") from error
