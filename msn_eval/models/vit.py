"""Position embeddings at another image size than the one they were learned at."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """How a method's authors interpolate their positions for the images that they evaluate at.

    image_pixels: side of those images
    antialias:    whether the bicubic filter widens where the grid shrinks
    offset:       added to the patches a side before the scale is taken from them, 0 for none
    """

    image_pixels: int
    antialias: bool
    offset: float


_DINOV2_TRAINED_AT, _DINOV2_EVALUATED_AT, _DINOV2_PATCH = 518, 224, 14
_DINOV2_OFFSET = 0.1


def published_rule(network: nn.Module) -> PositionRule | None:
    """Give the rule for networks that are published at one size and evaluated at another, None for all others.

    That is DINOv2: 14-pixel patches, scaled residuals, positions of 518 pixels, evaluated at 224. Its networks with
    registers interpolate with antialiasing, those without with an offset of 0.1.
    Source: github.com/facebookresearch/dinov2, dinov2/hub/backbones.py and dinov2/models/vision_transformer.py.
    """
    if stored_pixels(network) != _DINOV2_TRAINED_AT or patch_pixels(network) != _DINOV2_PATCH:
        return None
    first = cast(nn.Sequential, network.blocks)[0]
    if getattr(network, "cls_token", None) is None or not hasattr(getattr(first, "ls1", None), "gamma"):
        return None
    registers = cast(int, network.num_reg_tokens) > 0
    return PositionRule(
        image_pixels=_DINOV2_EVALUATED_AT, antialias=registers, offset=0.0 if registers else _DINOV2_OFFSET
    )


def native_pixels(network: nn.Module) -> int:
    """Give the side of the images that a network's authors evaluate it at, where none is known the one it was built for."""
    rule = published_rule(network)
    if rule is not None:
        return rule.image_pixels
    config = getattr(network, "pretrained_cfg", None) or {}
    stated = config.get("input_size")
    return stored_pixels(network) or (int(stated[-1]) if isinstance(stated, tuple | list) else 224)


def interpolate_positions(positions: Tensor, *, patches_a_side: int, rule: PositionRule) -> Tensor:
    """Interpolate the positions of a square grid of patches, leaving those of prefix tokens alone.

    positions: (1, p + g * g, d) float32, p of 0 or 1
    returns:   (1, p + patches_a_side ** 2, d) float32
    """
    grid = math.isqrt(positions.shape[1])
    prefix = positions.shape[1] - grid * grid
    width = positions.shape[2]
    square = positions[:, prefix:].reshape(1, grid, grid, width).permute(0, 3, 1, 2)
    if rule.offset:
        scale = (patches_a_side + rule.offset) / grid
        resized = functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic", antialias=rule.antialias)
    else:
        resized = functional.interpolate(
            square, size=(patches_a_side, patches_a_side), mode="bicubic", antialias=rule.antialias
        )
    patches = resized.permute(0, 2, 3, 1).reshape(1, -1, width)
    return torch.cat([positions[:, :prefix], patches], dim=1)


def stored_pixels(network: nn.Module) -> int | None:
    """Give the side of the images that a network's positions stand for, None where it has none."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return int(size[0]) if size else None


def patch_pixels(network: nn.Module) -> int | None:
    """Give the side of a patch, None for networks without patches."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    return int(size[0]) if isinstance(size, tuple) else None
