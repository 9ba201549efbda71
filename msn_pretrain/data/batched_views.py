"""Views of many images at once on a GPU: the parameters and the changes of views.py, with resizing by matrix products.

Each step takes all views of one kind that it changes. As on a CPU, pixels are rounded to whole levels from 0 to 255 after each
step, so both paths agree except for the rounding of the resize.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msn_eval.errors import ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_pretrain.data.views import ADJUSTMENTS, Amount, ViewKind, ViewParameters, blur, turn_grey

_MOST_BYTES = 1 << 28  # of crops or views as float32 that are processed at once; temporaries are a few times as large
_Change = Callable[[Tensor, Amount], None]


def make_batched_views(pixels: Tensor, sizes: NDArray[np.int64], parameters: ViewParameters, kind: ViewKind) -> Tensor:
    """Make all views of one kind of some images.

    Memory is bounded: some views at a time, and half as many on out-of-memory. The host never waits for the device.

    Args:
        pixels: (p, 3) uint8, the pixels of b images, row by row, one image after the other.
        sizes: (b, 2), their heights and widths.
        parameters: Parameters of count * b views, view-major.
        kind: The kind of the views.

    Returns:
        (count * b, 3, pixels, pixels) uint8 on that device, view-major.

    Raises:
        ResourceError: One view does not fit into memory.
    """
    n, side = len(parameters), kind.pixels
    image_pixels = sizes.prod(axis=1)
    images = np.column_stack([np.cumsum(image_pixels) - image_pixels, sizes[:, 1]])[np.arange(n) % len(sizes)]
    # By size, so that crops that are processed together are padded little.
    order = np.argsort(parameters.boxes[:, 2:].prod(axis=1), kind="stable")
    crops = np.column_stack([np.arange(n), images, parameters.boxes])[order]
    changes = _list_changes(parameters)
    table, *amounts = _copy_at_once([crops, *(np.stack([rows, values]) for _, rows, values in changes)], pixels.device)
    views = torch.empty(n, 3, side, side, dtype=torch.uint8, device=pixels.device)

    def resize(span: Sequence[int]) -> None:
        own = slice(span[0], span[-1] + 1)
        height, width = crops[own, -2:].max(axis=0).tolist()
        _resize(views, pixels, table[own].long(), height, width, kind)

    def change(function: _Change, rows: Tensor, values: Tensor, span: Sequence[int]) -> None:
        own = slice(span[0], span[-1] + 1)
        chosen = views[rows[own]].float()
        function(chosen, values[own].view(-1, 1, 1, 1))
        views[rows[own]] = chosen.to(torch.uint8)

    for span in _split(crops[:, -2:]):
        _halve_on_out_of_memory(resize, span)
    most = max(1, _MOST_BYTES // (12 * side**2))
    for (function, rows, _), copied in zip(changes, amounts, strict=True):
        for first in range(0, len(rows), most):
            span = range(first, min(first + most, len(rows)))
            _halve_on_out_of_memory(partial(change, function, copied[0].long(), copied[1].float()), span)
    return views


def _list_changes(own: ViewParameters) -> list[tuple[_Change, NDArray[np.int64], NDArray[np.float64]]]:
    """Return what to do after resizing, in order: a function, the views that it changes, and by how much."""
    changes: list[tuple[_Change, NDArray[np.bool_], NDArray[np.float64]]] = [(_flip, own.flipped, own.sigmas)]
    for position in range(own.order.shape[1]):
        for which, adjust in enumerate(ADJUSTMENTS):
            changes.append((adjust, own.jittered & (own.order[:, position] == which), own.factors[:, which]))
    changes += [(turn_grey, own.greyed, own.sigmas), (blur, own.sigmas > 0, own.sigmas)]
    return [(change, np.flatnonzero(chosen), amounts[chosen]) for change, chosen, amounts in changes if chosen.any()]


def _flip(views: Tensor, unused: Amount) -> None:
    views.copy_(views.flip(3))


def _copy_at_once(arrays: Sequence[NDArray[np.float64]], device: torch.device) -> list[Tensor]:
    """Copy arrays of numbers to a device by one copy that the host does not wait for."""
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays], dtype=np.float64))
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = torch.split(packed.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _split(sizes: NDArray[np.int64]) -> list[range]:
    """Split crops into spans that are within _MOST_BYTES as float32, padded to the largest of the span."""
    spans, first, height, width = [], 0, 0, 0
    for row, (own_height, own_width) in enumerate(sizes.tolist()):
        height, width = max(height, own_height), max(width, own_width)
        if row > first and 12 * height * width * (row + 1 - first) > _MOST_BYTES:
            spans.append(range(first, row))
            first, height, width = row, own_height, own_width
    return [*spans, range(first, len(sizes))]


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


def _resize(views: Tensor, pixels: Tensor, crops: Tensor, most_high: int, most_wide: int, kind: ViewKind) -> None:
    """Crop, and resize with antialiasing: two products with each view's own weights, each rounded to whole levels.

    Args:
        views: All views; those of the crops are written.
        pixels: The pixels of the images.
        crops: (n, 7) int64: number of the view, first pixel and width of the image, top, left, height and width of the crop.
        most_high: Largest height of these crops.
        most_wide: Largest width.
        kind: The kind of the views.
    """
    rows, starts, strides, tops, lefts, heights, widths = (column[:, None] for column in crops.unbind(1))
    n, side = len(crops), kind.pixels
    down = torch.arange(most_high, device=pixels.device).minimum(heights - 1) + tops
    across = torch.arange(most_wide, device=pixels.device).minimum(widths - 1) + lefts
    cropped = pixels[(starts + down * strides)[:, :, None] + across[:, None]]  # (n, height, width, 3)
    lines = cropped.transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format).view(n, -1, most_wide)
    narrow = lines @ _compute_resizing_weights(widths, most_wide, kind).mT  # (n, height * 3, side)
    narrow = narrow.add_(0.5).floor_().clamp_(0, 255).view(n, most_high, 3 * side)
    resized = _compute_resizing_weights(heights, most_high, kind) @ narrow  # (n, side, 3 * side)
    resized = resized.add_(0.5).floor_().clamp_(0, 255).view(n, side, 3, side)
    views[rows[:, 0]] = resized.transpose(1, 2).to(torch.uint8)


def _compute_resizing_weights(lengths: Tensor, size: int, kind: ViewKind) -> Tensor:
    """Return (n, pixels, size) weights that resize the first `lengths` (n, 1) of `size` pixels to `pixels` pixels: the filter
    kernel around each output pixel's centre, stretched if the image shrinks."""
    scale = (lengths / kind.pixels)[:, :, None].float()
    positions = torch.arange(size, device=lengths.device)
    centres = (torch.arange(kind.pixels, device=lengths.device) + 0.5)[:, None] * scale
    distance = ((positions + 0.5 - centres) / scale.clamp(min=1)).abs_()
    weights = _triangle(distance) if kind.interpolation == "bilinear" else _cubic(distance)
    weights *= (positions < lengths)[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Compute Keys' cubic kernel with a = -1/2, as Pillow does."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
