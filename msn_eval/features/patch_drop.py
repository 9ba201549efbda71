"""Vision Transformers on a part of the patches of an image, and the attention of their class token."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from msn_eval.errors import UsageError
from msn_eval.features.encoder import Encoder, encode, exact_float32, normalise_pixels
from msn_eval.models.vit import class_attention, is_plain, keep_patches


@dataclass(frozen=True, kw_only=True)
class PatchDrop:
    """Patches to drop from labelled images, drawn from the seed and the image's id.

    Attributes:
        share: Share of the patches of each image, in (0, 1).
        seed: Seed of the draw.
    """

    share: float
    seed: int


def draw_kept_patches(drop: PatchDrop, image_ids: Sequence[str], *, patches: int) -> Tensor:
    """Draw the patches of each image that are kept: the same ones in every batch, on every rank and machine.

    A larger share drops all patches that a smaller share drops.

    Returns:
        (images, k) int64, ascending; k is the kept share, rounded down as in the MSN release.
    """
    count = math.floor(patches * (1 - drop.share))
    # Sorting 8 bytes of SHAKE-256 per patch gives a uniform order that needs no random generator.
    keys = (hashlib.shake_256(f"{drop.seed}:".encode() + os.fsencode(name)).digest(8 * patches) for name in image_ids)
    kept = np.stack([np.frombuffer(key, dtype="<u8").argsort(kind="stable")[:count] for key in keys])
    return torch.from_numpy(np.sort(kept, axis=1).astype(np.int64))


def check_patch_drop(encoder: Encoder, drop: PatchDrop) -> None:
    """Raise UsageError if patches cannot be dropped from this network, or if none would be left."""
    from timm.models.vision_transformer import VisionTransformer

    if encoder.checkpoint.runs_own_code or type(encoder.network) is not VisionTransformer:
        raise UsageError(
            f"--patch-drop {drop.share}: {encoder.checkpoint.name} ({encoder.arch}) is not a plain Vision Transformer",
            hint="Leave the option out for networks of another kind.",
        )
    patches = patch_count(encoder)
    if math.floor(patches * (1 - drop.share)) < 1:
        raise UsageError(
            f"--patch-drop {drop.share} keeps none of the {patches} patches of {encoder.checkpoint.name}",
            hint="Drop a smaller share.",
        )


def encode_kept_patches(encoder: Encoder, pixels: Tensor, taps: Sequence[str], kept: Tensor) -> dict[str, Tensor]:
    """Compute features like `encode`, from only some patches of each image.

    Dropped patches are removed before the first block, as in pre-training with random masks. Kept patches keep their position
    embeddings.

    Args:
        encoder: A plain Vision Transformer.
        pixels: (b, S, S, 3) uint8.
        taps: Names of taps.
        kept: (b, k) int64, indices of patches counted row by row.

    Returns:
        (b, d) float32 for each tap, on the encoder's device.
    """
    rows, prefix = kept.to(encoder.device), cast(int, encoder.network.num_prefix_tokens)

    def keep(module: nn.Module, arguments: object, tokens: Tensor) -> Tensor:
        return keep_patches(tokens, rows, prefix=prefix)

    # timm's `patch_drop` is between the position embeddings and the first block, and passes all tokens on in evaluation mode.
    with cast(nn.Module, encoder.network.patch_drop).register_forward_hook(keep):
        return encode(encoder, pixels, taps)


def patch_count(encoder: Encoder) -> int:
    """Return the number of patches of an image."""
    return cast(int, cast(nn.Module, encoder.network.patch_embed).num_patches)


def check_patches(encoder: Encoder) -> None:
    """Raise UsageError unless the network is timm's plain Vision Transformer with a class token."""
    if encoder.checkpoint.runs_own_code or not is_plain(encoder.network):
        raise UsageError(
            f"{encoder.checkpoint.name} ({encoder.arch}) is not a plain Vision Transformer with a class token",
            hint="Only such a network can drop patches and show its attention.",
        )


def patches_a_side(encoder: Encoder) -> int:
    """Return the number of patches along one side of an image. Images are square."""
    return math.isqrt(patch_count(encoder))


def choose_patches(patches: int, *, masked: float, images: int, generator: torch.Generator) -> Tensor:
    """Draw visible patches uniformly, at least one per image.

    Args:
        patches: Patches per image.
        masked: Share to hide, in [0, 1).
        images: Number of images.
        generator: Source of randomness.

    Returns:
        (images, k) int64, ascending.
    """
    kept = max(1, round(patches * (1 - masked)))
    ranks = torch.rand(images, patches, generator=generator).argsort(dim=1)
    return ranks[:, :kept].sort(dim=1).values


def attention_maps(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Compute the attention of the class token to the patches in the last block.

    Args:
        encoder: A plain Vision Transformer, see `check_patches`.
        pixels: (b, S, S, 3) uint8.

    Returns:
        (b, heads, rows, columns) float32 on the CPU. Each map sums to 1 minus the attention to class token and registers.
    """
    side = patches_a_side(encoder)
    last = cast(nn.Sequential, encoder.network.blocks)[-1]
    inputs: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda block, arguments: inputs.append(arguments[0]))
    with hook, torch.inference_mode(), exact_float32():
        encoder.network.forward_features(normalise_pixels(pixels.to(encoder.device), encoder))  # type: ignore[operator]
        attention = class_attention(last, inputs[0])
    return attention[:, :, -side * side :].float().reshape(*attention.shape[:2], side, side).cpu()
