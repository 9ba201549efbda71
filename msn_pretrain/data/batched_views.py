"""Views of many images at once: the numbers of views.py applied by tensor operations, each view by its own numbers.

On a GPU this is faster than the loader's workers; on small images it is so on a CPU too. Pixels stay whole numbers from 0 to
255 from step to step, as they do one image at a time, so that both ways agree to the rounding of the resizing.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad

from msn_pretrain.data.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewKind, ViewParameters, blur_radius

_LUMA = (0.2989, 0.587, 0.114)
_TO_LEVELS = 255 + 1.0 - 1e-3  # torchvision's factor from [0, 1] to whole levels by cutting off


def make_batched_views(images: Sequence[Tensor], parameters: ViewParameters, kind: ViewKind) -> Tensor:
    """Apply the numbers of every view to its image.

    images:     b of (3, height, width) uint8, on one device
    parameters: of count · b views, view-major
    returns:    (count · b, 3, pixels, pixels) uint8 on that device
    """
    device = images[0].device
    padded = _padded(images)
    made = []
    for view in range(kind.count):
        own = parameters.rows(slice(view * len(images), (view + 1) * len(images)))
        made.append(_changed(_resized(padded, own.boxes, kind), own, device).to(torch.uint8))
    return torch.cat(made) if made else torch.empty(0, 3, kind.pixels, kind.pixels, dtype=torch.uint8, device=device)


def _padded(images: Sequence[Tensor]) -> Tensor:
    """Give the images as one (b, 3, H, W) float tensor, smaller ones with zeros behind."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    if all(image.shape[-2:] == (height, width) for image in images):
        return torch.stack(list(images)).float()
    whole = torch.zeros(len(images), 3, height, width, device=images[0].device)
    for row, image in enumerate(images):
        whole[row, :, : image.shape[1], : image.shape[2]] = image
    return whole


def _resized(images: Tensor, boxes: NDArray[np.int64], kind: ViewKind) -> Tensor:
    """Crop and resize by antialiased interpolation: two products with each view's own weights, whole levels after each."""
    box = torch.from_numpy(boxes).to(images.device)
    down = _resizing_weights(box[:, 0], box[:, 2], images.shape[2], kind)
    across = _resizing_weights(box[:, 1], box[:, 3], images.shape[3], kind)
    narrow = (images @ across.transpose(1, 2)[:, None] + 0.5).floor_().clamp_(0, 255)  # (b, 3, H, pixels)
    return (down[:, None] @ narrow + 0.5).floor_().clamp_(0, 255)


def _resizing_weights(starts: Tensor, lengths: Tensor, size: int, kind: ViewKind) -> Tensor:
    """Give (b, pixels, size) weights by which the run from `start` on becomes `pixels` pixels: a bump around each one's
    centre, stretched to the larger of the two scales."""
    scale = (lengths / kind.pixels)[:, None, None].float()
    places = torch.arange(size, device=starts.device) - starts[:, None]  # within the box
    centres = (torch.arange(kind.pixels, device=starts.device) + 0.5)[None, :, None] * scale
    distance = ((places[:, None, :] + 0.5 - centres) / scale.clamp(min=1)).abs()
    inside = (places >= 0) & (places < lengths[:, None])
    weights = (_triangle(distance) if kind.interpolation == "bilinear" else _cubic(distance)) * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Give Keys' cubic with a = -1/2, as antialiasing libraries take it."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _changed(views: Tensor, own: ViewParameters, device: torch.device) -> Tensor:
    """Flip, change the colours of, grey and blur those views whose numbers say so."""
    if own.flipped.any():
        rows = _rows(own.flipped, device)
        views[rows] = views[rows].flip(3)
    for place in range(own.order.shape[1]):
        for which, adjust in ((BRIGHTNESS, _brighter), (CONTRAST, _contrasted), (SATURATION, _saturated), (HUE, _hued)):
            chosen = own.jittered & (own.order[:, place] == which)
            if chosen.any():
                rows = _rows(chosen, device)
                factors = torch.from_numpy(own.factors[chosen, which]).float().to(device)
                views[rows] = adjust(views[rows], factors[:, None, None, None])
    if own.greyed.any():
        rows = _rows(own.greyed, device)
        views[rows] = _grey(views[rows]).expand(-1, 3, -1, -1)
    blurred = own.sigmas > 0
    if blurred.any():
        rows = _rows(blurred, device)
        views[rows] = _blurred(views[rows], torch.from_numpy(own.sigmas[blurred]).float().to(device))
    return views


def _rows(chosen: NDArray[np.bool_], device: torch.device) -> Tensor:
    return torch.from_numpy(np.flatnonzero(chosen)).to(device)


def _levels(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).floor_()


def _grey(views: Tensor) -> Tensor:
    red, green, blue = views.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).floor_()[:, None]


def _brighter(views: Tensor, factors: Tensor) -> Tensor:
    return _levels(views * factors)


def _contrasted(views: Tensor, factors: Tensor) -> Tensor:
    return _levels(views * factors + _grey(views).mean(dim=(1, 2, 3), keepdim=True) * (1 - factors))


def _saturated(views: Tensor, factors: Tensor) -> Tensor:
    return _levels(views * factors + _grey(views) * (1 - factors))


def _hued(views: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue of the HSV cone, as a share of the circle."""
    values = views / 255
    least, most = torch.aminmax(values, dim=1)
    spread = most - least
    safe = torch.where(spread == 0, 1.0, spread)
    red, green, blue = values.unbind(1)
    hue = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    saturation = spread / torch.where(most == 0, 1.0, most)
    turned = (hue / 6 + shifts[:, 0]).remainder_(1.0) * 6
    # Each channel is a function of its own distance to the hue: 0 within one sixth, 1 from two sixths on.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        place = (turned + offset).remainder_(6.0)
        channels.append(most * (1 - saturation * torch.minimum(place, 4 - place).clamp_(0, 1)))
    return (torch.stack(channels, dim=1) * _TO_LEVELS).floor_().clamp_(0, 255)


def _blurred(views: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each view by its own Gaussian, mirrored at the edges."""
    count, channels, side, _ = views.shape
    radius = blur_radius(side)
    places = torch.arange(-radius, radius + 1, device=views.device)
    kernels = torch.exp(-0.5 * (places / sigmas[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    stretched = pad(views.reshape(1, count * channels, side, side), [radius] * 4, mode="reflect")
    across = conv2d(stretched, kernels[:, None, None, :], groups=count * channels)
    down = conv2d(across, kernels[:, None, :, None], groups=count * channels)
    return down.reshape(views.shape).round_().clamp_(0, 255)
