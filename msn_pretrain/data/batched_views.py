"""Views of many images at once: the parameters of views.py, applied with tensor operations.

This is faster than loader workers on a GPU, and for small images on a CPU too. As in views.py, pixels are rounded to whole levels
from 0 to 255 after each step, so both implementations agree except for the rounding of the resize.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad

from msn_eval.errors import ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_pretrain.data.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewKind, ViewParameters, blur_radius

_LUMA = (0.2989, 0.587, 0.114)
_TO_LEVELS = 255 + 1.0 - 1e-3  # torchvision's factor from [0, 1] to whole levels by truncation

_MOST_BYTES = 1 << 28  # of images or views as float32 that are processed at once; temporaries are a few times as large
_Change = Callable[[Tensor, Tensor], Tensor]


def make_batched_views(images: Sequence[Tensor], parameters: ViewParameters, kind: ViewKind) -> Tensor:
    """Make all views of one kind of some images.

    Memory is bounded: large images are resized a few at a time, and half as many on out-of-memory.

    Args:
        images: b images of (3, height, width) uint8, on one device.
        parameters: Parameters of count * b views, view-major.
        kind: The kind of the views.

    Returns:
        (count * b, 3, pixels, pixels) uint8 on that device, view-major.

    Raises:
        ResourceError: One image does not fit into memory.
    """
    device, b = images[0].device, len(images)
    boxes = torch.from_numpy(parameters.boxes).to(device, non_blocking=True).view(kind.count, b, 4)
    views = torch.empty(kind.count, b, 3, kind.pixels, kind.pixels, dtype=torch.uint8, device=device)

    def resize(rows: Sequence[int]) -> None:
        padded = _pad_to_largest([images[row] for row in rows])
        index = torch.tensor(rows).to(device, non_blocking=True)
        for view, own in zip(views, boxes, strict=True):
            view[index] = _resize(padded, own[index], kind).to(torch.uint8)

    def change(rows: Sequence[int]) -> None:
        own = slice(rows[0], rows[-1] + 1)
        flat[own] = _apply_changes(flat[own].float(), parameters.rows(own)).to(torch.uint8)

    for rows in _group_by_size([image.shape[1:] for image in images]):
        _halve_on_out_of_memory(resize, rows)
    flat = views.view(-1, 3, kind.pixels, kind.pixels)
    most = max(1, _MOST_BYTES // (12 * kind.pixels**2))
    for first in range(0, len(flat), most):
        _halve_on_out_of_memory(change, range(first, min(first + most, len(flat))))
    return flat


def _group_by_size(sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the numbers of the images in groups that are within _MOST_BYTES as float32, padded to the largest of the group."""
    if len(set(map(tuple, sizes))) == 1:
        most = max(1, _MOST_BYTES // (12 * sizes[0][0] * sizes[0][1]))
        return [list(range(first, min(first + most, len(sizes)))) for first in range(0, len(sizes), most)]
    groups: list[list[int]] = [[]]
    height = width = 0
    for row in sorted(range(len(sizes)), key=lambda row: (sizes[row][0] * sizes[row][1], row)):
        height, width = max(height, sizes[row][0]), max(width, sizes[row][1])
        if groups[-1] and 12 * height * width * (len(groups[-1]) + 1) > _MOST_BYTES:
            groups.append([])
            height, width = sizes[row]
        groups[-1].append(row)
    return groups


def _halve_on_out_of_memory(run: Callable[[Sequence[int]], None], rows: Sequence[int]) -> None:
    """Call a function with some rows; on out-of-memory, with each half of them."""
    try:
        return run(rows)
    except OUT_OF_MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Outside of the except block, which would keep the failed attempt's tensors alive.
    if len(rows) == 1:
        raise ResourceError(
            f"the views of one image do not fit into memory: {reason}",
            hint="Make them in the loader (views.made=loader), or use a smaller optimization.batch_size.",
        )
    middle = len(rows) // 2
    _halve_on_out_of_memory(run, rows[:middle])
    return _halve_on_out_of_memory(run, rows[middle:])


def _pad_to_largest(images: Sequence[Tensor]) -> Tensor:
    """Return the images as one (b, 3, H, W) float tensor, padded with zeros at the bottom and the right."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    if all(image.shape[-2:] == (height, width) for image in images):
        return torch.stack(list(images)).float()
    padded = torch.zeros(len(images), 3, height, width, device=images[0].device)
    for row, image in enumerate(images):
        padded[row, :, : image.shape[1], : image.shape[2]] = image
    return padded


def _resize(images: Tensor, box: Tensor, kind: ViewKind) -> Tensor:
    """Crop and resize with antialiasing: two products with each view's own weights, each rounded to whole levels."""
    down = _resizing_weights(box[:, 0], box[:, 2], images.shape[2], kind)
    across = _resizing_weights(box[:, 1], box[:, 3], images.shape[3], kind)
    narrow = (images @ across.transpose(1, 2)[:, None] + 0.5).floor_().clamp_(0, 255)  # (b, 3, H, pixels)
    return (down[:, None] @ narrow + 0.5).floor_().clamp_(0, 255)


def _resizing_weights(starts: Tensor, lengths: Tensor, size: int, kind: ViewKind) -> Tensor:
    """Return (b, pixels, size) weights that resize `lengths` pixels from `starts` on to `pixels` pixels: the filter kernel around
    each output pixel's centre, stretched if the image shrinks."""
    scale = (lengths / kind.pixels)[:, None, None].float()
    positions = torch.arange(size, device=starts.device) - starts[:, None]  # within the box
    centres = (torch.arange(kind.pixels, device=starts.device) + 0.5)[None, :, None] * scale
    distance = ((positions[:, None, :] + 0.5 - centres) / scale.clamp(min=1)).abs()
    inside = (positions >= 0) & (positions < lengths[:, None])
    weights = (_triangle(distance) if kind.interpolation == "bilinear" else _cubic(distance)) * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Compute Keys' cubic kernel with a = -1/2, as Pillow does."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _apply_changes(views: Tensor, own: ViewParameters) -> Tensor:
    """Flip, jitter, grey and blur the views whose parameters say so, in place."""
    adjustments: dict[int, _Change] = {
        BRIGHTNESS: _adjust_brightness,
        CONTRAST: _adjust_contrast,
        SATURATION: _adjust_saturation,
        HUE: _adjust_hue,
    }
    changes: list[tuple[_Change, NDArray[np.bool_], NDArray[np.float64]]] = [(_flip, own.flipped, own.sigmas)]
    for position in range(own.order.shape[1]):
        for which, adjust in adjustments.items():
            changes.append((adjust, own.jittered & (own.order[:, position] == which), own.factors[:, which]))
    changes += [(_turn_grey, own.greyed, own.sigmas), (_blur, own.sigmas > 0, own.sigmas)]
    wanted = [(change, np.flatnonzero(chosen), amounts[chosen]) for change, chosen, amounts in changes if chosen.any()]
    if not wanted:
        return views
    # All numbers in one copy: each copy of its own would make the host wait for the device.
    numbers = torch.from_numpy(np.concatenate([values for _, rows, amounts in wanted for values in (rows, amounts)]))
    lengths = [len(values) for _, rows, amounts in wanted for values in (rows, amounts)]
    parts = iter(torch.split(numbers.to(views.device, non_blocking=True), lengths))
    for change, _, _ in wanted:
        rows, amounts = next(parts).long(), next(parts).float()
        views[rows] = change(views[rows], amounts)
    return views


def _flip(views: Tensor, unused: Tensor) -> Tensor:
    return views.flip(3)


def _turn_grey(views: Tensor, unused: Tensor) -> Tensor:
    return _grey(views).expand(-1, 3, -1, -1)


def _round_down(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).floor_()


def _grey(views: Tensor) -> Tensor:
    red, green, blue = views.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).floor_()[:, None]


def _adjust_brightness(views: Tensor, factors: Tensor) -> Tensor:
    factors = factors[:, None, None, None]
    return _round_down(views * factors)


def _adjust_contrast(views: Tensor, factors: Tensor) -> Tensor:
    factors = factors[:, None, None, None]
    return _round_down(views * factors + _grey(views).mean(dim=(1, 2, 3), keepdim=True) * (1 - factors))


def _adjust_saturation(views: Tensor, factors: Tensor) -> Tensor:
    factors = factors[:, None, None, None]
    return _round_down(views * factors + _grey(views) * (1 - factors))


def _adjust_hue(views: Tensor, shifts: Tensor) -> Tensor:
    """Shift the hue in HSV, as a share of the circle."""
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
    turned = (hue / 6 + shifts[:, None, None]).remainder_(1.0) * 6
    # Each channel depends on its distance to the hue: 0 within one sixth of the circle, 1 from two sixths on.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        position = (turned + offset).remainder_(6.0)
        channels.append(most * (1 - saturation * torch.minimum(position, 4 - position).clamp_(0, 1)))
    return (torch.stack(channels, dim=1) * _TO_LEVELS).floor_().clamp_(0, 255)


def _blur(views: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each view with its own Gaussian; edges are reflected."""
    count, channels, side, _ = views.shape
    radius = blur_radius(side)
    offsets = torch.arange(-radius, radius + 1, device=views.device)
    kernels = torch.exp(-0.5 * (offsets / sigmas[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    padded = pad(views.reshape(1, count * channels, side, side), [radius] * 4, mode="reflect")
    across = conv2d(padded, kernels[:, None, None, :], groups=count * channels)
    down = conv2d(across, kernels[:, None, :, None], groups=count * channels)
    return down.reshape(views.shape).round_().clamp_(0, 255)
