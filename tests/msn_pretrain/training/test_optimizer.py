"""Parameter groups of the optimisers."""

from dataclasses import replace

import pytest
import torch

from msn_pretrain.config.recipe import SGD, Criterion, Encoder, Head, MSNRecipe, Projector, SimSiamRecipe, Views
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.methods.msn import MSN, build_msn
from msn_pretrain.methods.simsiam import SimSiam, build_simsiam
from msn_pretrain.training.optimizer import build_optimizer, set_for_step, update_weights

SMALL_VIT = "vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=12&depth=1&num_heads=3"
SMALL = MSNRecipe(
    encoder=Encoder(name=SMALL_VIT),
    views=Views(image_pixels=16, focal_pixels=8),
    head=Head(hidden=10, output=6),
    criterion=Criterion(prototypes=4),
)


SIMSIAM = SimSiamRecipe(encoder=Encoder(name="resnet18"), projector=Projector(output=8, predictor=4))


def small_msn() -> MSN:
    return build_msn(SMALL)


def groups_of(model: MSN | SimSiam, optimizer: torch.optim.Optimizer) -> list[tuple[set[str], bool, bool]]:
    """Return the parameter names of each group, whether weight decay applies, and whether the learning rate is constant."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ({names[parameter] for parameter in group["params"]}, group["decays"], group["fixed_rate"])
        for group in optimizer.param_groups
    ]


def test_parameter_groups_of_msn_are_those_of_the_release() -> None:
    model = small_msn()
    groups = groups_of(model, build_optimizer(model, SMALL))

    network, head = "anchor.trunk.network.", "anchor.head."
    layers = ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    norms = ["blocks.0.norm1", "blocks.0.norm2", "norm"]
    decayed = {f"{network}cls_token", f"{network}pos_embed"}
    decayed |= {f"{network}{layer}.weight" for layer in layers} | {f"{head}fc{number}.weight" for number in (1, 2, 3)}
    vectors = {f"{network}{layer}.bias" for layer in layers} | {f"{head}fc{number}.bias" for number in (1, 2, 3)}
    vectors |= {f"{network}{norm}.{name}" for norm in norms for name in ("weight", "bias")}
    vectors |= {f"{head}bn{number}.{name}" for number in (1, 2) for name in ("weight", "bias")}
    expected = [({"prototypes"}, False, False), (decayed, True, False), (vectors, False, False)]
    assert sorted(groups, key=str) == sorted(expected, key=str)


def test_simsiam_decays_everything_and_its_predictor_has_a_constant_rate() -> None:
    model = build_simsiam(SIMSIAM)
    optimizer = build_optimizer(model, SIMSIAM)

    predictor = {name for name, _ in model.named_parameters() if name.startswith("predictor")}
    rest = {name for name, _ in model.named_parameters()} - predictor
    assert groups_of(model, optimizer) == [(rest, True, False), (predictor, True, True)]
    set_for_step(optimizer, StepSettings(learning_rate=0.5, fixed_learning_rate=0.7, weight_decay=0.1))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.7]
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_simsiam_with_adamw_does_not_decay_vectors() -> None:
    recipe = replace(SIMSIAM, encoder=Encoder(name=SMALL_VIT), optimization=SGD(optimizer="adamw"))
    model = build_simsiam(recipe)

    groups = groups_of(model, build_optimizer(model, recipe))

    vectors = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert set().union(*(names for names, decays, _ in groups if not decays)) == vectors


def test_rates_and_decay_of_a_step_reach_their_groups() -> None:
    optimizer = build_optimizer(small_msn(), SMALL)

    set_for_step(optimizer, StepSettings(learning_rate=0.5, fixed_learning_rate=0.7, weight_decay=0.1))

    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.0, 0.1]


def test_update_changes_exactly_the_trained_parameters() -> None:
    model = small_msn()
    optimizer = build_optimizer(model, SMALL)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    views = [torch.randn(8, 3, side, side) for side in (16, 16, 8)]

    model(views, torch.arange(3)).total.backward()
    set_for_step(optimizer, StepSettings(learning_rate=0.01, fixed_learning_rate=0.01, weight_decay=0.1))
    optimizer.step()

    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("recipe", [SMALL, SIMSIAM], ids=["adamw", "sgd"])
@pytest.mark.parametrize("skipped", [(0,), (1, 2)], ids=["first", "later"])
def test_skipped_steps_change_neither_weights_nor_later_steps(
    recipe: MSNRecipe | SimSiamRecipe, skipped: tuple[int, ...]
) -> None:
    def take_steps(leave_out: bool) -> list[torch.Tensor]:
        model = build_msn(recipe) if isinstance(recipe, MSNRecipe) else build_simsiam(recipe)
        optimizer, generator = build_optimizer(model, recipe), torch.Generator().manual_seed(0)
        set_for_step(optimizer, StepSettings(learning_rate=0.01, fixed_learning_rate=0.01, weight_decay=0.1))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for step in range(4):
            for parameter in trained:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                if step in skipped:
                    parameter.grad.fill_(torch.nan)
            if not (leave_out and step in skipped):
                update_weights(optimizer, torch.tensor(float(step in skipped)))
        return trained

    assert all(map(torch.equal, take_steps(leave_out=False), take_steps(leave_out=True)))
