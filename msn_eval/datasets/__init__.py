"""Data sets by name: each gives its training and validation images as ImageSets over one class map."""

from pathlib import Path

from msn_eval.datasets.dataset import DataSet
from msn_eval.datasets.digits import read_digits
from msn_eval.datasets.folder import read_folder, read_folder_split
from msn_eval.errors import UsageError
from msn_eval.images import ImageSet

__all__ = ["DATASETS", "DataSet", "read_dataset", "read_split"]

DATASETS = {
    "DIR": "an image folder: train/<class>/* and val/<class>/*",
    "digits": "scikit-learn's handwritten digits, embedded: 1,000 train, 797 val, 10 classes",
}


def read_dataset(name: str, *, allow_class_mismatch: bool = False, memory: Path | None = None) -> DataSet:
    """Read the data set called `name`: `digits`, or the path of an image folder.

    memory: a folder to remember long listings in, or None to list everything anew
    Raises DataError when it is missing, empty, or its splits differ in their classes.
    """
    if name == "digits":
        return read_digits()
    return read_folder(name, allow_class_mismatch=allow_class_mismatch)


def read_split(name: str, split: str, *, memory: Path | None = None) -> ImageSet:
    """Read the `train` or `val` images of a data set without asking for the other."""
    if split not in ("train", "val"):
        raise UsageError(f"split {split!r}: a data set has the splits train and val")
    if name == "digits":
        digits = read_digits()
        return digits.train if split == "train" else digits.val
    return read_folder_split(name, split)
