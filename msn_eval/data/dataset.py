"""DataSet: the two splits of a data set under one class map, and the loader that lists what they hold."""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from msn_eval.data.images import ImageSet, ImageSource
from msn_eval.errors import DataError

SPLITS = ("train", "val")
VAL_NAMES = ("val", "valid", "validation", "test")  # of the folder or rows that are val; the first that exists counts
_SHOWN = 5


class UnknownLayoutError(DataError):
    """A folder that is stored in none of the layouts that are read. The caller adds the list of layouts to the hint."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The training and validation images of a data set. Both splits share one class map.

    Attributes:
        name: The name in records and reports.
        train: Training images.
        val: Validation images.
        distribution: Name and version of the distribution whose plug-in read it, None for a built-in data set.
    """

    name: str
    train: ImageSet
    val: ImageSet
    distribution: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.val.classes


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of one split, whatever they are stored in.

    Attributes:
        files: The file names of each class, in any order. An image's id is `CLASS/FILE`. A FILE in a folder below that of
            the class is named with it: `SUB/FILE`.
        source: Reads and decodes the images by their ids.
        passed_over: Number of files that were not taken for images (dotfiles, other suffixes).
    """

    files: Mapping[str, Sequence[str]]
    source: ImageSource
    passed_over: int = 0


@dataclass(frozen=True, kw_only=True)
class DatasetListing:
    """What a loader returns.

    Attributes:
        name: The name of the data set in records and reports.
        splits: The listing of each requested split.
    """

    name: str
    splits: Mapping[str, Listing]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """A request to a loader.

    Attributes:
        splits: `train`, `val`, or both. The loader must not need any other split.
        allow_class_mismatch: Whether the splits may differ in their classes. The caller compares the class names; a loader
            needs this only for checks of its own.
        cache_dir: A folder in which long listings may be cached, or None.
    """

    splits: tuple[str, ...] = SPLITS
    allow_class_mismatch: bool = False
    cache_dir: Path | None = None


class Loader(Protocol):
    """A function that lists the images of a data set. Adding a data set means writing one.

    The caller numbers the classes and sorts the ids by their bytes, so the order of classes and files does not matter.
    Nothing is decoded yet: pixels are read later through `Listing.source`, in worker processes too, so a source must be
    picklable. A distribution registers its loader under the scheme that users type, `--data toy:PLACE` or `--data toy`:

        [project.entry-points."msn_eval.datasets"]
        toy = "my_package.toy:list_toy"

    For images in files, `FolderSource` is enough:

        def list_toy(place: str, options: LoadOptions) -> DatasetListing:
            root = Path(place)
            if not root.is_dir():
                raise DataError("No such folder", where=place, hint="Write toy:DIR.")
            splits = {}
            for split in options.splits:
                folders = [folder for folder in (root / split).iterdir() if folder.is_dir()]
                files = {folder.name: [path.name for path in folder.glob("*.png")] for folder in folders}
                splits[split] = Listing(files=files, source=FolderSource(root / split))
            return DatasetListing(name="toy", splits=splits)
    """

    def __call__(self, place: str, options: LoadOptions, /) -> DatasetListing:
        """List the splits that `options` names.

        Args:
            place: What follows the colon of `SCHEME:PLACE`, empty where nothing does.
            options: The splits to list, and how.

        Raises:
            DataError: The data set is missing, empty or damaged. The text names the folder, file or line.
            UsageError: The place has the wrong form.
        """
        ...


def class_map_sha256(classes: tuple[str, ...]) -> str:
    """Return the SHA-256 of the class names in order, one per line."""
    return hashlib.sha256("".join(f"{name}\n" for name in classes).encode("utf-8", "surrogateescape")).hexdigest()


def make_dataset(
    listing: DatasetListing, *, where: str, allow_class_mismatch: bool = False, distribution: str | None = None
) -> DataSet:
    """Number the classes in the byte order of their names, the same for both splits.

    Args:
        listing: Both splits.
        where: The location of the data set, for the error.
        allow_class_mismatch: Number the union of the classes.
        distribution: Of the plug-in that listed it.

    Raises:
        DataError: The splits differ in their classes and may not, or have none in common; or two names look alike.
    """
    train, val = (listing.splits[split] for split in SPLITS)
    _check_look_alikes(train.files.keys() | val.files.keys(), where)
    _check_mismatch(set(train.files), set(val.files), where, allowed=allow_class_mismatch)
    classes = _sort_names(train.files.keys() | val.files.keys())
    return DataSet(
        name=listing.name,
        train=_number_images(train, classes),
        val=_number_images(val, classes),
        distribution=distribution,
    )


def make_split(listing: Listing, *, where: str = "") -> ImageSet:
    """Return one split by itself, with its own classes. Raises DataError where two names look alike."""
    _check_look_alikes(listing.files.keys(), where)
    return _number_images(listing, _sort_names(listing.files))


def find_look_alikes(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Group the names that some file systems treat as equal: they differ only by case or Unicode normalisation."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())].append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def join_look_alikes(names: Iterable[str]) -> str:
    """Return names in one phrase, with escape sequences where they are not plain ASCII."""
    return " and ".join(name if name.isascii() else f"{name} ({name!a})" for name in names)


def _check_look_alikes(classes: Collection[str], where: str) -> None:
    for group in find_look_alikes(_sort_names(classes)):
        raise DataError(
            f"the classes {join_look_alikes(group)} differ only by case or Unicode normalisation",
            where=where,
            hint="Many file systems hold them for one. Rename one of them, or merge them if they are the same class.",
        )


def _check_mismatch(train: set[str], val: set[str], where: str, *, allowed: bool) -> None:
    if train == val or (allowed and train & val):
        return
    only = {"train": train - val, "val": val - train}
    differences = "; ".join(f"only in {split}: {_sample(names)}" for split, names in only.items() if names)
    if train & val:
        what = f"train and val differ in their classes ({differences})"
        hint = "Labels would shift. Complete the split, or pass --allow-class-mismatch to number the union of both."
        if only["val"]:
            hint += " No image of a class that is only in val can be right then."
    else:
        what = f"train and val have no class in common, so no validation image can be right ({differences})"
        hint = "Give the classes of val the names that they have in train."
        if val == {str(number) for number in range(len(train))}:  # ImageNet-V2, for example
            names = _sort_names(train)
            hint += f" If val counts the classes of train in byte order, 0 is {names[0]} and {len(names) - 1} is {names[-1]}."
    raise DataError(what, where=where, hint=hint)


def _number_images(listing: Listing, classes: Sequence[str]) -> ImageSet:
    number = {name: label for label, name in enumerate(classes)}
    ids: list[str] = []
    labels: list[int] = []
    # The ids of a class share everything up to their slash. So the order of a million ids is that of the classes with
    # their slash and, within a class, that of the files: a thousand small sorts.
    for name in sorted(listing.files, key=lambda name: os.fsencode(f"{name}/")):
        files = _sort_names(listing.files[name])
        ids += [f"{name}/{file}" for file in files]
        labels += [number[name]] * len(files)
    return ImageSet(
        ids=tuple(ids),
        labels=tuple(labels),
        classes=tuple(classes),
        source=listing.source,
        passed_over=listing.passed_over,
    )


def _sample(names: Collection[str]) -> str:
    shown = _sort_names(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _sort_names(names: Collection[str]) -> tuple[str, ...]:
    # Of ASCII, the order of characters is that of bytes.
    return tuple(sorted(names) if "".join(names).isascii() else sorted(names, key=os.fsencode))
