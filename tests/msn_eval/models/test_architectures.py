"""Architectures from the shapes of weights and from names."""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from msn_eval.errors import CheckpointError
from msn_eval.models.architectures import name_architecture, recognise_architecture
from msn_eval.models.build import build_network, outline_network

WeightMaker = Callable[..., dict[str, Tensor]]
TINY = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def resnet_shapes(*blocks: int, bottleneck: bool = False, width: int = 64) -> dict[str, Tensor]:
    weights = {"conv1.weight": torch.empty(64, 3, 7, 7, device="meta"), "bn1.weight": torch.empty(64, device="meta")}
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            for number in range(1, 4 if bottleneck else 3):
                weights[f"layer{stage}.{block}.conv{number}.weight"] = torch.empty(width, 64, 1, 1, device="meta")
    return weights


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12)])
def test_width_gives_the_published_number_of_heads(vit_weights: WeightMaker, width: int, heads: int) -> None:
    network = build_network(recognise_architecture(vit_weights(width=width, depth=1)))
    assert network.blocks[0].attn.num_heads == heads


@pytest.mark.parametrize(("patch", "image"), [(4, 32), (7, 28), (8, 32), (14, 56), (16, 64)])
def test_patch_and_image_size_are_read_from_shapes(vit_weights: WeightMaker, patch: int, image: int) -> None:
    network = build_network(recognise_architecture(vit_weights(depth=1, patch=patch, image=image)))
    assert (network.patch_embed.patch_size, network.patch_embed.img_size) == ((patch, patch), (image, image))


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"depth": 3},
        {"registers": 4},
        {"registers": 4, "class_position": False},
        {"class_token": False},
        {"class_position": False},
        {"layer_scale": True},
        {"qk_norm": True},
        {"fc_norm": True},
        {"fc_norm": True, "class_token": False},
    ],
    ids=str,
)
def test_network_has_a_place_for_every_weight_it_was_recognised_by(
    vit_weights: WeightMaker, variant: dict[str, object]
) -> None:
    weights = vit_weights(**variant)
    network = build_network(recognise_architecture(weights))
    assert shapes(network.state_dict()) == shapes(weights)


def test_vit_base_has_timms_name_and_the_published_number_of_parameters(vit_weights: WeightMaker) -> None:
    weights = vit_weights(width=768, depth=12, patch=16, image=224, device="meta")
    with torch.device("meta"):
        network = build_network(recognise_architecture(weights))
    assert sum(parameter.numel() for parameter in network.parameters()) == 85_798_656
    assert recognise_architecture(weights).name == "vit_base_patch16_224"


def test_unknown_width_is_refused_with_the_arch_option_as_hint(vit_weights: WeightMaker) -> None:
    with pytest.raises(CheckpointError, match="width 96 and depth 2") as refusal:
        recognise_architecture(vit_weights(width=96))
    assert "--arch 'vit_tiny_patch16_224?embed_dim=96&depth=2&patch_size=8" in refusal.value.hint


def without(weights: dict[str, Tensor], *ends: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.endswith(ends)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda draw: draw() | {"pos_embed": torch.zeros(1, 15, 192)}, "15 positions"),
        (lambda draw: {"stem.weight": torch.zeros(3)}, r"stem\.weight"),
        (lambda draw: draw(depth=1) | {"norm_pre.weight": torch.ones(192)}, "CLIP"),
        (lambda draw: without(draw(), "blocks.0.mlp.fc1.weight"), r"no mlp\.fc1 and mlp\.fc2"),
        (lambda draw: without(draw(), "blocks.0.mlp.fc2.weight"), r"no mlp\.fc1 and mlp\.fc2"),
        (lambda draw: without(draw(), "pos_embed"), "without learned positions"),
        (lambda draw: without(draw(class_token=False, fc_norm=True), "attn.qkv.bias"), "have the same weights"),
        (lambda draw: resnet_shapes(1, 1, 1, 1), "not ResNet-18"),
        (lambda draw: resnet_shapes(2, 2, 2, 2, width=128), "not ResNet-18"),
    ],
)
def test_weights_that_leave_the_architecture_open_are_refused(
    vit_weights: WeightMaker, change: Callable[[WeightMaker], dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        recognise_architecture(change(vit_weights))
    assert "--arch" in refusal.value.hint


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embed.proj.weight", (192, 3, 2, 8, 8)),  # a video's patches
        ("patch_embed.proj.weight", (192, 192)),  # patches embedded by a linear layer
        ("pos_embed", (16,)),
        ("blocks.0.mlp.fc1.weight", ()),
    ],
)
def test_weight_of_an_unexpected_dimension_is_refused(
    vit_weights: WeightMaker, name: str, shape: tuple[int, ...]
) -> None:
    weights = vit_weights() | {name: torch.zeros(shape)}
    with pytest.raises(CheckpointError) as refusal:
        build_network(recognise_architecture(weights))
    assert "--arch" in refusal.value.hint


@pytest.mark.parametrize(("registers", "positions", "image"), [(4, 1, 8), (3, 4, 16)])
def test_positions_that_the_prefix_tokens_alone_would_use_up_are_those_of_patches(
    vit_weights: WeightMaker, registers: int, positions: int, image: int
) -> None:
    weights = vit_weights(registers=registers) | {"pos_embed": torch.zeros(1, positions, 192)}
    assert recognise_architecture(weights).keywords["img_size"] == image


@pytest.mark.parametrize(
    ("blocks", "bottleneck", "name"),
    [
        ((2, 2, 2, 2), False, "resnet18"),
        ((3, 4, 6, 3), False, "resnet34"),
        ((3, 4, 6, 3), True, "resnet50"),
    ],
)
def test_residual_networks_are_distinguished_by_their_blocks(
    blocks: tuple[int, ...], bottleneck: bool, name: str
) -> None:
    assert recognise_architecture(resnet_shapes(*blocks, bottleneck=bottleneck)).timm_name == name


@pytest.mark.parametrize(("padded", "padding", "name"), [(False, 1, "cifar"), (True, 2, "cifar_padded")])
def test_small_first_convolution_belongs_to_a_stem_for_small_images(padded: bool, padding: int, name: str) -> None:
    weights = resnet_shapes(2, 2, 2, 2) | {"conv1.weight": torch.empty(64, 3, 3, 3, device="meta")}

    architecture = recognise_architecture(weights, padded_stem=padded)

    network = build_network(architecture)
    assert architecture.name == f"resnet18?stem={name}"
    assert network.maxpool(network.conv1(torch.zeros(1, 3, 32, 32))).shape[2:] == (30 + 2 * padding,) * 2
    assert shapes(build_network(name_architecture(architecture.name)).state_dict()) == shapes(network.state_dict())


def test_keywords_of_a_name_are_read_as_values() -> None:
    architecture = name_architecture("vit_tiny_patch16_224?img_size=32&patch_size=4&qk_norm=True&global_pool=avg")
    assert architecture.keywords == {"img_size": 32, "patch_size": 4, "qk_norm": True, "global_pool": "avg"}


@pytest.mark.parametrize("text", ["", "?img_size=32"])
def test_architecture_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="has no name"):
        name_architecture(text)


def test_keywords_that_are_no_pairs_are_refused_with_an_example() -> None:
    with pytest.raises(CheckpointError, match="keywords") as refusal:
        name_architecture("vit_tiny_patch16_224?img_size")
    assert "img_size=32&patch_size=4" in refusal.value.hint


# Heads and epsilon, which no weight shows.


def test_stated_heads_go_before_those_of_the_width(vit_weights: WeightMaker) -> None:
    network = build_network(recognise_architecture(vit_weights(depth=1), heads=6))
    assert network.blocks[0].attn.num_heads == 6


def test_stated_heads_open_a_width_that_no_published_network_has(vit_weights: WeightMaker) -> None:
    assert recognise_architecture(vit_weights(width=96), heads=4).name == "vit_width96_depth2_patch8_32_heads4"


@pytest.mark.parametrize(("stated", "epsilon"), [(None, 1e-6), (1e-12, 1e-12), (1e-5, 1e-5)])
@pytest.mark.parametrize("variant", [{}, {"fc_norm": True}, {"qk_norm": True}], ids=str)
def test_stated_epsilon_is_that_of_every_norm(
    vit_weights: WeightMaker, variant: dict[str, object], stated: float | None, epsilon: float
) -> None:
    network = build_network(recognise_architecture(vit_weights(**variant), norm_eps=stated))
    assert {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)} == {epsilon}


@pytest.mark.parametrize(
    ("heads", "norm_eps", "ending"),
    [
        (None, None, ""),
        (3, 1e-6, ""),
        (12, None, "_heads12"),
        (None, 1e-12, "_eps1e-12"),
        (6, 1e-5, "_heads6_eps1e-05"),
    ],
)
def test_name_shows_what_is_unusual_and_no_shape_shows(
    vit_weights: WeightMaker, heads: int | None, norm_eps: float | None, ending: str
) -> None:
    architecture = recognise_architecture(vit_weights(), heads=heads, norm_eps=norm_eps)
    assert architecture.name == f"vit_width192_depth2_patch8_32{ending}"


# Gated MLPs.


@pytest.mark.parametrize(("inner", "gated"), [(512, True), (1024, False), (500, False)])
def test_mlp_whose_outputs_are_twice_its_inputs_is_gated(vit_weights: WeightMaker, inner: int, gated: bool) -> None:
    weights = vit_weights(depth=1)
    outputs = 1024 if gated else inner
    weights |= {
        "blocks.0.mlp.fc1.weight": torch.zeros(outputs, 192),
        "blocks.0.mlp.fc1.bias": torch.zeros(outputs),
        "blocks.0.mlp.fc2.weight": torch.zeros(192, inner),
    }
    architecture = recognise_architecture(weights)
    network = build_network(architecture)
    assert (architecture.gated, isinstance(network.blocks[0].mlp.act, nn.SiLU)) == (gated, gated)
    assert shapes(network.state_dict()) == shapes(weights)


# Bounds.


@pytest.mark.parametrize(("block", "accepted"), [(255, True), (256, False), (9999, False)])
def test_depth_that_no_network_has_is_refused(vit_weights: WeightMaker, block: int, accepted: bool) -> None:
    weights = vit_weights(depth=1) | {f"blocks.{block}.norm1.weight": torch.ones(192)}
    if accepted:
        assert recognise_architecture(weights).keywords["depth"] == block + 1
        return
    with pytest.raises(CheckpointError, match=rf"with a block {block}\b") as refusal:
        recognise_architecture(weights)
    assert "--arch" in refusal.value.hint


# BEiT's family.


def beit_weights(**keywords: object) -> dict[str, Tensor]:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 0}
    network = Beit(**sizes | {"init_values": 0.1, "use_abs_pos_emb": False} | keywords)
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    "variant",
    [
        {"use_rel_pos_bias": True},
        {"use_shared_rel_pos_bias": True},
        {"use_rel_pos_bias": True, "img_size": 48},
        {"use_rel_pos_bias": True, "use_abs_pos_emb": True},
        {"use_abs_pos_emb": True},
        {"use_rel_pos_bias": True, "init_values": None},
        {"use_rel_pos_bias": True, "qkv_bias": False},
        {"use_rel_pos_bias": True, "mlp_ratio": 3},
        {"use_rel_pos_bias": True, "depth": 3},
        {"use_rel_pos_bias": True, "global_pool": "token"},
        {"use_rel_pos_bias": True, "num_heads": 6},
        {"use_rel_pos_bias": True, "patch_size": 4},
    ],
    ids=str,
)
def test_beit_has_a_place_for_every_weight_it_was_recognised_by(variant: dict[str, object]) -> None:
    weights = beit_weights(**variant)
    network = build_network(recognise_architecture(weights))
    assert (type(network), shapes(network.state_dict())) == (Beit, shapes(weights))


def test_heads_of_a_beit_are_the_columns_of_its_table() -> None:
    architecture = recognise_architecture(beit_weights(use_rel_pos_bias=True, num_heads=6, img_size=48))
    assert (architecture.keywords["num_heads"], architecture.name) == (6, "beit_width192_depth2_patch8_48_heads6")


def test_stated_epsilon_is_that_of_every_norm_of_a_beit() -> None:
    architecture = recognise_architecture(beit_weights(use_rel_pos_bias=True), norm_eps=1e-12)
    norms = [module for module in build_network(architecture).modules() if isinstance(module, nn.LayerNorm)]
    assert ({norm.eps for norm in norms}, architecture.name) == ({1e-12}, "beit_width192_depth2_patch8_32_eps1e-12")


def test_published_beit_has_timms_size_in_its_name() -> None:
    weights = {name: tensor.to("meta") for name, tensor in beit_weights(use_rel_pos_bias=True).items()}
    weights["patch_embed.proj.weight"] = torch.empty(768, 3, 16, 16, device="meta")
    weights["blocks.11.gamma_1"] = torch.empty(768, device="meta")
    assert recognise_architecture(weights).name == "beit_base_patch16_64_heads3"


@pytest.mark.parametrize("grid", [200, 5000])
def test_beit_whose_tables_would_not_fit_into_memory_is_refused(grid: int) -> None:
    table = torch.empty((2 * grid - 1) ** 2 + 3, 3, device="meta")
    weights = beit_weights(use_shared_rel_pos_bias=True) | {"rel_pos_bias.relative_position_bias_table": table}
    with pytest.raises(CheckpointError, match=r"beit_.* needs [\d,]+ bytes for tables") as refusal:
        outline_network(recognise_architecture(weights))
    assert "--arch" in refusal.value.hint


def test_beit_of_512_pixels_has_room_for_its_tables() -> None:
    outline = outline_network(name_architecture("beit_large_patch16_512"))
    assert outline.patch_embed.grid_size == (32, 32)


def test_base_network_without_class_token_is_refused_with_both_numbers_of_heads(vit_weights: WeightMaker) -> None:
    weights = vit_weights(width=768, depth=1, class_token=False)
    with pytest.raises(CheckpointError, match="of width 768 without class token has 12 or 16 heads") as refusal:
        recognise_architecture(weights)
    hint = refusal.value.hint
    assert ("vit_base_patch16_gap_224 (16 heads)" in hint, "img_size=32' (12 heads)" in hint) == (True, True)
    assert recognise_architecture(weights, heads=16).keywords["num_heads"] == 16


@pytest.mark.parametrize("more", [{}, {"registers": 4}])
def test_base_network_with_a_prefix_token_has_12_heads(vit_weights: WeightMaker, more: dict[str, int]) -> None:
    weights = vit_weights(width=768, depth=1, **more)
    assert recognise_architecture(weights).keywords["num_heads"] == 12


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("patch_embed.proj.weight", lambda draw: draw()),
        ("conv1.weight", lambda draw: timm.create_model("resnet18").state_dict()),
    ],
)
def test_weights_for_images_of_13_channels_are_refused(
    vit_weights: WeightMaker, name: str, weights: Callable[[WeightMaker], dict[str, Tensor]]
) -> None:
    tensors = dict(weights(vit_weights))
    tensors[name] = tensors[name][:, :1].repeat(1, 13, 1, 1)
    with pytest.raises(CheckpointError, match="takes images of 13 channels; images here have 3"):
        recognise_architecture(tensors)


def test_patches_that_are_no_squares_are_refused(vit_weights: WeightMaker) -> None:
    weights = vit_weights()
    weights |= {"patch_embed.proj.weight": weights["patch_embed.proj.weight"][..., :4]}
    with pytest.raises(CheckpointError, match="patches of 8 x 4 pixels"):
        recognise_architecture(weights)


@pytest.mark.parametrize("keyword", ["checkpoint_path=/somewhere.pth", "pretrained=True", "pretrained_cfg=x"])
def test_keywords_that_would_open_other_files_are_refused(keyword: str) -> None:
    with pytest.raises(CheckpointError, match="not a keyword of an architecture"):
        name_architecture(f"vit_tiny_patch16_224?{keyword}")
