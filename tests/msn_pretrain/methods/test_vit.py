"""Vision Transformer with dropped patches, against timm's own forward pass."""

import copy
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from msn_eval.errors import UsageError
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import build_network
from msn_pretrain.config.recipe import Encoder
from msn_pretrain.methods.vit import MaskedTransformer, build_transformer, draw_kept_patches, kept_count

SMALL = "vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=24&depth=3&num_heads=3"
REGISTERS = f"{SMALL}&reg_tokens=2&no_embed_class=True"


def small_trunk(name: str = SMALL, *, drop_path: float = 0.0, sides: tuple[int, ...] = (32, 16)) -> MaskedTransformer:
    network = build_transformer(Encoder(name=name, drop_path=drop_path), seed=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return MaskedTransformer(network, image_sides=sides).double()


def some_images(side: int = 32) -> Tensor:
    return torch.randn(4, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [SMALL, REGISTERS])
def test_without_a_mask_it_is_timms_own_class_token(name: str) -> None:
    trunk = small_trunk(name)

    torch.testing.assert_close(trunk(some_images()), trunk.network.forward_features(some_images())[:, 0])


@pytest.mark.parametrize("fused", [True, False])
def test_attention_has_the_bits_of_timms_own(fused: bool) -> None:
    attention = small_trunk().float().network.blocks[0].attn
    attention.fused_attn = fused
    assert attention.forward.__func__ is not type(attention).forward
    found = []

    for forward in (attention.forward, partial(type(attention).forward, attention)):
        tokens = torch.randn(4, 17, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        attended = forward(tokens)
        attended.square().sum().backward()
        found.append([attended, tokens.grad, *(weight.grad for weight in attention.parameters())])
        attention.zero_grad()

    assert all(map(torch.equal, *found))


def test_attention_of_a_copy_has_the_weights_of_the_copy() -> None:
    trunk = small_trunk()
    target = copy.deepcopy(trunk)
    before = trunk(some_images())

    for weight in target.parameters():
        nn.init.zeros_(weight)

    assert torch.equal(trunk(some_images()), before)
    assert not target.network.blocks[0].attn(torch.ones(1, 5, 24, dtype=torch.float64)).any()


@pytest.mark.parametrize("drop_path", [0.0, 0.5], ids=["class token alone", "complete last block"])
def test_dropped_patches_cannot_be_seen(drop_path: float) -> None:
    trunk, images, kept = small_trunk(drop_path=drop_path).eval(), some_images(), torch.tensor([1, 2, 11])
    seen = trunk(images, kept)
    others = images.clone()
    for patch in set(range(16)) - set(kept.tolist()):
        others[..., patch // 4 * 8 : patch // 4 * 8 + 8, patch % 4 * 8 : patch % 4 * 8 + 8] = 7.0
    changed = images.clone()
    changed[:, :, :8, 8:16] = 7.0  # patch 1

    assert torch.equal(trunk(others, kept), seen)
    assert not torch.equal(trunk(changed, kept), seen)


def plain_masked(network: nn.Module, images: Tensor, kept: Tensor) -> Tensor:
    """Return class tokens of timm's blocks over class token and kept patches, each with its position."""
    tokens = network._pos_embed(network.patch_embed(images))
    chosen = torch.stack([torch.cat([own[:1], own[1:][of]]) for own, of in zip(tokens, kept, strict=True)])
    return network.norm(network.blocks(chosen))[:, 0]


def test_kept_patches_take_their_positions_along_and_each_image_its_own() -> None:
    trunk, kept = small_trunk(), torch.tensor([[0, 1], [2, 9], [3, 15], [4, 8]])

    torch.testing.assert_close(trunk(some_images(), kept), plain_masked(trunk.network, some_images(), kept))


def test_gradients_are_those_of_timms_own_pass() -> None:
    ours, plain, kept = small_trunk(), small_trunk(), torch.tensor([[0, 1, 5]]).expand(4, 3)

    ours(some_images(), kept).sin().sum().backward()
    plain_masked(plain.network, some_images(), kept).sin().sum().backward()

    for own, expected in zip(ours.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_positions_of_a_smaller_image_are_interpolated_as_in_the_release() -> None:
    trunk = small_trunk()
    network = trunk.network
    grid = network.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    smaller = functional.interpolate(grid, scale_factor=math.sqrt(4 / 16), mode="bicubic").flatten(2).transpose(1, 2)
    patches = network.patch_embed.proj(some_images(16)).flatten(2).transpose(1, 2) + smaller
    front = (network.cls_token + network.pos_embed[:, :1]).expand(4, -1, -1)
    plain = network.norm(network.blocks(torch.cat([front, patches], dim=1)))[:, 0]

    torch.testing.assert_close(trunk(some_images(16)), plain, rtol=1e-5, atol=1e-6)  # the matrix is float32


def flops(trunk: nn.Module, kept: Tensor | None) -> int:
    with FlopCounterMode(display=False) as counter:
        trunk(some_images(), kept)
    return counter.get_total_flops()


def test_dropped_patches_cost_nothing() -> None:
    trunk, images, width = small_trunk(), 4, 24

    def embedding(patches: int) -> int:
        return 2 * images * patches * 3 * 64 * width

    def blocks(tokens: int) -> int:
        products = 2 * tokens * width * (3 * width + width + 8 * width)  # queries, keys, values, projection, MLP
        last = 2 * width * (tokens * 2 * width + width + width + 8 * width)  # the class token's but for keys and values
        return images * (2 * products + last)  # torch counts no fused attention on CPUs

    assert flops(trunk, None) == embedding(16) + blocks(17)
    assert flops(trunk, torch.arange(5)) == embedding(5) + blocks(6)


@pytest.mark.parametrize("kept", [None, torch.arange(5)], ids=["all", "some"])
def test_tokens_are_bf16_from_the_embedding_on_under_autocast(kept: Tensor | None) -> None:
    trunk, dtypes = small_trunk().float(), []
    trunk.network.blocks[0].register_forward_pre_hook(lambda block, given: dtypes.append(given[0].dtype))

    with torch.autocast("cpu", torch.bfloat16):
        trunk(some_images().float(), kept)

    assert dtypes == [torch.bfloat16]


def test_first_weights_are_drawn_as_in_the_release() -> None:
    network = build_transformer(Encoder(name="vit_tiny_patch16_224?depth=2"))

    assert float(network.blocks[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(network.cls_token.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert float(network.patch_embed.proj.weight.detach().std()) == pytest.approx((2 / 768) ** 0.5, rel=0.02)
    assert not network.patch_embed.proj.bias.any()


def test_edges_beyond_complete_patches_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    trunk = small_trunk(sides=(32, 20))
    images = some_images(20)

    assert "views of 20 pixels are not a multiple of the patch size 8: 4 pixels" in caplog.text
    torch.testing.assert_close(trunk(images), trunk(images[..., :16, :16]))


def test_views_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(UsageError, match="views of 7 pixels are smaller than a patch of 8"):
        small_trunk(sides=(32, 7))


@pytest.mark.parametrize("name", ["resnet18", f"{SMALL}&class_token=False&global_pool=avg"])
def test_networks_that_cannot_be_masked_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not a Vision Transformer with class token"):
        build_transformer(Encoder(name=name))


def test_initial_positions_can_be_scaled_and_initial_weights_can_be_timms() -> None:
    name = "vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=1&num_heads=2"
    released, scaled, timms = (
        build_transformer(Encoder(name=name, first_weights=first, position_scale=scale), seed=4).state_dict()
        for first, scale in (("release", 1.0), ("release", 20.0), ("timm", 1.0))
    )

    assert torch.equal(scaled["pos_embed"], 20 * released["pos_embed"])
    own = build_network(name_architecture(name), seed=4).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in timms.items())
    assert not torch.equal(released["patch_embed.proj.weight"], timms["patch_embed.proj.weight"])


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 196), (0.15, 166), (0.3, 137), (0.7, 58)])
def test_as_many_patches_are_kept_as_in_the_release(ratio: float, kept: int) -> None:
    assert kept_count(196, ratio) == kept


@pytest.mark.parametrize("images", [None, 1])
def test_every_set_of_patches_is_equally_likely(images: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_kept_patches(4, 0.5, generator, images=images).flatten().tolist() for _ in range(6_000)]

    counts = Counter(map(tuple, drawn))
    assert sorted(counts) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert all(abs(count - 1_000) < 145 for count in counts.values())  # 5 standard deviations


def test_ratio_that_keeps_no_patch_is_refused() -> None:
    with pytest.raises(UsageError, match="keeps none"):
        kept_count(16, 0.95)
