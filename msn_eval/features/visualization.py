"""What pictures show: nearest training images under masking, and features in two dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from msn_eval.data.images import EvalTransform, ImageSet
from msn_eval.data.loader import PixelList, load_pixels
from msn_eval.errors import DataError
from msn_eval.features.encoder import Encoder
from msn_eval.features.extraction import Features
from msn_eval.features.patch_drop import choose_patches, encode_kept_patches, patches_a_side

Pixels = NDArray[np.uint8]
_HIDDEN = 127  # grey


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
