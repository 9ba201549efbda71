"""Views: what a training image is turned into before a network sees it.

The numbers of a view are drawn once, by a pure function of (seed, epoch, image, view); how they are applied, one image at a
time in a loader's worker or many at once on a GPU (batched_views.py), is another matter. So neither the number of workers
nor that of ranks moves any view.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msn_eval.errors import UsageError
from msn_pretrain.data.sampler import uniforms

_ATTEMPTS = 10  # to fit a crop into the image, as torchvision makes them
_CORNER = 2 * _ATTEMPTS
_FLIP, _JITTER = _CORNER + 2, _CORNER + 3
_ORDER = _JITTER + 1
_FACTORS = _ORDER + 4
_GREY, _BLUR, _SIGMA = _FACTORS + 4, _FACTORS + 5, _FACTORS + 6
_NUMBERS = _SIGMA + 1
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
BLUR_RADIUS = 6  # pixels, three times the widest sigma


@dataclass(frozen=True, kw_only=True)
class ViewKind:
    """How views of one kind are drawn.

    pixels:      of a side
    count:       of such views an image
    scale:       the crop's share of the image's area, from and to
    ratio:       width to height, from and to
    flip:        probability of a horizontal flip
    jitter:      probability of the colour jitter
    amounts:     of it: brightness, contrast, saturation, hue, as torchvision's ColorJitter counts; MSN's are SimCLR's at
                 strength 0.5
    grey:        probability of dropping the colours
    blur:        probability of a Gaussian blur, with a `sigma` in pixels, from and to
    interpolation: bilinear or bicubic, antialiased
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

    def __post_init__(self) -> None:
        if self.pixels < 1 or self.count < 0:
            raise UsageError(f"{self.count} views of {self.pixels} pixels cannot be made")
        for name, (least, most) in (("scale", self.scale), ("ratio", self.ratio), ("sigma", self.sigma)):
            if not 0 < least <= most:
                raise UsageError(f"{name} of a view goes from {least} to {most}", hint="Give a range above 0.")
        if self.scale[1] > 1:
            raise UsageError(f"a crop of {self.scale[1]} of the image's area", hint="Give a share of at most 1.")
        for name in ("flip", "jitter", "grey", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} of a view is {getattr(self, name)}", hint="Give a probability.")
        if min(self.amounts) < 0 or self.amounts[HUE] > 0.5:
            raise UsageError(f"a colour jitter by {self.amounts}", hint="Give amounts from 0, the hue's up to 0.5.")


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """The numbers of n views.

    boxes:   (n, 4) int64: top, left, height, width of the crop, in pixels of the image
    flipped: (n,) bool
    order:   (n, 4) int64: which of brightness, contrast, saturation, hue comes first, second, …
    factors: (n, 4): by which each is changed, in that order of names; 1, 1, 1, 0 leave it alone
    greyed:  (n,) bool
    sigmas:  (n,): of the blur in pixels, 0 for none
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
        """Give the numbers of some of the views."""
        return ViewParameters(**{one.name: getattr(self, one.name)[which] for one in fields(self)})


def draw_views(
    kind: ViewKind,
    *,
    seed: int,
    epochs: NDArray[np.int64],
    images: NDArray[np.int64],
    views: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> ViewParameters:
    """Draw the numbers of n views, each a pure function of (seed, epoch, image, view) and of the image's size.

    epochs, images, views: (n,) numbers from 0
    sizes: (n, 2) int64: height and width of each view's image
    """
    drawn = uniforms(np.stack([epochs, images, views], axis=1), seed=seed, count=_NUMBERS)
    # Brightness, contrast and saturation scale around 1 and not below 0, the hue shifts around 0.
    amounts, middle = np.array(kind.amounts), np.array([1.0, 1.0, 1.0, 0.0])
    least, most = middle - amounts, middle + amounts
    least[:HUE] = np.maximum(0.0, least[:HUE])
    jittered = drawn[:, _JITTER] < kind.jitter
    factors = least + (most - least) * drawn[:, _FACTORS : _FACTORS + 4]
    blurred = drawn[:, _BLUR] < kind.blur
    sigmas = kind.sigma[0] + (kind.sigma[1] - kind.sigma[0]) * drawn[:, _SIGMA]
    return ViewParameters(
        boxes=_crops(kind, drawn, sizes),
        flipped=drawn[:, _FLIP] < kind.flip,
        jittered=jittered,
        order=np.argsort(drawn[:, _ORDER : _ORDER + 4], axis=1, kind="stable"),
        factors=np.where(jittered[:, None], factors, middle),
        greyed=drawn[:, _GREY] < kind.grey,
        sigmas=np.where(blurred, sigmas, 0.0),
    )


def _crops(kind: ViewKind, drawn: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give boxes as torchvision's RandomResizedCrop draws them: ten attempts to fit area and ratio into the image, then the
    largest box in its middle whose ratio is allowed."""
    heights, widths = sizes[:, 0], sizes[:, 1]
    areas = (heights * widths)[:, None] * _between(kind.scale, drawn[:, 0:_CORNER:2])
    low, high = math.log(kind.ratio[0]), math.log(kind.ratio[1])
    ratios = np.exp(_between((low, high), drawn[:, 1:_CORNER:2]))
    tried_widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    tried_heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (tried_widths > 0) & (tried_widths <= widths[:, None])
    fits &= (tried_heights > 0) & (tried_heights <= heights[:, None])
    first, rows = fits.argmax(axis=1), np.arange(len(sizes))
    found = fits[rows, first]
    whole_heights, whole_widths = _largest(kind, heights, widths)
    box_heights = np.where(found, tried_heights[rows, first], whole_heights)
    box_widths = np.where(found, tried_widths[rows, first], whole_widths)
    tops = np.where(found, drawn[:, _CORNER] * (heights - box_heights + 1), (heights - box_heights) // 2)
    lefts = np.where(found, drawn[:, _CORNER + 1] * (widths - box_widths + 1), (widths - box_widths) // 2)
    return np.stack([tops.astype(np.int64), lefts.astype(np.int64), box_heights, box_widths], axis=1)


def _largest(
    kind: ViewKind, heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    shape = widths / heights
    whole_heights = np.where(shape < kind.ratio[0], np.rint(widths / kind.ratio[0]), heights).astype(np.int64)
    whole_widths = np.where(shape > kind.ratio[1], np.rint(heights * kind.ratio[1]), widths).astype(np.int64)
    return np.minimum(whole_heights, heights), np.minimum(whole_widths, widths)


def _between(ends: tuple[float, float], drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    return ends[0] + (ends[1] - ends[0]) * drawn


def make_view(image: Tensor, parameters: ViewParameters, row: int, kind: ViewKind) -> Tensor:
    """Apply the numbers of one view to an image, by torchvision's functions on uint8.

    image:   (3, height, width) uint8
    returns: (3, pixels, pixels) uint8
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as change

    side = kind.pixels
    mode = InterpolationMode(kind.interpolation)
    top, left, height, width = parameters.boxes[row].tolist()
    view = change.resized_crop(image, top, left, height, width, [side, side], mode, antialias=True)
    if parameters.flipped[row]:
        view = change.horizontal_flip(view)
    if parameters.jittered[row]:
        adjust = (change.adjust_brightness, change.adjust_contrast, change.adjust_saturation, change.adjust_hue)
        for which in parameters.order[row].tolist():
            view = adjust[which](view, float(parameters.factors[row, which]))
    if parameters.greyed[row]:
        view = change.rgb_to_grayscale(view, num_output_channels=3)
    if parameters.sigmas[row]:
        reach = 2 * blur_radius(side) + 1
        view = change.gaussian_blur(view, [reach, reach], [float(parameters.sigmas[row])] * 2)
    assert isinstance(view, Tensor)
    return view


def blur_radius(pixels: int) -> int:
    """Give how far the blur of a view reaches: mirrored at its edges, it reaches no farther than the view is wide."""
    return min(BLUR_RADIUS, pixels - 1)


def make_views(
    images: "list[Tensor]", kind: ViewKind, *, first_view: int, seed: int, epoch: int, numbers: NDArray[np.int64]
) -> Tensor:
    """Make all views of one kind of some images, one after the other.

    images:     (3, height, width) uint8 each
    first_view: the number of this kind's first view among all views of an image
    numbers:    (b,) of the images in their data set
    returns:    (count · b, 3, pixels, pixels) uint8, view-major: the first view of every image, then the second, …
    """
    drawn = draw_for_batch(images, kind, first_view=first_view, seed=seed, epoch=epoch, numbers=numbers)
    made = [make_view(images[row % len(images)], drawn, row, kind) for row in range(len(drawn))]
    return torch.stack(made) if made else torch.empty(0, 3, kind.pixels, kind.pixels, dtype=torch.uint8)


def draw_for_batch(
    images: "list[Tensor]", kind: ViewKind, *, first_view: int, seed: int, epoch: int, numbers: NDArray[np.int64]
) -> ViewParameters:
    """Draw the numbers for all views of one kind of some images, view-major; arguments as for `make_views`."""
    sizes = np.array([image.shape[-2:] for image in images], dtype=np.int64).reshape(-1, 2)
    return draw_views(
        kind,
        seed=seed,
        epochs=np.full(kind.count * len(numbers), epoch, dtype=np.int64),
        images=np.tile(numbers, kind.count),
        views=first_view + np.repeat(np.arange(kind.count, dtype=np.int64), len(numbers)),
        sizes=np.tile(sizes, (kind.count, 1)),
    )
