"""Augmented views of training images.

The parameters of a view are a pure function of (seed, epoch, image, view), so they depend neither on the number of workers nor on
that of ranks. They are applied one image at a time in a loader worker, or to many images at once on a GPU (batched_views.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from msn_pretrain.data.sampler import uniforms

_ATTEMPTS = 10  # to fit a crop into the image, as in torchvision
_CORNER = 2 * _ATTEMPTS
_FLIP, _JITTER = _CORNER + 2, _CORNER + 3
_ORDER = _JITTER + 1
_FACTORS = _ORDER + 4
_GREY, _BLUR, _SIGMA = _FACTORS + 4, _FACTORS + 5, _FACTORS + 6
_NUMBERS = _SIGMA + 1
_HUE = 3  # among brightness, contrast, saturation and hue
BLUR_RADIUS = 6  # pixels, three times the widest sigma
_REACH = 5.5  # standard deviations, from where on a Gaussian is less than float32 resolves
_CACHED_PIXELS = 128  # side of a view that fits into a core's cache with all channels
_TO_LEVELS = (255 + 1.0 - 1e-3) / 255  # torchvision's factor from [0, 1] to whole levels by truncation


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
    least[:_HUE] = np.maximum(0.0, least[:_HUE])
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


@torch.inference_mode()
def make_views(images: Sequence[Tensor], parameters: ViewParameters, kind: ViewKind) -> Tensor:
    """Make all views of one kind of some images on a CPU, one after the other: one view's planes stay in the cache.

    Args:
        images: b images of (height, width, 3) uint8.
        parameters: Parameters of count * b views, view-major.
        kind: The kind of the views.

    Returns:
        (count * b, 3, pixels, pixels) uint8, view-major: the first view of every image, then the second, …
    """
    side = kind.pixels
    views = torch.empty(len(parameters), 3, side, side, dtype=torch.uint8)
    planes = torch.empty(1, 3, side, side)
    orders, factors, sigmas = (values.tolist() for values in (parameters.order, parameters.factors, parameters.sigmas))
    for row, (top, left, height, width) in enumerate(parameters.boxes.tolist()):
        # With their channels last torch resizes uint8 directly, in integers as Pillow does.
        crop = images[row % len(images)][None, top : top + height, left : left + width].permute(0, 3, 1, 2)
        resized = interpolate(crop, (side, side), mode=kind.interpolation, antialias=True)
        planes.copy_(resized.flip(3) if parameters.flipped[row] else resized)
        if parameters.jittered[row]:
            for which in orders[row]:
                ADJUSTMENTS[which](planes, factors[row][which])
        if parameters.greyed[row]:
            turn_grey(planes)
        if sigmas[row]:
            for channel in torch.split(planes, 1, dim=1) if side > _CACHED_PIXELS else (planes,):
                blur(channel, sigmas[row])
        views[row] = planes[0]
    return views


# Each of the functions below changes n views of (n, 3, pixels, pixels) float32 in place. Values are whole levels from 0 to 255
# before and after, rounded as torchvision's functions on uint8 do. An amount is one number for all views, or (n, 1, 1, 1).
Amount = Tensor | float


def adjust_brightness(views: Tensor, factor: Amount) -> None:
    """Multiply by a factor."""
    views.mul_(factor).clamp_(max=255).floor_()


def adjust_contrast(views: Tensor, factor: Amount) -> None:
    """Scale the distance to the mean grey level by a factor."""
    mean = _compute_grey(views).mean(dim=(1, 2, 3), keepdim=True)
    _blend(views, mean, factor)


def adjust_saturation(views: Tensor, factor: Amount) -> None:
    """Scale the distance to each pixel's grey level by a factor."""
    _blend(views, _compute_grey(views), factor)


def _blend(views: Tensor, other: Tensor, factor: Amount) -> None:
    other.mul_(1 - factor)
    if isinstance(factor, Tensor):
        views.mul_(factor).add_(other)
    else:
        torch.add(other, views, alpha=factor, out=views)  # one pass instead of two
    views.clamp_(0, 255).floor_()


def adjust_hue(views: Tensor, shift: Amount) -> None:
    """Shift the hue in HSV by a share of the circle, from -1/2 to 1/2."""
    red, green, blue = torch.split(views, 1, dim=1)
    least, most = torch.minimum(red, green), torch.maximum(red, green)
    torch.minimum(least, blue, out=least)
    torch.maximum(most, blue, out=most)
    # Times the chroma c = most - least, the hue's distance to cyan is 2 c + least + red - green - blue, from 0 to 3 c, on the
    # side of blue or of green. So no division is needed, and no case where c is 0.
    chroma = blue - green
    hue = (red - green).sub_(blue).add_(most, alpha=2).sub_(least).copysign_(chroma)
    least.mul_(_TO_LEVELS)
    most.mul_(_TO_LEVELS)
    torch.sub(most, least, out=chroma)
    hue.mul_(_TO_LEVELS)
    if isinstance(shift, Tensor):
        hue.addcmul_(chroma, 6 * shift)
    else:
        hue.add_(chroma, alpha=6 * shift)
    # A channel is `most` within c of its own hue and `least` from 2 c on. Red is opposite of cyan.
    torch.abs(hue, out=red).sub_(chroma, alpha=3)
    torch.add(hue, chroma, out=green)
    torch.sub(hue, chroma, out=blue)
    views.abs_().sub_(chroma, alpha=3).abs_().sub_(chroma.sub_(least))
    torch.maximum(views, least, out=views)
    torch.minimum(views, most, out=views)
    views.floor_()


def turn_grey(views: Tensor, unused: Amount = 0.0) -> None:
    """Replace each channel by the grey level."""
    views.copy_(_compute_grey(views))


def _compute_grey(views: Tensor) -> Tensor:
    red, green, blue = torch.split(views, 1, dim=1)
    grey: Tensor = (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()
    return grey


ADJUSTMENTS: tuple[Callable[[Tensor, Amount], None], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def blur(views: Tensor, sigma: Amount) -> None:
    """Blur with a Gaussian of 13 x 13 pixels, less in smaller views; edges are reflected.

    It is separable. Each direction adds the padded views to themselves, shifted and weighted, with all rows as one.
    """
    n, side = len(views), views.shape[-1]
    widest = min(BLUR_RADIUS, side - 1)
    kernels = torch.exp(-0.5 * (torch.arange(widest + 1, device=views.device) / sigma) ** 2).view(-1, widest + 1)
    kernels /= 2 * kernels.sum(dim=1, keepdim=True) - 1
    radius = widest if isinstance(sigma, Tensor) else min(widest, round(_REACH * sigma))
    length = side + 2 * radius
    rows = pad(views, [radius] * 4, mode="reflect").view(n, -1)
    for step in (1, length):
        taps = [
            rows[:, shift : rows.shape[1] - 2 * radius * step + shift]
            for shift in range(0, 2 * radius * step + 1, step)
        ]
        rows = taps[radius] * kernels[:, :1]
        for distance in range(1, radius + 1):
            rows.addcmul_(taps[radius - distance], kernels[:, distance : distance + 1])
            rows.addcmul_(taps[radius + distance], kernels[:, distance : distance + 1])
    blurred = rows.as_strided(views.shape, (rows.stride(0), length**2, length, 1))
    torch.round(blurred, out=views)


def draw_for_batch(
    sizes: NDArray[np.int64], kind: ViewKind, *, first_view: int, seed: int, epoch: int, numbers: NDArray[np.int64]
) -> ViewParameters:
    """Draw the parameters of all views of one kind of some images, view-major.

    Args:
        sizes: (b, 2), height and width of each image.
        kind: The kind of the views.
        first_view: Number of this kind's first view among all views of an image.
        seed: The seed.
        epoch: The epoch.
        numbers: (b,) indices of the images in their data set.
    """
    return draw_views(
        kind,
        seed=seed,
        epochs=np.full(kind.count * len(numbers), epoch, dtype=np.int64),
        images=np.tile(numbers, kind.count),
        views=first_view + np.repeat(np.arange(kind.count, dtype=np.int64), len(numbers)),
        sizes=np.tile(sizes, (kind.count, 1)),
    )
