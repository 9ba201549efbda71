"""Visible patches: what a Vision Transformer says of an image of which it is given only some patches, and where it looks."""

from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.encoder import Encoder, exact_float32, normalised
from msn_eval.errors import UsageError
from msn_eval.last_block import class_attention, is_plain


def check_patches(encoder: Encoder) -> None:
    """Raise UsageError for a network of which no patches can be left out: it must be a plain Vision Transformer of timm's."""
    if encoder.checkpoint.format == "py" or not is_plain(encoder.network):
        raise UsageError(
            f"{encoder.checkpoint.name} ({encoder.arch}) is no plain Vision Transformer with a class token",
            remedy="Patches can be left out, and attention shown, only of one that is.",
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
    prefix = cast(int, network.num_prefix_tokens)
    seen = visible.to(encoder.device)[..., None].expand(-1, -1, tokens.shape[2])
    tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, seen)], dim=1)
    tokens = network.norm_pre(tokens)  # type: ignore[operator]
    for block in list(cast(nn.Sequential, network.blocks))[:-1]:
        tokens = block(tokens)
    return tokens
