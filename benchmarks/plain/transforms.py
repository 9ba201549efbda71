"""The augmentations of MSN (arXiv:2204.07141, appendix A.1) in the plain way: torchvision's transforms on Pillow images."""

import random

from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import (
    ColorJitter,
    Compose,
    Normalize,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _RandomBlur:
    """A Gaussian blur of half of the images, by Pillow."""

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= 0.5:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def make_transform(pixels: int, scale: tuple[float, float]) -> Compose:
    """Return the transform of one kind of views: SimCLR's distortions at strength 0.5, then mean and std of ImageNet."""
    return Compose(
        [
            RandomResizedCrop(pixels, scale=scale),
            RandomHorizontalFlip(),
            RandomApply([ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            RandomGrayscale(p=0.2),
            _RandomBlur(),
            ToTensor(),
            Normalize(_MEAN, _STD),
        ]
    )


def make_views(image: Image.Image, *, random_views: int = 2, focal_views: int = 10) -> list[Tensor]:
    """Return the views of one image: random views of 224 pixels, then focal views of 96."""
    kinds = [(make_transform(224, (0.3, 1.0)), random_views), (make_transform(96, (0.05, 0.3)), focal_views)]
    return [transform(image) for transform, count in kinds for _ in range(count)]
