"""The last transformer block, computed for the class token alone where nobody reads the others."""

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


def _attended(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Give (b, 1, width), the attention of the first of the (b, n, width) tokens over all of them."""
    projection = cast(nn.Linear, attention.qkv)
    width = projection.weight.shape[0] // 3
    split = (None, None) if projection.bias is None else (projection.bias[:width], projection.bias[width:])
    query = functional.linear(tokens[:, :1], projection.weight[:width], split[0])
    others = functional.linear(tokens, projection.weight[width:], split[1])
    mixed = functional.scaled_dot_product_attention(
        attention.q_norm(_by_head(query, attention)),  # type: ignore[operator]
        attention.k_norm(_by_head(others[..., :width], attention)),  # type: ignore[operator]
        _by_head(others[..., width:], attention),
    )
    return cast(Tensor, attention.proj(mixed.transpose(1, 2).flatten(2)))  # type: ignore[operator]


def _by_head(vectors: Tensor, attention: nn.Module) -> Tensor:
    """Turn (b, n, width) into (b, heads, n, width / heads)."""
    return vectors.view(*vectors.shape[:2], cast(int, attention.num_heads), -1).transpose(1, 2)
