"""The last transformer block, computed for the class token alone where nobody reads the others."""

import math
from typing import cast

from torch import Tensor, nn
from torch.nn import functional


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
