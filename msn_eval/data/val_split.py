"""A val split for class folders that have none: some images of each class, drawn by the rule of the subsets."""

import math
from fractions import Fraction
from pathlib import Path

from msn_eval.data import read_split
from msn_eval.data.folder import holds_class_folders
from msn_eval.data.images import ImageSet
from msn_eval.data.subsets import sort_by_draw
from msn_eval.errors import DataError, format_count

DEFAULT_SHARE = Fraction(1, 5)
_DRAW = 1


def read_class_folders(root: Path) -> ImageSet:
    """Read a folder whose subfolders are classes. Raises DataError where it is anything else."""
    if root.is_dir() and not holds_class_folders(root):
        raise DataError(
            "is not a folder of class folders: each of its folders must hold images directly, and none be a split's",
            where=str(root),
            hint="Give the folder that holds one folder per class.",
        )
    return read_split(str(root), "val")


def draw_val(images: ImageSet, *, share: Fraction = DEFAULT_SHARE, per_class: int | None = None) -> frozenset[str]:
    """Draw the ids of val: the first images of each class in the order of SHA-256 of `1:CLASS/FILE`.

    Args:
        images: All images.
        share: Part of the images of each class, rounded up, in (0, 1); not needed beside `per_class`.
        per_class: Number of images of each class.

    Raises:
        DataError: A class would have no image left for train; its count is named.
    """
    val: set[str] = set()
    for name, ids in zip(images.classes, images.ids_by_class, strict=True):
        count = per_class if per_class is not None else math.ceil(len(ids) * share)
        if count >= len(ids):
            raise DataError(
                f"class {name!r} has {format_count(len(ids), 'image')}: {count} for val would leave none for train",
                hint="Add images to the class, remove it, or draw fewer for val.",
            )
        val.update(sort_by_draw(ids, _DRAW)[:count])
    return frozenset(val)
