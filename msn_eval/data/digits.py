"""The handwritten digits that ship with scikit-learn: real images that need no download."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from msn_eval.data.dataset import DatasetListing, Listing, LoadOptions
from msn_eval.data.images import Stamp
from msn_eval.errors import UsageError

_SIDE = 8
_TRAIN_PER_CLASS = 100


@dataclass(frozen=True)
class DigitSource:
    """Digits in memory. Their bytes are the raw (8, 8, 3) uint8 pixels, so hashes depend on no image encoder."""

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


def list_digits(place: str, options: LoadOptions) -> DatasetListing:
    """List the digits: sample i of class c is `c/iiii.png`; the first 100 of each class are train, the other 797 val.

    Source: scikit-learn's `load_digits` (the test part of UCI's optical recognition set), values 0 to 16 scaled to
    0 to 255 and repeated over three channels.
    """
    from sklearn.datasets import load_digits

    if place:
        raise UsageError(f"--data digits:{place}: the digits are embedded", hint="Write digits.")
    values, targets = load_digits(return_X_y=True)
    grey = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, _SIDE, _SIDE, 1)
    rgb = np.repeat(grey, 3, axis=3)
    pixels: dict[str, bytes] = {}
    train: dict[str, list[str]] = {}
    val: dict[str, list[str]] = {}
    for label in range(10):
        rows = np.flatnonzero(targets == label)
        files = [f"{number:04d}.png" for number in range(len(rows))]
        pixels |= {f"{label}/{file}": rgb[row].tobytes() for file, row in zip(files, rows, strict=True)}
        train[str(label)], val[str(label)] = files[:_TRAIN_PER_CLASS], files[_TRAIN_PER_CLASS:]
    source = DigitSource(pixels)
    listings = {"train": Listing(files=train, source=source), "val": Listing(files=val, source=source)}
    return DatasetListing(name="digits", splits={split: listings[split] for split in options.splits})
