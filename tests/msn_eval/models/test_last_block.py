"""The class token alone equals the class token of the whole last block."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from msn_eval.models.last_block import class_token_after, is_plain


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"init_values": 0.5},
        {"reg_tokens": 3, "no_embed_class": True},
        {"pre_norm": True},
    ],
    ids=str,
)
def test_class_token_is_that_of_the_whole_block(variant: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0, **variant)
    network = network.eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(5, 3, 32, 32)

    with torch.inference_mode():
        (before, after) = (
            torch.cat([prefix, patches], dim=1)
            for patches, prefix in network.forward_intermediates(
                images, indices=2, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
            )
        )
        alone = class_token_after(network.blocks[-1], before)

    assert is_plain(network)
    torch.testing.assert_close(alone, after[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "variant", [{"scale_attn_norm": True}, {"class_token": False, "global_pool": "avg"}, {"depth": 1}]
)
def test_a_block_of_other_arithmetic_is_left_to_itself(variant: dict[str, object]) -> None:
    common = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    network = VisionTransformer(**{**common, **variant})

    assert not is_plain(network)
