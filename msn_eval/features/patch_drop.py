"""Visible patches: what a Vision Transformer says of an image of which it is given only some patches, and where it looks."""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from msn_eval.errors import UsageError
from msn_eval.features.encoder import Encoder, encode, exact_float32, normalised
from msn_eval.models.vit import class_attention, is_plain


@dataclass(frozen=True, kw_only=True)
class PatchDrop:
    """What is left out of labelled images: a share of the patches of each, drawn by the seed and the image's id.

    share: in (0, 1)
    """

    share: float
    seed: int


def kept_patches(drop: PatchDrop, image_ids: Sequence[str], *, patches: int) -> Tensor:
    """Give which patches of each image are kept: the same ones in every batch, on every rank and machine.

    returns: (images, k) int64, rising; k is the share that is kept, rounded down as the release does
    What a smaller share drops, a larger one drops too.
    """
    kept = math.floor(patches * (1 - drop.share))
    words = (hashlib.shake_256(f"{drop.seed}:".encode() + os.fsencode(one)).digest(8 * patches) for one in image_ids)
    order = np.stack([np.frombuffer(word, dtype="<u8").argsort(kind="stable")[:kept] for word in words])
    return torch.from_numpy(np.sort(order, axis=1).astype(np.int64))


def check_drop(encoder: Encoder, drop: PatchDrop) -> None:
    """Raise UsageError for a network that takes no part of an image, and where no patch would be left."""
    from timm.models.vision_transformer import VisionTransformer

    if encoder.checkpoint.runs_own_code or type(encoder.network) is not VisionTransformer:
        raise UsageError(
            f"--patch-drop {drop.share}: {encoder.checkpoint.name} ({encoder.arch}) is no plain Vision Transformer",
            hint="Patches can be dropped only from what one is given; leave the option out for other networks.",
        )
    patches = patch_count(encoder)
    if math.floor(patches * (1 - drop.share)) < 1:
        raise UsageError(
            f"--patch-drop {drop.share} leaves none of the {patches} patches that {encoder.checkpoint.name} sees",
            hint="Drop a smaller share.",
        )


def encode_kept(encoder: Encoder, pixels: Tensor, taps: Sequence[str], kept: Tensor) -> dict[str, Tensor]:
    """Give what `encode` gives, of images of which only some patches enter the first block.

    kept: (b, k) int64, counted row by row; they keep their position embeddings, the others cost no block anything
    """
    with _only(encoder.network, kept.to(encoder.device)):
        return encode(encoder, pixels, taps)


class _Keep(nn.Module):
    """What stands between the position embeddings and the first block, where timm drops patches in training."""

    def __init__(self, kept: Tensor, prefix: int) -> None:
        super().__init__()
        self.kept, self.prefix = kept, prefix

    def forward(self, tokens: Tensor) -> Tensor:
        return _gathered(tokens, self.kept, prefix=self.prefix)


@contextlib.contextmanager
def _only(network: nn.Module, kept: Tensor) -> Iterator[None]:
    before = network.patch_drop
    network.patch_drop = _Keep(kept, cast(int, network.num_prefix_tokens)).eval()
    try:
        yield
    finally:
        network.patch_drop = before


def _gathered(tokens: Tensor, kept: Tensor, *, prefix: int) -> Tensor:
    """Leave the first `prefix` tokens and, of the patches behind them, those in `kept`, (b, k)."""
    seen = kept[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, seen)], dim=1)


def patch_count(encoder: Encoder) -> int:
    """Give the number of patches of an image."""
    return cast(int, cast(nn.Module, encoder.network.patch_embed).num_patches)


def check_patches(encoder: Encoder) -> None:
    """Raise UsageError for a network of which no patches can be left out: it must be a plain Vision Transformer of timm's."""
    if encoder.checkpoint.runs_own_code or not is_plain(encoder.network):
        raise UsageError(
            f"{encoder.checkpoint.name} ({encoder.arch}) is no plain Vision Transformer with a class token",
            hint="Patches can be left out, and attention shown, only of one that is.",
        )


def patches_a_side(encoder: Encoder) -> int:
    """Give the number of patches along one side of an image."""
    (rows, columns) = encoder.network.patch_embed.grid_size  # type: ignore[union-attr, misc]
    if rows != columns:
        raise UsageError(f"{encoder.checkpoint.name} takes images of {rows} x {columns} patches, not square ones")
    return int(rows)


def choose_patches(patches: int, *, masked: float, images: int, generator: torch.Generator) -> Tensor:
    """Give which patches of each image stay visible, drawn uniformly, at least one.

    masked:  the share to leave out, in [0, 1)
    returns: (images, k) int64, rising
    """
    kept = max(1, round(patches * (1 - masked)))
    ranks = torch.rand(images, patches, generator=generator).argsort(dim=1)
    return ranks[:, :kept].sort(dim=1).values


def encode_visible(encoder: Encoder, pixels: Tensor, visible: Tensor) -> Tensor:
    """Give the class token after the final norm, the tap `cls-norm`, of images of which only some patches are seen.

    pixels:  (b, S, S, 3) uint8
    visible: (b, k) int64, the patches that are seen, counted row by row
    returns: (b, width) float32
    Hidden patches are taken out before the first block, as in pre-training with random masks; what is left keeps its
    position embedding.
    """
    with torch.inference_mode(), exact_float32():
        tokens = _tokens_before_last(encoder, pixels, visible)
        last = cast(nn.Sequential, encoder.network.blocks)[-1]
        return encoder.final_norm(last(tokens)[:, 0].float()).cpu()  # type: ignore[no-any-return]


def attention_maps(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Give how the class token of the last block shares its attention among the patches.

    returns: (b, heads, rows, columns) float32; what it gives to itself and to registers is missing from a sum of 1
    """
    side = patches_a_side(encoder)
    every = torch.arange(side * side).expand(len(pixels), -1)
    with torch.inference_mode(), exact_float32():
        tokens = _tokens_before_last(encoder, pixels, every)
        shares = class_attention(cast(nn.Sequential, encoder.network.blocks)[-1], tokens)
        return shares[:, :, -side * side :].float().view(*shares.shape[:2], side, side).cpu()


def _tokens_before_last(encoder: Encoder, pixels: Tensor, visible: Tensor) -> Tensor:
    network = encoder.network
    images = normalised(pixels.to(encoder.device), encoder)
    tokens: Tensor = network._pos_embed(network.patch_embed(images))  # type: ignore[operator]
    tokens = _gathered(tokens, visible.to(encoder.device), prefix=cast(int, network.num_prefix_tokens))
    tokens = network.norm_pre(tokens)  # type: ignore[operator]
    for block in list(cast(nn.Sequential, network.blocks))[:-1]:
        tokens = block(tokens)
    return tokens
