"""Augmentation: the crop and flip of an image in one epoch, a pure function of seed, epoch and the image's id.

So the pixels depend neither on the number of workers or ranks, nor on resumption.
"""

import hashlib
import math
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_RATIOS = (3 / 4, 4 / 3)
_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class RandomCrops:
    """Random resized crops and horizontal flips with the distribution of torchvision's RandomResizedCrop and
    RandomHorizontalFlip.

    Attributes:
        seed: Of all draws.
        epoch: From 0.
        share: Smallest share of the image's area; the largest is 1.
    """

    seed: int
    epoch: int
    share: float

    def crop(self, image: Image.Image, image_id: str, side: int) -> NDArray[np.uint8]:
        """Return the (side, side, 3) uint8 pixels of this epoch's crop, by Pillow's bilinear resize, perhaps flipped."""
        drawn = self._draw(image_id)
        box = draw_random_box(*image.size, drawn, share=self.share)
        cropped = image.crop(box).resize((side, side), Image.Resampling.BILINEAR)
        if drawn[-1] < 0.5:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(cropped)

    def _draw(self, image_id: str) -> NDArray[np.float64]:
        """Draw numbers in [0, 1): area and ratio of each attempt, left, top, flip."""
        digest = hashlib.sha256(b"%d\t%d\t" % (self.seed, self.epoch) + os.fsencode(image_id)).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16]))).random(2 * _ATTEMPTS + 3)


def draw_random_box(width: int, height: int, drawn: NDArray[np.float64], *, share: float) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random crop.

    It is the first attempt at area and ratio that fits into the image, else the largest centred box of an allowed ratio.

    Args:
        width: Of the image.
        height: Of the image.
        drawn: Numbers in [0, 1): area and ratio of each attempt, then left and top.
        share: Smallest share of the image's area.
    """
    shares = share + (1 - share) * drawn[: 2 * _ATTEMPTS : 2]
    low, high = math.log(_RATIOS[0]), math.log(_RATIOS[1])
    ratios = np.exp(low + (high - low) * drawn[1 : 2 * _ATTEMPTS : 2])
    for area, ratio in zip((width * height * shares).tolist(), ratios.tolist(), strict=True):
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(drawn[2 * _ATTEMPTS] * (width - box_width + 1))
            top = int(drawn[2 * _ATTEMPTS + 1] * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, round(height * _RATIOS[1]))
    box_height = min(height, round(width / _RATIOS[0]))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
