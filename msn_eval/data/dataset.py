"""DataSet: the two splits of a data set, under one class map."""

import hashlib
from dataclasses import dataclass

from msn_eval.data.images import ImageSet


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
