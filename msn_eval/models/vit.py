"""Vision Transformers: position embeddings at other image sizes, and the last block for the class token alone."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_DINOV2_PIXELS = 224
# Of `find_other_grid`: differences below this share of the variance are alike; below this share of the differences at
# neighbouring distances, they are a minimum. Drawn positions differ by 1 at every distance, to a few percent.
_ALIKE, _DIP = 0.7, 0.9
_SMALLEST_GRID, _LARGEST_GRID = 4, 64


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """How a method's authors interpolate position embeddings for images of another size: bicubic, and the following.

    Attributes:
        antialias: Whether the filter widens when the grid shrinks.
        offset: Added to the patches per side before the scale factor is computed, 0 for none.
    """

    antialias: bool
    offset: float

    def __str__(self) -> str:
        offset = f", offset {self.offset:g}" if self.offset else ""
        return f"bicubic, {'' if self.antialias else 'not '}antialiased{offset}"


MSN_POSITIONS = PositionRule(antialias=False, offset=0.0)
_DINO_POSITIONS = PositionRule(antialias=False, offset=0.1)
_REGISTER_POSITIONS = PositionRule(antialias=True, offset=0.0)
_RULES = {"msn": MSN_POSITIONS, "dino": _DINO_POSITIONS, "ibot": _DINO_POSITIONS}


def find_position_rule(network: nn.Module, family: str | None) -> PositionRule | None:
    """Return the rule of the authors of a network, None where timm's applies: bicubic and antialiased.

    Args:
        network: The network.
        family: `msn`, `dino`, `ibot` or `dinov2`; any other has timm's rule, unless the network is DINOv2 by its shape.

    Source: github.com/facebookresearch/msn, src/deit.py; github.com/facebookresearch/dino, vision_transformer.py;
    github.com/bytedance/ibot, models/vision_transformer.py; github.com/facebookresearch/dinov2, dinov2/hub/backbones.py and
    dinov2/models/vision_transformer.py.
    """
    from timm.models.vision_transformer import VisionTransformer

    if type(network) is not VisionTransformer or network.cls_token is None or network.pos_embed is None:
        return None
    if family == "dinov2" or is_dinov2(network):
        return _REGISTER_POSITIONS if cast(int, network.num_reg_tokens) else _DINO_POSITIONS
    return _RULES.get(family or "")


def is_dinov2(network: nn.Module) -> bool:
    """Whether a network is published at one size and evaluated at another, as DINOv2 alone is.

    It has 14-pixel patches, scaled residuals and position embeddings of 518 pixels, and is evaluated at 224.
    """
    if (stored_pixels(network), patch_pixels(network)) != (518, 14) or getattr(network, "cls_token", None) is None:
        return False
    return hasattr(getattr(cast(nn.Sequential, network.blocks)[0], "ls1", None), "gamma")


def native_pixels(network: nn.Module) -> int:
    """Return the side of the images that a network's authors evaluate at; if unknown, of those it was built for."""
    if is_dinov2(network):
        return _DINOV2_PIXELS
    config = getattr(network, "pretrained_cfg", None) or {}
    return stored_pixels(network) or int(config.get("input_size", (3, 224, 224))[-1])


def interpolate_positions(positions: Tensor, *, patches_a_side: int, rule: PositionRule) -> Tensor:
    """Interpolate the position embeddings of a square grid of patches. Those of prefix tokens stay as they are.

    Args:
        positions: (1, p + g * g, d) float32, p of 0 or 1.
        patches_a_side: Patches per side of the new grid.
        rule: How to interpolate.

    Returns:
        (1, p + patches_a_side ** 2, d) float32.
    """
    grid = math.isqrt(positions.shape[1])
    prefix = positions.shape[1] - grid * grid
    square = positions[:, prefix:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    # DINO's authors pass a scale factor, slightly enlarged, instead of a size; that shifts the sampling points.
    scale = (patches_a_side + rule.offset) / grid
    target = {"scale_factor": (scale, scale)} if rule.offset else {"size": (patches_a_side, patches_a_side)}
    resized = functional.interpolate(square, mode="bicubic", antialias=rule.antialias, **target)
    return torch.cat([positions[:, :prefix], resized.flatten(2).transpose(1, 2)], dim=1)


def find_other_grid(positions: Tensor) -> tuple[int, int] | None:
    """Return the rows and columns that position embeddings were learned for, where that is not the square they are read as.

    Learned positions of patches above each other are alike, so that their mean squared difference has a minimum at a distance of
    one row. None where it is lowest for the assumed grid, and where no grid has it, as before a training.

    Args:
        positions: (1, p + g * g, d), p prefix tokens first.
    """
    if positions.dim() != 3 or not positions.is_floating_point():
        return None
    patches_a_side = math.isqrt(positions.shape[1])
    patches = positions[0, -(patches_a_side**2) :].double()
    scale = 2 * patches.var(dim=0, unbiased=False).sum()

    def difference(distance: int) -> float:
        return float((patches[distance:] - patches[:-distance]).square().sum(dim=1).mean() / scale)

    def is_row(distance: int) -> bool:
        beside = min(difference(distance - 1), difference(distance + 1))
        return difference(distance) < min(_ALIKE, _DIP * beside, difference(patches_a_side))

    count = len(patches)
    if not _SMALLEST_GRID <= patches_a_side <= _LARGEST_GRID or not scale.isfinite() or scale <= 0:
        return None
    widths = [width for width in range(2, count // 2 + 1) if count % width == 0 and is_row(width)]
    width = min(widths, key=difference, default=None)
    return None if width is None else (count // width, width)


def stored_pixels(network: nn.Module) -> int | None:
    """Return the side of the images that a network's position embeddings are for, None if it has none."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return int(size[0]) if size else None


def patch_pixels(network: nn.Module) -> int | None:
    """Return the side of a patch, None for networks without patches."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    return int(size[0]) if isinstance(size, tuple) else None


def is_plain(network: nn.Module) -> bool:
    """Whether a network is timm's VisionTransformer with a class token and a standard last block, not its only one."""
    from timm.models.vision_transformer import VisionTransformer

    if type(network) is not VisionTransformer or network.cls_token is None:
        return False
    blocks = cast(nn.Sequential, network.blocks)
    return len(blocks) > 1 and has_standard_attention(blocks[-1])


def has_standard_attention(block: nn.Module) -> bool:
    """Whether a block is timm's, with self-attention that has neither a norm of its output nor a gate."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    return isinstance(block.attn.norm, nn.Identity) and getattr(block.attn, "gate", None) is None


def class_token_after(block: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the class token after a plain block, without the cost of the block for the patches.

    Args:
        block: The last block of a network for which `is_plain` holds.
        tokens: (b, n, width), the input of the block, class token first.

    Returns:
        (b, width).
    """
    attention = cast(nn.Module, block.attn)
    # Keys and values come from all tokens; query, projection and MLP are needed for the class token only.
    query, key, value = _project_qkv(attention, block.norm1(tokens))  # type: ignore[operator]
    attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    token = tokens[:, :1] + block.ls1(attention.proj(attended))  # type: ignore[operator]
    token = token + block.ls2(block.mlp(block.norm2(token)))  # type: ignore[operator]
    return cast(Tensor, token[:, 0])


def class_attention(block: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the attention of the class token to all tokens in a plain block.

    Args:
        block: The last block of a network for which `is_plain` holds.
        tokens: (b, n, width), the input of the block, class token first.

    Returns:
        (b, heads, n); each head's weights sum to 1.
    """
    query, key, _ = _project_qkv(cast(nn.Module, block.attn), block.norm1(tokens))  # type: ignore[operator]
    return (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(dim=-1)[:, :, 0]


def _project_qkv(attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the query of the first token, (b, heads, 1, d), and keys and values of all, (b, heads, n, d)."""
    projection = cast(nn.Linear, attention.qkv)
    weight, bias = projection.weight, projection.bias
    width = len(weight) // 3
    query = functional.linear(tokens[:, :1], weight[:width], None if bias is None else bias[:width])
    key, value = functional.linear(tokens, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
    query, key, value = (
        part.view(*part.shape[:2], cast(int, attention.num_heads), -1).transpose(1, 2) for part in (query, key, value)
    )
    return attention.q_norm(query), attention.k_norm(key), value  # type: ignore[operator]


def keep_patches(tokens: Tensor, kept: Tensor, *, prefix: int) -> Tensor:
    """Keep the prefix tokens and some of the patches.

    Args:
        tokens: (b, prefix + n, d).
        kept: (m,) or (b, m) int64, indices of patches.
        prefix: Number of class and register tokens.

    Returns:
        (b, prefix + m, d).
    """
    patches = tokens[:, prefix:]
    if kept.dim() == 1:
        chosen = patches.index_select(1, kept)
    else:
        chosen = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    return torch.cat([tokens[:, :prefix], chosen], dim=1) if prefix else chosen
