"""Augmented views of training images.

The parameters of a view are a pure function of (seed, epoch, image, view), so they depend neither on the number of workers nor on
that of ranks. They are applied one image at a time in a loader worker, or to many images at once on a GPU (batched_views.py).
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msn_pretrain.data.sampler import uniforms

_ATTEMPTS = 10  # to fit a crop into the image, as in torchvision
_CORNER = 2 * _ATTEMPTS
_FLIP, _JITTER = _CORNER + 2, _CORNER + 3
_ORDER = _JITTER + 1
_FACTORS = _ORDER + 4
_GREY, _BLUR, _SIGMA = _FACTORS + 4, _FACTORS + 5, _FACTORS + 6
_NUMBERS = _SIGMA + 1
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_CHANGES = ("brightness", "contrast", "saturation", "hue")
BLUR_RADIUS = 6  # pixels, three times the widest sigma


@dataclass(frozen=True, kw_only=True)
class ViewKind:
    """Distribution of views of one kind.

    Attributes:
        pixels: Side of a view.
        count: Views per image.
        scale: Range of the crop's share of the image's area.
        ratio: Range of width to height.
        flip: Probability of a horizontal flip.
        jitter: Probability of the colour jitter.
        amounts: Strength of the jitter of brightness, contrast, saturation and hue, as for torchvision's ColorJitter. MSN's
            values are SimCLR's at strength 0.5.
        grey: Probability of greyscale.
        blur: Probability of a Gaussian blur.
        sigma: Range of its standard deviation in pixels.
        interpolation: bilinear or bicubic, antialiased.

    Source: SimCLR's distortions (arXiv:2002.05709, appendix A), as MSN takes them (arXiv:2204.07141, appendix A.1).
    """

    pixels: int
    count: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    amounts: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    grey: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    interpolation: str = "bilinear"


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """Parameters of n views.

    Attributes:
        boxes: (n, 4) int64, top, left, height and width of the crop in pixels of the image.
        flipped: (n,) bool.
        jittered: (n,) bool.
        order: (n, 4) int64, the order in which brightness, contrast, saturation and hue (0 to 3) are changed.
        factors: (n, 4), factors of brightness, contrast and saturation, and shift of the hue; 1, 1, 1, 0 change nothing.
        greyed: (n,) bool.
        sigmas: (n,), standard deviation of the blur in pixels, 0 for none.
    """

    boxes: NDArray[np.int64]
    flipped: NDArray[np.bool_]
    jittered: NDArray[np.bool_]
    order: NDArray[np.int64]
    factors: NDArray[np.float64]
    greyed: NDArray[np.bool_]
    sigmas: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.boxes)

    def rows(self, which: slice | NDArray[np.int64]) -> "ViewParameters":
        """Return the parameters of some of the views."""
        return ViewParameters(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


def draw_views(
    kind: ViewKind,
    *,
    seed: int,
    epochs: NDArray[np.int64],
    images: NDArray[np.int64],
    views: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> ViewParameters:
    """Draw the parameters of n views, each a pure function of (seed, epoch, image, view) and of the image's size.

    Args:
        kind: Distribution of the views.
        seed: The seed.
        epochs: (n,) from 0.
        images: (n,) indices of images.
        views: (n,) numbers of views of an image.
        sizes: (n, 2) int64, height and width of each view's image.
    """
    drawn = uniforms(np.stack([epochs, images, views], axis=1), seed=seed, count=_NUMBERS)
    # Brightness, contrast and saturation are factors around 1, not below 0; the hue is a shift around 0.
    amounts, middle = np.array(kind.amounts), np.array([1.0, 1.0, 1.0, 0.0])
    least, most = middle - amounts, middle + amounts
    least[:HUE] = np.maximum(0.0, least[:HUE])
    jittered = drawn[:, _JITTER] < kind.jitter
    factors = least + (most - least) * drawn[:, _FACTORS : _FACTORS + 4]
    blurred = drawn[:, _BLUR] < kind.blur
    sigmas = kind.sigma[0] + (kind.sigma[1] - kind.sigma[0]) * drawn[:, _SIGMA]
    return ViewParameters(
        boxes=_draw_boxes(kind, drawn, sizes),
        flipped=drawn[:, _FLIP] < kind.flip,
        jittered=jittered,
        order=np.argsort(drawn[:, _ORDER : _ORDER + 4], axis=1, kind="stable"),
        factors=np.where(jittered[:, None], factors, middle),
        greyed=drawn[:, _GREY] < kind.grey,
        sigmas=np.where(blurred, sigmas, 0.0),
    )


def _draw_boxes(kind: ViewKind, drawn: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw boxes like torchvision's RandomResizedCrop.

    After ten attempts to fit area and ratio into the image, the largest centred box with an allowed ratio is used.
    """
    heights, widths = sizes[:, 0], sizes[:, 1]
    areas = (heights * widths)[:, None] * _scale_to(kind.scale, drawn[:, 0:_CORNER:2])
    low, high = math.log(kind.ratio[0]), math.log(kind.ratio[1])
    ratios = np.exp(_scale_to((low, high), drawn[:, 1:_CORNER:2]))
    tried_widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    tried_heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (tried_widths > 0) & (tried_widths <= widths[:, None])
    fits &= (tried_heights > 0) & (tried_heights <= heights[:, None])
    first, rows = fits.argmax(axis=1), np.arange(len(sizes))
    fitted = fits[rows, first]
    largest_heights, largest_widths = _largest_box(kind, heights, widths)
    box_heights = np.where(fitted, tried_heights[rows, first], largest_heights)
    box_widths = np.where(fitted, tried_widths[rows, first], largest_widths)
    tops = np.where(fitted, drawn[:, _CORNER] * (heights - box_heights + 1), (heights - box_heights) // 2)
    lefts = np.where(fitted, drawn[:, _CORNER + 1] * (widths - box_widths + 1), (widths - box_widths) // 2)
    return np.stack([tops.astype(np.int64), lefts.astype(np.int64), box_heights, box_widths], axis=1)


def _largest_box(
    kind: ViewKind, heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    shape = widths / heights
    box_heights = np.where(shape < kind.ratio[0], np.rint(widths / kind.ratio[0]), heights).astype(np.int64)
    box_widths = np.where(shape > kind.ratio[1], np.rint(heights * kind.ratio[1]), widths).astype(np.int64)
    return np.minimum(box_heights, heights), np.minimum(box_widths, widths)


def _scale_to(ends: tuple[float, float], drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    return ends[0] + (ends[1] - ends[0]) * drawn


def make_view(image: Tensor, parameters: ViewParameters, row: int, kind: ViewKind) -> Tensor:
    """Make one view with torchvision's functions on uint8.

    Args:
        image: (3, height, width) uint8.
        parameters: Parameters of views.
        row: Which of them to use.
        kind: The kind of the view.

    Returns:
        (3, pixels, pixels) uint8.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as transforms

    side = kind.pixels
    mode = InterpolationMode(kind.interpolation)
    top, left, height, width = parameters.boxes[row].tolist()
    view = transforms.resized_crop(image, top, left, height, width, [side, side], mode, antialias=True)
    if parameters.flipped[row]:
        view = transforms.horizontal_flip(view)
    if parameters.jittered[row]:
        for index in parameters.order[row].tolist():
            adjust = getattr(transforms, f"adjust_{_CHANGES[index]}")
            view = adjust(view, float(parameters.factors[row, index]))
    if parameters.greyed[row]:
        view = transforms.rgb_to_grayscale(view, num_output_channels=3)
    if parameters.sigmas[row]:
        reach = 2 * blur_radius(side) + 1
        view = transforms.gaussian_blur(view, [reach, reach], [float(parameters.sigmas[row])] * 2)
    assert isinstance(view, Tensor)
    return view


def blur_radius(pixels: int) -> int:
    """Return the radius of the blur kernel in pixels. Reflection at the edges limits it to the view's side."""
    return min(BLUR_RADIUS, pixels - 1)


def make_views(images: list[Tensor], parameters: ViewParameters, kind: ViewKind) -> Tensor:
    """Make all views of one kind of some images, one after the other.

    Args:
        images: b images of (3, height, width) uint8.
        parameters: Parameters of count * b views, view-major.
        kind: The kind of the views.

    Returns:
        (count * b, 3, pixels, pixels) uint8, view-major: the first view of every image, then the second, …
    """
    return torch.stack([make_view(images[row % len(images)], parameters, row, kind) for row in range(len(parameters))])


def draw_for_batch(
    images: list[Tensor], kind: ViewKind, *, first_view: int, seed: int, epoch: int, numbers: NDArray[np.int64]
) -> ViewParameters:
    """Draw the parameters of all views of one kind of some images, view-major.

    Args:
        images: (3, height, width) uint8 each.
        kind: The kind of the views.
        first_view: Number of this kind's first view among all views of an image.
        seed: The seed.
        epoch: The epoch.
        numbers: (b,) indices of the images in their data set.
    """
    sizes = np.array([image.shape[-2:] for image in images], dtype=np.int64).reshape(-1, 2)
    return draw_views(
        kind,
        seed=seed,
        epochs=np.full(kind.count * len(numbers), epoch, dtype=np.int64),
        images=np.tile(numbers, kind.count),
        views=first_view + np.repeat(np.arange(kind.count, dtype=np.int64), len(numbers)),
        sizes=np.tile(sizes, (kind.count, 1)),
    )
