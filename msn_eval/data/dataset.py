"""DataSet: the two splits of a data set, under one class map."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msn_eval.data.images import ImageSet, ImageSource
from msn_eval.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a data set's name leads to. `train` and `val` share their classes."""

    name: str
    train: ImageSet
    val: ImageSet

    @property
    def classes(self) -> tuple[str, ...]:
        return self.val.classes


def class_map_sha256(classes: tuple[str, ...]) -> str:
    """Give the SHA-256 of the class names in order, a line each."""
    return hashlib.sha256("".join(f"{name}\n" for name in classes).encode("utf-8", "surrogateescape")).hexdigest()


_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What stands in one split, whatever it is stored in.

    files:       the image files of each class, without the class in their names, in any order
    passed_over: dotfiles and files of other suffixes that were not taken for images
    """

    files: Mapping[str, Sequence[str]]
    source: ImageSource
    passed_over: int = 0


def make_dataset(name: str, *, where: str, train: Listing, val: Listing, allow_class_mismatch: bool) -> DataSet:
    """Number the classes in the byte order of their names, the same for both splits.

    where: the data set's place, for the error
    Raises DataError where the splits differ in their classes, unless that is allowed: then the union is numbered.
    """
    if train.files.keys() != val.files.keys() and not allow_class_mismatch:
        raise _class_mismatch(where, train, val)
    classes = tuple(sorted(train.files.keys() | val.files.keys(), key=os.fsencode))
    return DataSet(name=name, train=_image_set(train, classes), val=_image_set(val, classes))


def make_split(listing: Listing) -> ImageSet:
    """Give one split by itself, with its own classes."""
    return _image_set(listing, tuple(sorted(listing.files, key=os.fsencode)))


def _class_mismatch(where: str, train: Listing, val: Listing) -> DataError:
    def sample(names: set[str]) -> str:
        shown = sorted(names, key=os.fsencode)
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        return ", ".join(shown[:_SHOWN]) + more

    only_train, only_val = train.files.keys() - val.files.keys(), val.files.keys() - train.files.keys()
    parts = [f"only in train: {sample(only_train)}"] if only_train else []
    parts += [f"only in val: {sample(only_val)}"] if only_val else []
    return DataError(
        f"train and val differ in their classes ({'; '.join(parts)})",
        where=where,
        hint="Labels would shift. Complete the split, or pass --allow-class-mismatch to number the union of both.",
    )


def _image_set(listing: Listing, classes: tuple[str, ...]) -> ImageSet:
    number = {name: label for label, name in enumerate(classes)}
    ids: list[str] = []
    labels: list[int] = []
    # Ids of one class share all up to their slash, so the order of a million ids is that of the classes with their slash
    # and, within a class, that of the files: a thousand small sorts.
    for name in sorted(listing.files, key=lambda name: os.fsencode(f"{name}/")):
        files = _byte_order(listing.files[name])
        ids += [f"{name}/{file}" for file in files]
        labels += [number[name]] * len(files)
    if any("/" in name for name in listing.files):  # where they share less: classes `a` and `a/b`
        order = sorted(range(len(ids)), key=lambda row: os.fsencode(ids[row]))
        ids, labels = [ids[row] for row in order], [labels[row] for row in order]
    return ImageSet(
        ids=tuple(ids),
        labels=tuple(labels),
        classes=classes,
        source=listing.source,
        passed_over=listing.passed_over,
    )


def _byte_order(files: Sequence[str]) -> list[str]:
    return sorted(files) if "".join(files).isascii() else sorted(files, key=os.fsencode)
