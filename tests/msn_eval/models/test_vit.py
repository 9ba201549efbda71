"""Position embeddings at other image sizes, held against the definition of bicubic interpolation."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import outline_network
from msn_eval.models.vit import (
    PositionRule,
    class_token_after,
    find_other_grid,
    find_position_rule,
    interpolate_positions,
    is_dinov2,
    is_plain,
    native_pixels,
    patch_pixels,
    stored_pixels,
)

PLAIN = PositionRule(antialias=False, offset=0.0)
WITH_OFFSET = PositionRule(antialias=False, offset=0.1)
ANTIALIASED = PositionRule(antialias=True, offset=0.0)
DINOV2 = "vit_tiny_patch16_224?img_size=518&patch_size=14&init_values=1.0&depth=1"


def positions(grid: int, *, prefix: int = 1, width: int = 3) -> Tensor:
    return torch.randn(1, prefix + grid * grid, width, generator=torch.Generator().manual_seed(4))


def network(name: str) -> nn.Module:
    return outline_network(name_architecture(name))


# Bicubic interpolation by its definition: Keys' kernel (IEEE Trans. ASSP 29, 1981), one axis after the other.


def kernel(distance: float, sharpness: float) -> float:
    at = abs(distance)
    if at <= 1:
        return (sharpness + 2) * at**3 - (sharpness + 3) * at**2 + 1
    return sharpness * (at**3 - 5 * at**2 + 8 * at - 4) if at < 2 else 0.0


def matrix(grid: int, wanted: int, rule: PositionRule) -> Tensor:
    """Return (wanted, grid), the share of every old position along an axis in every new one."""
    scale = (wanted + rule.offset) / grid
    shares = torch.zeros(wanted, grid, dtype=torch.float64)
    for new in range(wanted):
        centre = (new + 0.5) / scale
        if rule.antialias:
            # As in Pillow: the kernel widens to the spacing of the new positions, and is cut at the border.
            width = max(1 / scale, 1.0)
            for old in range(grid):
                shares[new, old] = kernel((old + 0.5 - centre) / width, -0.5)
            shares[new] /= shares[new].sum()
        else:
            for old in range(math.floor(centre - 0.5) - 1, math.floor(centre - 0.5) + 3):
                shares[new, min(max(old, 0), grid - 1)] += kernel(old + 0.5 - centre, -0.75)
    return shares


@pytest.mark.parametrize("rule", [PLAIN, WITH_OFFSET, ANTIALIASED], ids=["plain", "offset", "antialiased"])
@pytest.mark.parametrize(("grid", "wanted"), [(37, 16), (7, 4), (5, 9), (6, 1)])
def test_positions_are_interpolated_by_the_definition(grid: int, wanted: int, rule: PositionRule) -> None:
    before = positions(grid)
    shares = matrix(grid, wanted, rule)
    expected = torch.einsum("ai,bj,ijd->abd", shares, shares, before[0, 1:].reshape(grid, grid, 3).double())
    found = interpolate_positions(before, patches_a_side=wanted, rule=rule)
    torch.testing.assert_close(found[0, 1:].reshape(wanted, wanted, 3).double(), expected, atol=2e-5, rtol=0)
    assert torch.equal(found[:, :1], before[:, :1])  # of the class token


def test_grid_without_prefix_token_has_none_afterwards() -> None:
    assert interpolate_positions(positions(6, prefix=0), patches_a_side=4, rule=PLAIN).shape == (1, 16, 3)


# The grid that positions were learned for.


def sines(rows: int, columns: int, *, width: int = 64, noise: float = 0.0) -> Tensor:
    """Return fixed positions of a grid as of MAE and MoCo v3, behind a class token's, with noise of that share of their std."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    down, across = (torch.arange(count)[:, None] * frequencies for count in (rows, columns))
    parts = [down.repeat_interleave(columns, 0), across.repeat(rows, 1)]
    patches = torch.cat([wave for angles in parts for wave in (angles.sin(), angles.cos())], dim=1)
    patches += noise * patches.std() * torch.randn(patches.shape, generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.zeros(1, width), patches])[None]


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (4, 16), (16, 4), (28, 7), (7, 28), (8, 32), (9, 16)])
def test_rectangle_with_a_square_number_of_patches_is_recognised_by_its_positions(
    grid: tuple[int, int], noise: float
) -> None:
    assert find_other_grid(sines(*grid, noise=noise)) == grid


@pytest.mark.parametrize("side", [4, 5, 6, 8, 14, 16, 24, 37])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_positions_of_the_assumed_square_raise_no_alarm(side: int, noise: float) -> None:
    assert find_other_grid(sines(side, side, noise=noise)) is None


@pytest.mark.parametrize("width", [8, 64, 384])
@pytest.mark.parametrize("side", [1, 2, 4, 6, 8, 14])
def test_drawn_positions_raise_no_alarm(side: int, width: int) -> None:
    generator = torch.Generator().manual_seed(side)
    drawn = [torch.randn(1, side * side + 1, width, generator=generator) for _ in range(20)]
    assert [find_other_grid(positions) for positions in drawn] == [None] * 20


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_positions_without_differences_raise_no_alarm(value: float) -> None:
    assert find_other_grid(torch.full((1, 17, 8), value)) is None


# Which networks have a rule of their own.


FEW_BLOCKS = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"


@pytest.mark.parametrize(
    ("name", "family", "rule"),
    [
        (DINOV2, None, WITH_OFFSET),
        (f"{DINOV2}&reg_tokens=4", None, ANTIALIASED),
        (f"{DINOV2}&reg_tokens=4&no_embed_class=True", None, ANTIALIASED),
        (FEW_BLOCKS, "msn", PLAIN),
        (FEW_BLOCKS, "dino", WITH_OFFSET),
        (FEW_BLOCKS, "ibot", WITH_OFFSET),
        (FEW_BLOCKS, "dinov2", WITH_OFFSET),
        (f"{FEW_BLOCKS}&reg_tokens=2", "dinov2", ANTIALIASED),
        (FEW_BLOCKS, "mae", None),
        (FEW_BLOCKS, None, None),
        (f"{FEW_BLOCKS}&class_token=False&global_pool=avg", "msn", None),
        ("beit_base_patch16_224?img_size=32&patch_size=8&depth=1", "msn", None),
        ("resnet18", "dino", None),
    ],
)
def test_positions_are_interpolated_as_the_familys_authors_do(
    name: str, family: str | None, rule: PositionRule | None
) -> None:
    assert find_position_rule(network(name), family) == rule


@pytest.mark.parametrize(
    "name",
    [
        DINOV2.replace("518", "224"),
        DINOV2.replace("518", "504"),
        DINOV2.replace("patch_size=14", "patch_size=7"),
        DINOV2.replace("&init_values=1.0", ""),
        f"{DINOV2}&class_token=False&global_pool=avg",
        "vit_tiny_patch16_224?depth=1",
        "beit_base_patch16_224?img_size=518&patch_size=14&depth=1",
        "resnet18",
    ],
)
def test_networks_of_other_shapes_are_not_dinov2(name: str) -> None:
    assert not is_dinov2(network(name))


# Sizes.


@pytest.mark.parametrize(
    ("name", "native", "stored", "patch"),
    [
        (DINOV2, 224, 518, 14),
        (f"{DINOV2}&reg_tokens=4", 224, 518, 14),
        (DINOV2.replace("518", "504"), 504, 504, 14),
        ("vit_tiny_patch16_224?img_size=96&depth=1", 96, 96, 16),
        ("beit_base_patch16_384?depth=1", 384, 384, 16),
        ("resnet18", 224, None, None),
        ("resnet18.fb_swsl_ig1b_ft_in1k", 224, None, None),
        ("efficientnet_b1", 240, None, None),
    ],
)
def test_sizes_of_a_network(name: str, native: int, stored: int | None, patch: int | None) -> None:
    built = network(name)
    assert (native_pixels(built), stored_pixels(built), patch_pixels(built)) == (native, stored, patch)


def test_network_without_a_stated_size_is_evaluated_at_224() -> None:
    assert native_pixels(nn.Identity()) == 224


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
def test_block_of_another_kind_is_not_plain(variant: dict[str, object]) -> None:
    common = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    network = VisionTransformer(**{**common, **variant})

    assert not is_plain(network)
