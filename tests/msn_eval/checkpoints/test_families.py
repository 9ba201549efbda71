"""The weights of a network by timm's names, and its family."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from msn_eval.checkpoints.families import Backbone, classifier_classes, rename_weights
from msn_eval.checkpoints.networks import StoredNetwork

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
PATCHES = "patch_embed.proj.weight"
HUB_PATCHES = "embeddings.patch_embeddings.projection.weight"
RESIDUAL = "layer1.0.conv1.weight"


def read(tensors: Mapping[str, Tensor], path: str = "", beside: tuple[str, ...] = ()) -> Backbone:
    """Read weights at a path in a file, with others beside them."""
    words = tuple(word for word in path.split(".") if word)
    return rename_weights(
        StoredNetwork(key=path or None, words=words, tensors=tensors, beside=dict.fromkeys(beside, ONE))
    )


ONE = torch.ones(1)


def ones(*names: str) -> Weights:
    return dict.fromkeys(names, ONE)


def numbered(*names: str) -> Weights:
    """Return a tensor with a unique value per name, so that it is found again by another name."""
    return {name: torch.full((1,), float(number)) for number, name in enumerate(names)}


# Families.


@pytest.mark.parametrize(
    ("family", "tensors", "place", "beside"),
    [
        ("msn", (PATCHES, "cls_token"), "target_encoder", ()),
        ("msn", (PATCHES, "cls_token", "fc.fc1.weight"), "encoder", ()),
        ("ijepa", (PATCHES,), "target_encoder", ()),
        ("ijepa", (PATCHES,), "encoder", ()),
        ("dino", (PATCHES, "cls_token"), "teacher.backbone", ("head.mlp.0.weight",)),
        ("dino", (PATCHES, "cls_token"), "student.backbone", ("head.mlp.0.weight",)),
        ("ibot", (PATCHES, "cls_token", "masked_embed"), "teacher.backbone", ()),
        ("ibot", (PATCHES, "cls_token"), "teacher.backbone", ("head.mlp2.0.weight",)),
        ("ibot", (PATCHES, "cls_token"), "teacher.backbone", ("head.last_layer2.weight_g",)),
        ("ibot", (PATCHES, "cls_token", "masked_embed"), "state_dict", ()),
        ("dinov2", (PATCHES, "cls_token", "mask_token", "blocks.0.ls1.gamma"), "", ()),
        ("dinov2", (PATCHES, "cls_token", "mask_token", "blocks.0.0.ls1.gamma"), "teacher.backbone", ()),
        ("dinov2", (PATCHES, "cls_token", "register_tokens"), "", ()),
        ("mae", (PATCHES, "cls_token", "decoder_pos_embed"), "model", ()),
        ("mocov3", (PATCHES, "cls_token"), "state_dict.base_encoder", ()),
        ("mocov3", (PATCHES, "cls_token"), "state_dict.momentum_encoder", ()),
        ("beit", (PATCHES, "cls_token", "blocks.0.gamma_1"), "model", ()),
        ("beit", (PATCHES, "cls_token", "blocks.0.attn.relative_position_bias_table"), "model", ()),
        ("solo-learn", (PATCHES, "cls_token"), "state_dict.backbone", ("classifier.weight",)),
        ("solo-learn", (PATCHES, "cls_token"), "state_dict.backbone", ("online_classifier.weight",)),
        ("timm", (PATCHES, "cls_token"), "model.backbone", ("classifier.weight",)),
        ("timm", (PATCHES, "cls_token"), "state_dict.backbone", ("projector.weight",)),
        ("lightly", (PATCHES, "cls_token"), "state_dict.backbone.vit", ()),
        ("lightly", (PATCHES, "cls_token"), "state_dict.anchor_backbone.vit", ()),
        ("lightly", (PATCHES, "cls_token"), "state_dict.student_backbone.vit", ()),
        ("lightly", (PATCHES, "cls_token"), "state_dict.teacher_backbone.vit", ()),
        ("lightly", ("conv_proj.weight",), "state_dict.backbone.vit", ()),
        ("timm", (PATCHES, "cls_token"), "state_dict.vit", ()),
        ("timm", (PATCHES, "cls_token"), "", ()),
        ("timm", (PATCHES, "mask_token", "cls_token"), "", ()),
        ("torchvision", ("conv_proj.weight",), "", ()),
        ("huggingface", (HUB_PATCHES,), "", ()),
        ("moco", (RESIDUAL,), "state_dict.encoder_q", ()),
        ("moco", (RESIDUAL,), "state_dict.encoder_k", ()),
        ("mocov3", (RESIDUAL,), "state_dict.base_encoder", ()),
        ("mocov3", (RESIDUAL,), "state_dict.momentum_encoder", ()),
        ("simsiam", (RESIDUAL,), "state_dict.encoder", ("predictor.0.weight",)),
        ("torchvision", (RESIDUAL,), "state_dict.encoder", ()),
        ("swav", (RESIDUAL, "prototypes.weight"), "", ()),
        ("swav", (RESIDUAL, "projection_head.0.weight"), "", ()),
        ("dino", (RESIDUAL,), "teacher.backbone", ()),
        ("solo-learn", (RESIDUAL,), "state_dict.backbone", ("classifier.weight",)),
        ("torchvision", (RESIDUAL,), "model.backbone", ("projector.0.weight",)),
        ("torchvision", (RESIDUAL,), "", ()),
        ("lightly", ("4.0.conv1.weight",), "state_dict.backbone", ()),
        ("other", ("stem.weight",), "", ()),
    ],
)
def test_family_is_recognised_by_names_place_and_neighbours(
    family: str, tensors: tuple[str, ...], place: str, beside: tuple[str, ...]
) -> None:
    assert read(ones(*tensors), place, beside).format == family


def test_twelve_heads_are_those_of_moco_v3s_transformers_alone(vit_weights: WeightMaker) -> None:
    places = ("state_dict.base_encoder", "state_dict.encoder", "target_encoder", "")
    assert [read(vit_weights(depth=1), place).heads for place in places] == [12, None, None, None]


# What is left out.


@pytest.mark.parametrize(
    "name",
    [
        *("head.weight", "head_dist.bias", "fc.fc1.weight", "lm_head.weight", "projection_head.0.weight", "prototypes"),
        *("predictor.0.weight", "projector.0.weight", "cls_pt_layers.0.norm1.weight", "mask_token", "masked_embed"),
        *("decoder_pos_embed", "decoder_blocks.0.norm1.weight", "queue", "queue_ptr"),
    ],
)
def test_part_of_pretraining_is_dropped_from_a_transformer(vit_weights: WeightMaker, name: str) -> None:
    weights = vit_weights(depth=1)
    backbone = read(weights | ones(name))
    assert (backbone.weights.keys(), backbone.dropped) == (weights.keys(), (name,))


@pytest.mark.parametrize(
    "name", ["head2.weight", "fc_norm.weight", "blocks.0.head.weight", "dist_token", "norm_pre.weight"]
)
def test_other_weights_of_a_transformer_stay(vit_weights: WeightMaker, name: str) -> None:
    assert name in read(vit_weights(depth=1) | ones(name)).weights


@pytest.mark.parametrize(
    "name",
    [
        *("fc.weight", "fc.0.weight", "head.weight", "classifier.weight", "projection_head.0.weight"),
        *("prototypes.weight", "projector.0.weight", "predictor.0.weight", "queue", "queue_ptr"),
    ],
)
def test_part_of_pretraining_is_dropped_from_a_residual_network(name: str) -> None:
    backbone = read(ones(RESIDUAL, "bn1.weight", name))
    assert (list(backbone.weights), backbone.dropped) == ([RESIDUAL, "bn1.weight"], (name,))


def test_other_weights_of_a_residual_network_stay() -> None:
    assert "layer1.0.fc.weight" in read(ones(RESIDUAL, "layer1.0.fc.weight")).weights


@pytest.mark.parametrize(
    "name", ["heads.head.weight", "head.bias", "fc.weight", "classifier.weight", "head_dist.weight"]
)
@pytest.mark.parametrize("anchor", ["conv_proj.weight", "4.0.conv1.weight", "stem.weight"])
def test_classifier_of_other_networks_is_dropped(anchor: str, name: str) -> None:
    assert read(ones(anchor, name)).dropped == (name,)


@pytest.mark.parametrize(
    "name",
    [
        *("classifier.weight", "decoder.layers.0.norm.weight", "lm_head.weight", "pooler.dense.weight"),
        *(
            "embeddings.mask_token",
            "encoder.layer.0.attention.attention.relative_position_bias.relative_position_index",
        ),
    ],
)
def test_part_of_pretraining_is_dropped_from_a_network_of_transformers(name: str) -> None:
    backbone = read(ones(HUB_PATCHES, "embeddings.cls_token", name))
    assert (list(backbone.weights), backbone.dropped) == ([PATCHES, "cls_token"], (name,))


@pytest.mark.parametrize("name", ["register_tokens", "pos_embed"])
def test_positions_stay_without_registers_and_registers_without_positions(name: str) -> None:
    stored = ones(PATCHES, "cls_token", name)
    assert read(stored).weights.keys() == stored.keys()


def test_torchvision_transformer_of_older_releases_gets_the_same_names() -> None:
    theirs = TorchvisionViT(image_size=32, patch_size=8, num_layers=1, num_heads=3, hidden_dim=192, mlp_dim=768)
    older = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): weight
        for name, weight in theirs.state_dict().items()
    }
    assert read(older).weights.keys() == read(theirs.state_dict()).weights.keys()


def test_residual_network_gets_back_the_names_that_a_sequence_took() -> None:
    places = (
        "0.weight",
        "1.running_var",
        "4.0.conv1.weight",
        "5.1.bn2.bias",
        "6.0.downsample.0.weight",
        "7.1.bn1.bias",
    )
    assert list(read(ones(*places)).weights) == [
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer2.1.bn2.bias",
        "layer3.0.downsample.0.weight",
        "layer4.1.bn1.bias",
    ]


@pytest.mark.parametrize(
    ("absent", "left"),
    [
        ("k", ["blocks.0.attn.qkv.weight"]),
        ("v", ["blocks.0.attn.qkv.weight"]),
        ("q", ["blocks.0.attn.k.weight", "blocks.0.attn.v.weight"]),
    ],
)
def test_missing_part_leaves_the_queries_alone_which_fit_no_network(absent: str, left: list[str]) -> None:
    stored = {f"layers.0.attention.{part}_proj.weight": torch.ones(2, 2) for part in "qkv" if part != absent}
    weights = read(stored | ones(HUB_PATCHES)).weights
    assert [name for name in weights if name != PATCHES] == left
    assert all(weights[name].shape == (2, 2) for name in left)


# Classifiers on top.


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("head.weight", 10),
        ("heads.head.weight", 10),
        ("heads.weight", 10),
        ("fc.weight", 10),
        ("classifier.weight", 10),
        ("head.0.weight", None),
        ("fc.fc1.weight", None),
        ("head.bias", None),
        ("projector.weight", None),
    ],
)
def test_classifier_is_a_single_matrix_under_its_name(name: str, classes: int | None) -> None:
    tensors = ones(PATCHES) | {name: torch.ones(10, 192)}
    assert classifier_classes(StoredNetwork(key=None, words=(), tensors=tensors)) == classes


def test_vector_is_not_a_classifier() -> None:
    tensors = ones(PATCHES) | {"head.weight": torch.ones(10)}
    assert classifier_classes(StoredNetwork(key=None, words=(), tensors=tensors)) is None


@pytest.mark.parametrize(("anchor", "classes"), [(HUB_PATCHES, 10), (PATCHES, None), (RESIDUAL, None)])
def test_classifier_beside_a_network_is_one_in_transformers_alone(anchor: str, classes: int | None) -> None:
    beside = {"classifier.weight": torch.ones(10, 192)}
    assert classifier_classes(StoredNetwork(key=None, words=(), tensors=ones(anchor), beside=beside)) == classes


# Fixed positions, by which MoCo v3's networks are recognised where nothing else shows it.


def fixed_positions(width: int = 384, grid: int = 14, *, rows_first: bool = True) -> Tensor:
    one, other = torch.meshgrid(torch.arange(float(grid)), torch.arange(float(grid)), indexing="ij")
    first, second = (one, other) if rows_first else (other, one)
    omega = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angles = [torch.outer(numbers.flatten(), omega) for numbers in (first, second)]
    patches = torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()], dim=1)
    return torch.cat([torch.zeros(1, width), patches])[None]


def with_positions(positions: Tensor) -> Weights:
    width = positions.shape[2]
    return {PATCHES: torch.ones(width, 3, 16, 16), "cls_token": torch.ones(1, 1, width), "pos_embed": positions}


@pytest.mark.parametrize("width", [192, 384, 768])
def test_fixed_positions_of_mocov3_give_its_twelve_heads(width: int) -> None:
    backbone = read(with_positions(fixed_positions(width)))
    assert (backbone.format, backbone.heads) == ("mocov3", 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fixed_positions_are_known_in_half_precision(dtype: torch.dtype) -> None:
    assert read(with_positions(fixed_positions().to(dtype))).heads == 12


@pytest.mark.parametrize(
    "positions",
    [
        fixed_positions(rows_first=False),
        fixed_positions() + 0.02,
        fixed_positions()[:, 1:],
        fixed_positions().roll(1, dims=1),
        torch.randn(1, 197, 384, generator=torch.Generator().manual_seed(1)),
        torch.zeros(1, 197, 384),
    ],
    ids=["MAE's", "trained since", "no class token's", "class token last", "learned", "zeros"],
)
def test_other_positions_leave_the_heads_to_the_width(positions: Tensor) -> None:
    assert read(with_positions(positions)).heads is None


@pytest.mark.parametrize(("place", "family"), [("target_encoder", "msn"), ("teacher.backbone", "dino")])
def test_positions_do_not_go_before_what_a_file_says(place: str, family: str) -> None:
    backbone = read(with_positions(fixed_positions()), place)
    assert (backbone.format, backbone.heads) == (family, None)


def test_mocov3_wider_than_its_base_has_the_heads_of_its_width() -> None:
    weights = with_positions(fixed_positions(1024, grid=4))
    assert read(weights, "state_dict.base_encoder").heads is None


@pytest.mark.parametrize(
    ("anchor", "names"),
    [
        (PATCHES, ("blocks.0.3.mlp.fc1.weight", "blocks.1.3.mlp.fc1.weight")),
        (PATCHES, ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight")),
        (HUB_PATCHES, ("layers.0.mlp.fc1.weight", "encoder.layer.0.intermediate.dense.weight")),
        (HUB_PATCHES, ("layers.0.attention.q_proj.weight", "encoder.layer.0.attention.attention.query.weight")),
        ("conv_proj.weight", ("encoder.layers.encoder_layer_0.mlp.0.weight", "blocks.0.mlp.fc1.weight")),
        ("4.0.conv1.weight", ("0.weight", "conv1.weight")),
    ],
)
def test_second_weight_of_one_meaning_is_never_lost(anchor: str, names: tuple[str, str]) -> None:
    backbone = read(ones(anchor) | numbered(*names))
    assert {0.0, 1.0} <= {tensor.item() for tensor in backbone.weights.values()}


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_adapter_beside_a_projection_is_never_lost(part: str) -> None:
    projections = {f"layers.0.attention.{one}_proj.weight": torch.ones(2, 2) for one in "qkv"}
    adapter = {f"layers.0.attention.{part}_proj.lora_A.weight": torch.ones(1, 2)}
    names = read(ones(HUB_PATCHES) | projections | adapter).weights
    assert any("lora_A" in name for name in names)


@pytest.mark.parametrize(("rows_first", "heads"), [(True, 12), (False, 12)])
def test_solo_learns_networks_of_fixed_positions_have_twelve_heads(rows_first: bool, heads: int) -> None:
    weights = with_positions(fixed_positions(192, rows_first=rows_first))
    assert read(weights, "state_dict.backbone", ("classifier.weight",)).heads == heads


def test_solo_learns_networks_of_learned_positions_have_the_heads_of_their_width() -> None:
    weights = with_positions(torch.randn(1, 197, 192, generator=torch.Generator().manual_seed(1)))
    assert read(weights, "state_dict.backbone", ("classifier.weight",)).heads is None
