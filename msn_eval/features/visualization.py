"""Figures: nearest training images under masking, attention maps, and a map of the classes."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from msn_eval.data.images import EvalTransform, ImageSet
from msn_eval.data.loader import PixelList, load_pixels
from msn_eval.errors import DataError, printable
from msn_eval.features.encoder import Encoder
from msn_eval.features.extraction import Features
from msn_eval.features.patch_drop import choose_patches, encode_kept_patches, patches_a_side

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
_INCHES = 1.25  # of one small image
_DOTS_PER_INCH = 110
_HIDDEN = 127  # grey
_RIGHT, _WRONG = "#0b8a6a", "#c92a2a"
_MOST_NAMES = 40


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The nearest training images of some images, at one share of hidden patches.

    Attributes:
        masked: Share of patches that are hidden.
        shown: (b, S, S, 3) uint8, the images with hidden patches in grey.
        nearest: (b, k) int64, rows of the training features, nearest first.
    """

    masked: float
    shown: Pixels
    nearest: NDArray[np.int64]


def read_pixels(images: ImageSet, image_ids: Sequence[str], transform: EvalTransform) -> Tensor:
    """Read images as (b, S, S, 3) uint8 pixels. Raises DataError for an image that cannot be used."""
    listed = PixelList(source=images.source, image_ids=list(image_ids), transform=transform, hashes=None)
    (batch,) = load_pixels(listed, batch_size=len(listed), workers=0)
    if batch.failures:
        image_id, reason = batch.failures[0]
        raise DataError(reason, where=images.source.place(image_id), hint="Choose another image.")
    return torch.as_tensor(batch.pixels)


def find_neighbours(
    encoder: Encoder, pixels: Tensor, train: Features, *, masked: Sequence[float], count: int, seed: int
) -> list[Neighbours]:
    """Find the nearest training images by cosine similarity, for images with more and more hidden patches.

    A larger share hides all patches that a smaller share hides.

    Args:
        encoder: A plain Vision Transformer.
        pixels: (b, S, S, 3) uint8.
        train: Features of complete training images at the tap `cls-norm`.
        masked: Shares of patches to hide, in [0, 1).
        count: Neighbours per image.
        seed: Seed of the hidden patches.
    """
    side = patches_a_side(encoder)
    rows = functional.normalize(train.values.float(), dim=1)
    neighbours = []
    for share in masked:
        generator = torch.Generator().manual_seed(seed)  # the same order of patches for every share
        visible = choose_patches(side * side, masked=share, images=len(pixels), generator=generator)
        queries = functional.normalize(
            encode_kept_patches(encoder, pixels, ["cls-norm"], visible)["cls-norm"].cpu(), dim=1
        )
        nearest = (queries @ rows.T).topk(min(count, len(rows)), dim=1).indices
        shown = hide_patches(pixels, visible, side=side)
        neighbours.append(Neighbours(masked=share, shown=shown, nearest=nearest.numpy()))
    return neighbours


def hide_patches(pixels: Tensor, visible: Tensor, *, side: int) -> Pixels:
    """Return the images with all patches in grey that are not visible, (b, S, S, 3) uint8."""
    seen = torch.zeros(len(pixels), side * side, dtype=torch.bool).scatter_(1, visible, value=True)
    scale = pixels.shape[1] // side
    mask = seen.view(-1, side, side).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return torch.where(mask[..., None], pixels, torch.tensor(_HIDDEN, dtype=torch.uint8)).numpy()


def draw_neighbours(
    neighbours: Sequence[Neighbours],
    *,
    labels: Sequence[int],
    train: Features,
    train_pixels: dict[int, Pixels],
    classes: Sequence[str],
) -> "Figure":
    """Draw each image with hidden patches beside its nearest training images, in green frames if the class is the same.

    Args:
        neighbours: One entry per share of hidden patches.
        labels: Class of each image.
        train: Features of the training images.
        train_pixels: Pixels of the neighbours, by row of `train`.
        classes: Class names.
    """
    count = neighbours[0].nearest.shape[1]
    figure, grid = _draw_grid(len(labels) * len(neighbours), count + 1)
    for number, label in enumerate(labels):
        for step, masking in enumerate(neighbours):
            row_axes = grid[number * len(neighbours) + step]
            _draw_image(row_axes[0], masking.shown[number], f"{masking.masked:.0%} hidden")
            row_axes[0].set_ylabel(_shorten(classes[label]) if step == 0 else "", fontsize=8)
            for axes, row in zip(row_axes[1:], masking.nearest[number].tolist(), strict=True):
                neighbour_label = int(train.labels[row])
                _draw_image(axes, train_pixels[row], _shorten(classes[neighbour_label]))
                for spine in axes.spines.values():
                    spine.set(visible=True, linewidth=2.5, color=_RIGHT if neighbour_label == label else _WRONG)
    return figure


def draw_attention(maps: Tensor, pixels: Tensor, names: Sequence[str]) -> "Figure":
    """Draw each image, the mean attention of its heads over it, and the attention of each head.

    Args:
        maps: (b, heads, rows, columns), as returned by `attention_maps`. Each map has its own colour scale.
        pixels: (b, S, S, 3) uint8.
        names: One per image.
    """
    size = pixels.shape[1]
    figure, grid = _draw_grid(len(pixels), maps.shape[1] + 2)
    for number, row_axes in enumerate(grid):
        _draw_image(row_axes[0], pixels[number].numpy(), "image")
        row_axes[0].set_ylabel(_shorten(names[number]), fontsize=8)
        _draw_image(row_axes[1], pixels[number].numpy(), "all heads")
        mean = maps[number].mean(dim=0).numpy()
        row_axes[1].imshow(mean, cmap="magma", alpha=0.65, extent=(0, size, size, 0), interpolation="bilinear")
        for head, axes in enumerate(row_axes[2:]):
            axes.imshow(maps[number, head].numpy(), cmap="magma", extent=(0, size, size, 0))
            _draw_image(axes, None, f"head {head + 1}")
    return figure


def project(features: Features) -> tuple[NDArray[np.float64], float]:
    """Project L2-normalised features onto their first two principal components.

    Returns:
        (n, 2) coordinates, with the sign of each component such that its largest loading is positive; and the share of the
        variance that they hold.
    """
    rows = functional.normalize(features.values.double(), dim=1)
    rows = rows - rows.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(rows, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()
    return (rows @ axes.T).numpy(), float((sizes[:2] ** 2).sum() / (sizes**2).sum())


def draw_classes(features: Features, classes: Sequence[str]) -> "Figure":
    """Draw the images as points by their first two principal components, with class names at the class means."""
    from matplotlib.figure import Figure

    points, share = project(features)
    labels = features.labels.numpy()
    figure = Figure(figsize=(9, 8), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    axes.scatter(points[:, 0], points[:, 1], c=labels, cmap="turbo", s=7, alpha=0.45, linewidths=0)
    for label in sorted(set(labels.tolist()))[:_MOST_NAMES]:
        x, y = points[labels == label].mean(axis=0)
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        axes.text(x, y, _escape_math(classes[label]), ha="center", va="center", fontsize=9, weight="bold", bbox=box)
    axes.set_title(f"first two principal components, {share:.0%} of the variance", fontsize=10)
    axes.set(xticks=[], yticks=[])
    return figure


def as_png(figure: "Figure") -> bytes:
    """Return a figure as PNG bytes. Equal figures give equal bytes; characters that the font lacks are drawn as boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_grid(rows: int, columns: int) -> tuple["Figure", NDArray[np.object_]]:
    from matplotlib.figure import Figure

    size = (columns * _INCHES + 0.3, rows * (_INCHES + 0.18) + 0.1)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    cells: NDArray[np.object_] = figure.subplots(rows, columns, squeeze=False)
    return figure, cells


def _draw_image(axes: "object", pixels: Pixels | None, title: str) -> None:
    if pixels is not None:
        axes.imshow(pixels)  # type: ignore[attr-defined]
    axes.set_title(title, fontsize=7, pad=2)  # type: ignore[attr-defined]
    axes.set(xticks=[], yticks=[])  # type: ignore[attr-defined]


def _shorten(name: str) -> str:
    shown = _escape_math(name)
    return shown if len(shown) <= 16 else f"{shown[:15]}…"


def _escape_math(name: str) -> str:
    """Escape what matplotlib would read as mathematics."""
    return printable(name).replace("$", r"\$")
