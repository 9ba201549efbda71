"""Pictures: which training images are nearest to an image that is partly hidden, where a network looks, how classes lie."""

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
from msn_eval.features.patch_drop import choose_patches, encode_visible, patches_a_side

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
    """The nearest training images of some images under one mask.

    masked:  the share of patches that was left out
    shown:   (b, S, S, 3) uint8, the images with hidden patches in grey
    nearest: (b, k) int64, rows of the bank, nearest first
    """

    masked: float
    shown: Pixels
    nearest: NDArray[np.int64]


def read_pixels(images: ImageSet, image_ids: Sequence[str], transform: EvalTransform) -> Tensor:
    """Give (b, S, S, 3) uint8 pixels. Raises DataError naming an image that cannot be used."""
    listed = PixelList(source=images.source, image_ids=list(image_ids), transform=transform, hashes=None)
    batches = []
    for batch in load_pixels(listed, batch_size=len(listed), workers=0):
        if batch.failures:
            image_id, reason = batch.failures[0]
            raise DataError(reason, where=images.source.place(image_id), hint="Choose another image.")
        batches.append(torch.as_tensor(batch.pixels))
    return torch.cat(batches)


def find_neighbours(
    encoder: Encoder, pixels: Tensor, bank: Features, *, masked: Sequence[float], count: int, seed: int
) -> list[Neighbours]:
    """Give the nearest rows of a bank, by cosine, for images with growing shares of their patches left out.

    pixels: (b, S, S, 3) uint8
    bank:   features of whole training images at the tap `cls-norm`
    masked: shares in [0, 1); what a smaller share hides, a larger one hides too
    """
    side = patches_a_side(encoder)
    rows = functional.normalize(bank.values.float(), dim=1)
    found = []
    for share in masked:
        generator = torch.Generator().manual_seed(seed)  # the same order of patches for every share
        visible = choose_patches(side * side, masked=share, images=len(pixels), generator=generator)
        queries = functional.normalize(encode_visible(encoder, pixels, visible), dim=1)
        nearest = (queries @ rows.T).topk(min(count, len(rows)), dim=1).indices
        found.append(Neighbours(masked=share, shown=hide(pixels, visible, side=side), nearest=nearest.numpy()))
    return found


def hide(pixels: Tensor, visible: Tensor, *, side: int) -> Pixels:
    """Give the images with all but the visible patches in grey."""
    seen = torch.zeros(len(pixels), side * side, dtype=torch.bool).scatter_(1, visible, value=True)
    scale = pixels.shape[1] // side
    mask = seen.view(-1, side, side).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return torch.where(mask[..., None], pixels, torch.tensor(_HIDDEN, dtype=torch.uint8)).numpy()


def draw_neighbours(
    found: Sequence[Neighbours],
    *,
    labels: Sequence[int],
    bank: Features,
    bank_pixels: dict[int, Pixels],
    classes: Sequence[str],
) -> "Figure":
    """Draw each image, its masked forms, and beside each form its nearest training images, framed by whether their class is
    the image's.

    bank_pixels: of the rows of the bank that were found
    """
    count = found[0].nearest.shape[1]
    figure, cells = _grid(len(labels) * len(found), count + 1)
    for number, label in enumerate(labels):
        for step, one in enumerate(found):
            line = cells[number * len(found) + step]
            _image(line[0], one.shown[number], f"{one.masked:.0%} hidden")
            line[0].set_ylabel(_short(classes[label]) if step == 0 else "", fontsize=8)
            for axes, row in zip(line[1:], one.nearest[number].tolist(), strict=True):
                other = int(bank.labels[row])
                _image(axes, bank_pixels[row], _short(classes[other]))
                for spine in axes.spines.values():
                    spine.set(visible=True, linewidth=2.5, color=_RIGHT if other == label else _WRONG)
    return figure


def draw_attention(maps: Tensor, pixels: Tensor, names: Sequence[str]) -> "Figure":
    """Draw each image, the mean of its heads' attention over it, and each head by itself.

    maps: (b, heads, rows, columns) shares of attention; each picture has its own scale
    """
    size = pixels.shape[1]
    figure, cells = _grid(len(pixels), maps.shape[1] + 2)
    for number, line in enumerate(cells):
        _image(line[0], pixels[number].numpy(), "image")
        line[0].set_ylabel(_short(names[number]), fontsize=8)
        whole = maps[number].mean(dim=0)
        _image(line[1], pixels[number].numpy(), "all heads")
        line[1].imshow(whole.numpy(), cmap="magma", alpha=0.65, extent=(0, size, size, 0), interpolation="bilinear")
        for head, axes in enumerate(line[2:]):
            axes.imshow(maps[number, head].numpy(), cmap="magma", extent=(0, size, size, 0))
            _image(axes, None, f"head {head + 1}")
    return figure


def project(features: Features) -> tuple[NDArray[np.float64], float]:
    """Give two-dimensional places of the rows, and the share of their variance that is in them.

    returns: (n, 2): the first two principal components of the L2-normalised rows, each turned so that its largest loading
             is positive
    """
    rows = functional.normalize(features.values.double(), dim=1)
    rows = rows - rows.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(rows, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()
    return (rows @ axes.T).numpy(), float((sizes[:2] ** 2).sum() / (sizes**2).sum())


def draw_classes(features: Features, classes: Sequence[str]) -> "Figure":
    """Draw the images as dots by their first two principal components, and the name of each class at its mean."""
    from matplotlib.figure import Figure

    places, share = project(features)
    labels = features.labels.numpy()
    figure = Figure(figsize=(9, 8), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    axes.scatter(places[:, 0], places[:, 1], c=labels, cmap="turbo", s=7, alpha=0.45, linewidths=0)
    for label in sorted(set(labels.tolist()))[:_MOST_NAMES]:
        x, y = places[labels == label].mean(axis=0)
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        axes.text(x, y, _plain(classes[label]), ha="center", va="center", fontsize=9, weight="bold", bbox=box)
    axes.set_title(f"first two principal components, {share:.0%} of the variance", fontsize=10)
    axes.set(xticks=[], yticks=[])
    return figure


def as_png(figure: "Figure") -> bytes:
    """Give a figure as a PNG file; equal figures give equal bytes. A letter that the font lacks is drawn as a box."""
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _grid(rows: int, columns: int) -> tuple["Figure", NDArray[np.object_]]:
    from matplotlib.figure import Figure

    size = (columns * _INCHES + 0.3, rows * (_INCHES + 0.18) + 0.1)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    cells: NDArray[np.object_] = figure.subplots(rows, columns, squeeze=False)
    return figure, cells


def _image(axes: "object", pixels: Pixels | None, title: str) -> None:
    if pixels is not None:
        axes.imshow(pixels)  # type: ignore[attr-defined]
    axes.set_title(title, fontsize=7, pad=2)  # type: ignore[attr-defined]
    axes.set(xticks=[], yticks=[])  # type: ignore[attr-defined]


def _short(name: str) -> str:
    shown = _plain(name)
    return shown if len(shown) <= 16 else f"{shown[:15]}…"


def _plain(name: str) -> str:
    """Give a name that matplotlib takes for no mathematics."""
    return printable(name).replace("$", r"\$")
