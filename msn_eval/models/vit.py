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


def is_plain(network: nn.Module) -> bool:
    """Tell whether the last block is timm's plain one, whose arithmetic is known here, behind at least one other."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(network) is not VisionTransformer or network.cls_token is None:
        return False
    blocks = cast(nn.Sequential, network.blocks)
    last = blocks[-1]
    if type(last) is not Block or type(last.attn) is not Attention:
        return False
    return len(blocks) > 1 and isinstance(last.attn.norm, nn.Identity) and getattr(last.attn, "gate", None) is None


def class_token_after(block: nn.Module, tokens: Tensor) -> Tensor:
    """Give the class token after a plain block.

    tokens:  (b, n, width), those before the block, the class token first
    returns: (b, width)
    Keys and values come from every token; the query, the projection and the MLP are the class token's own.
    """
    token = tokens[:, :1]
    token = token + block.ls1(_attended(block.attn, block.norm1(tokens)))  # type: ignore[operator, arg-type]
    token = token + block.ls2(block.mlp(block.norm2(token)))  # type: ignore[operator]
    return cast(Tensor, token[:, 0])


def class_attention(block: nn.Module, tokens: Tensor) -> Tensor:
    """Give how the class token shares its attention among all tokens in a plain block.

    tokens:  (b, n, width), those before the block, the class token first
    returns: (b, heads, n), each head's shares adding up to 1
    """
    attention = cast(nn.Module, block.attn)
    query, key, _ = _projected(attention, block.norm1(tokens))  # type: ignore[operator]
    return (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(dim=-1)[:, :, 0]


def _attended(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Give (b, 1, width), the attention of the first of the (b, n, width) tokens over all of them."""
    query, key, value = _projected(attention, tokens)
    mixed = functional.scaled_dot_product_attention(query, key, value)
    return cast(Tensor, attention.proj(mixed.transpose(1, 2).flatten(2)))  # type: ignore[operator]


def _projected(attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the query of the first of the (b, n, width) tokens, (b, heads, 1, width / heads), and keys and values of all."""
    projection = cast(nn.Linear, attention.qkv)
    width = projection.weight.shape[0] // 3
    split = (None, None) if projection.bias is None else (projection.bias[:width], projection.bias[width:])
    query = functional.linear(tokens[:, :1], projection.weight[:width], split[0])
    others = functional.linear(tokens, projection.weight[width:], split[1])
    return (
        attention.q_norm(_by_head(query, attention)),  # type: ignore[operator]
        attention.k_norm(_by_head(others[..., :width], attention)),  # type: ignore[operator]
        _by_head(others[..., width:], attention),
    )


def _by_head(vectors: Tensor, attention: nn.Module) -> Tensor:
    """Turn (b, n, width) into (b, heads, n, width / heads)."""
    return vectors.view(*vectors.shape[:2], cast(int, attention.num_heads), -1).transpose(1, 2)
