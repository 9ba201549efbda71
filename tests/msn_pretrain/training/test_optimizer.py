"""What an optimiser treats alike, listed."""

import torch

from msn_pretrain.config.recipe import SGD, Criterion, Encoder, Head, MSNRecipe, Projector, SimSiamRecipe, Views
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.methods.msn import MSN, build_msn
from msn_pretrain.methods.simsiam import build_simsiam
from msn_pretrain.training.optimizer import build_optimizer, parameter_groups, set_for_step

SMALL_VIT = "vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=12&depth=1&num_heads=3"
SMALL = MSNRecipe(
    encoder=Encoder(name=SMALL_VIT),
    views=Views(image_pixels=16, focal_pixels=8),
    head=Head(hidden=10, output=6),
    criterion=Criterion(prototypes=4),
)


def small_msn() -> MSN:
    return build_msn(SMALL)


def test_parameter_groups_of_msn_are_those_of_the_release() -> None:
    groups = {(one.label, one.decays): list(one.names) for one in parameter_groups(small_msn(), SMALL)}

    network, head = "anchor.trunk.network.", "anchor.head."
    layers = ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    norms = ["blocks.0.norm1", "blocks.0.norm2", "norm"]
    assert groups.keys() == {("prototypes", False), ("encoder", True), ("encoder", False)}
    assert groups["prototypes", False] == ["prototypes"]
    assert sorted(groups["encoder", True]) == sorted(
        [network + "cls_token", network + "pos_embed"]
        + [f"{network}{layer}.weight" for layer in layers]
        + [f"{head}fc{number}.weight" for number in (1, 2, 3)]
    )
    assert sorted(groups["encoder", False]) == sorted(
        [f"{network}{layer}.bias" for layer in layers]
        + [f"{network}{norm}.{part}" for norm in norms for part in ("weight", "bias")]
        + [f"{head}fc{number}.bias" for number in (1, 2, 3)]
        + [f"{head}bn{number}.{part}" for number in (1, 2) for part in ("weight", "bias")]
    )


def test_simsiam_decays_everything_and_keeps_its_predictor_apart() -> None:
    recipe = SimSiamRecipe(encoder=Encoder(name="resnet18"), projector=Projector(output=8, predictor=4))
    model = build_simsiam(recipe)

    groups = parameter_groups(model, recipe)

    assert [(one.label, one.decays, one.fixed_rate) for one in groups] == [
        ("encoder", True, False),
        ("predictor", True, True),
    ]
    assert sorted(name for one in groups for name in one.names) == sorted(name for name, _ in model.named_parameters())


def test_simsiam_with_adamw_spares_vectors() -> None:
    recipe = SimSiamRecipe(
        encoder=Encoder(name=SMALL_VIT), projector=Projector(output=8, predictor=4), optimization=SGD(optimizer="adamw")
    )
    model = build_simsiam(recipe)

    kinds = {(one.label, one.decays) for one in parameter_groups(model, recipe)}

    assert kinds == {("encoder", True), ("encoder", False), ("predictor", True), ("predictor", False)}


def test_rates_and_decay_of_a_step_reach_their_groups() -> None:
    optimizer = build_optimizer(small_msn(), SMALL)

    set_for_step(optimizer, StepSettings(learning_rate=0.5, fixed_learning_rate=0.7, weight_decay=0.1))

    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.0, 0.1]


def test_predictor_of_simsiam_keeps_its_rate() -> None:
    recipe = SimSiamRecipe(encoder=Encoder(name="resnet18"), projector=Projector(output=8, predictor=4))
    optimizer = build_optimizer(build_simsiam(recipe), recipe)

    set_for_step(optimizer, StepSettings(learning_rate=0.5, fixed_learning_rate=0.7, weight_decay=0.1))

    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.7]
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_an_update_moves_all_that_is_trained_and_nothing_else() -> None:
    model = small_msn()
    optimizer = build_optimizer(model, SMALL)
    before = {name: one.clone() for name, one in model.named_parameters()}
    views = [torch.randn(8, 3, side, side) for side in (16, 16, 8)]

    model(views, torch.arange(3)).total.backward()
    set_for_step(optimizer, StepSettings(learning_rate=0.01, fixed_learning_rate=0.01, weight_decay=0.1))
    optimizer.step()

    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert moved == {name for name, one in model.named_parameters() if one.requires_grad}
