"""Names that timm's filters convert: weights are moved, never changed or lost. tests/test_layouts.py compares features."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from msn_eval import load_encoder
from msn_eval.errors import CheckpointError

CLIP = "vit_base_patch32_clip_quickgelu_224?patch_size=8&embed_dim=64&depth=1&num_heads=4&img_size="
DINOV3 = "vit_small_patch16_dinov3?embed_dim=64&depth=1&num_heads=4&img_size=32"


def clip_weights() -> dict[str, Tensor]:
    """Return one block by OpenAI's names, for images of 32 pixels."""
    block = "visual.transformer.resblocks.0."
    shapes = {
        "visual.class_embedding": (64,), "visual.positional_embedding": (17, 64), "visual.conv1.weight": (64, 3, 8, 8),
        **{f"{norm}.{kind}": (64,) for norm in ("visual.ln_pre", "visual.ln_post", f"{block}ln_1", f"{block}ln_2")
           for kind in ("weight", "bias")},
        f"{block}attn.in_proj_weight": (192, 64), f"{block}attn.in_proj_bias": (192,),
        f"{block}attn.out_proj.weight": (64, 64), f"{block}attn.out_proj.bias": (64,),
        f"{block}mlp.c_fc.weight": (256, 64), f"{block}mlp.c_fc.bias": (256,),
        f"{block}mlp.c_proj.weight": (64, 256), f"{block}mlp.c_proj.bias": (64,),
    }  # fmt: skip
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def refusal(folder: Path, weights: dict[str, Tensor], arch: str) -> CheckpointError:
    torch.save(weights, folder / "weights.pth")
    with pytest.raises(CheckpointError) as caught:
        load_encoder(str(folder / "weights.pth"), device="cpu", arch=arch)
    return caught.value


def test_positions_are_not_interpolated_by_the_filter(tmp_path: Path) -> None:
    error = refusal(tmp_path, clip_weights(), f"{CLIP}64")

    assert "timm would change weights (interpolate)" in error.what
    assert "--arch" not in error.hint


def test_weight_that_the_filter_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    error = refusal(tmp_path, clip_weights() | {"visual.adapter.weight": torch.ones(3)}, f"{CLIP}32")

    assert "adapter.weight: no place in the model" in error.what
    assert "--arch" not in error.hint


def test_biases_that_the_filter_drops_are_refused_unless_they_are_zero(tmp_path: Path) -> None:
    network = timm.create_model(
        "vit_small_patch16_dinov3", num_classes=0, img_size=32, embed_dim=64, depth=1, num_heads=4
    )
    weights = {
        name.replace("reg_token", "storage_tokens")
        .replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma"): tensor
        for name, tensor in network.state_dict().items()
    }

    error = refusal(tmp_path, weights | {"blocks.0.attn.qkv.bias": torch.ones(192)}, DINOV3)

    assert "has no place for blocks.0.attn.qkv.bias" in error.what
