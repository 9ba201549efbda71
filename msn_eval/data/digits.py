"""The handwritten digits that scikit-learn carries: real images that need no download."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from msn_eval.data.dataset import DataSet
from msn_eval.data.images import ImageSet, Stamp

_SIDE = 8
_TRAIN_PER_CLASS = 100


@dataclass(frozen=True)
class DigitSource:
    """Digits in memory; their bytes are the raw (8, 8, 3) pixels, so that no encoder's version enters a hash."""

    pixels: Mapping[str, bytes]
    root: None = None

    def read(self, image_id: str) -> bytes:
        return self.pixels[image_id]

    def decode(self, content: bytes) -> Image.Image:
        return Image.frombytes("RGB", (_SIDE, _SIDE), content)

    def place(self, image_id: str) -> str:
        return f"digits: {image_id}"

    def stamp(self, image_id: str) -> Stamp:
        return (len(self.pixels[image_id]),)


def read_digits() -> DataSet:
    """Give the digits: sample i of class c is `c/iiii.png`; the first 100 of each class train, the other 797 val.

    Source: scikit-learn's `load_digits` (the test part of UCI's optical recognition set), values 0 to 16 scaled to
    0 to 255 and repeated over three channels.
    """
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    grey = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, _SIDE, _SIDE, 1)
    rgb = np.repeat(grey, 3, axis=3)
    classes = tuple(str(digit) for digit in range(10))
    pixels: dict[str, bytes] = {}
    split: dict[bool, tuple[list[str], list[int]]] = {True: ([], []), False: ([], [])}
    for label, name in enumerate(classes):
        for number, row in enumerate(np.flatnonzero(targets == label)):
            image_id = f"{name}/{number:04d}.png"
            pixels[image_id] = rgb[row].tobytes()
            ids, labels = split[number < _TRAIN_PER_CLASS]
            ids.append(image_id)
            labels.append(label)
    source = DigitSource(pixels)
    train, val = (
        ImageSet(ids=tuple(ids), labels=tuple(labels), classes=classes, source=source)
        for ids, labels in (split[True], split[False])
    )
    return DataSet(name="digits", train=train, val=val)
