"""SimSiam's networks and step."""

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from msn_eval.errors import UsageError
from msn_pretrain.config.recipe import Encoder, Projector, Run, SimSiamRecipe
from msn_pretrain.methods.msn import collapse_statistics
from msn_pretrain.methods.simsiam import SimSiam, build_simsiam

SMALL_VIT = "vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=12&depth=1&num_heads=3"
ROUNDING = {"rtol": 1e-6, "atol": 1e-9}


def small_model(name: str = "resnet18", stem: str = "cifar") -> SimSiam:
    recipe = SimSiamRecipe(
        run=Run(seed=1),
        encoder=Encoder(name=name, stem=stem),
        projector=Projector(layers=2, output=8, predictor=4),
    )
    return build_simsiam(recipe)


def two_views(images: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, 3, 32, 32, generator=generator) for _ in range(2)]


def plain_step(model: SimSiam, views: list[Tensor]) -> Tensor:
    z1, z2 = (model.projector(model.network(view)) for view in views)
    p1, p2 = model.predictor(z1), model.predictor(z2)

    def cosines(p: Tensor, z: Tensor) -> Tensor:
        return (p / p.norm(dim=1, keepdim=True) * z / z.norm(dim=1, keepdim=True)).sum(dim=1)

    return -0.5 * (cosines(p1, z2.detach()).mean() + cosines(p2, z1.detach()).mean())


def small_double() -> SimSiam:
    return small_model(SMALL_VIT, "imagenet").double()


def step_of_own_share() -> tuple[Tensor, list[Tensor]]:
    model = small_double()
    views = [view.double().chunk(2)[distributed.get_rank()] for view in two_views()]
    parallel = DistributedDataParallel(model)  # held until after the backward pass: it adds the gradients
    step = parallel(views)
    step.total.backward()
    return step.parts["total"], [parameter.grad for parameter in model.parameters()]


def test_two_ranks_have_the_plain_formulas_value_and_gradients(on_ranks) -> None:
    model = small_double()
    loss = plain_step(model, [view.double() for view in two_views()])
    loss.backward()

    for value, gradients in on_ranks(step_of_own_share):
        torch.testing.assert_close(value, loss.detach(), **ROUNDING)
        torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()], **ROUNDING)


def test_a_step_is_the_plain_formula() -> None:
    model, plain = small_model(), small_model()

    torch.testing.assert_close(model(two_views()).total, plain_step(plain, two_views()))


def test_cifar_stem_keeps_the_size_of_small_images() -> None:
    network = small_model().network

    assert network.maxpool(network.act1(network.bn1(network.conv1(two_views()[0])))).shape[2:] == (32, 32)
    assert network.conv1.weight.shape == (64, 3, 3, 3)


def test_last_batch_norm_of_each_block_starts_at_zero() -> None:
    network = small_model().network

    assert not network.layer1[0].bn2.weight.any()
    assert network.layer1[0].bn1.weight.all()


def test_resnet50_has_the_published_widths() -> None:
    model = build_simsiam(SimSiamRecipe())

    weights = (*model.projector.parameters(), *model.predictor.parameters())
    assert [tuple(weight.shape) for weight in weights if weight.dim() > 1] == [(2048, 2048)] * 3 + [
        (512, 2048),
        (2048, 512),
    ]


def test_statistics_show_a_collapse() -> None:
    model = small_model()
    statistics = collapse_statistics(model([torch.zeros(4, 3, 32, 32)] * 2).all_rows())

    assert statistics["feature_spread"] == pytest.approx(0, abs=1e-5)
    assert statistics["feature_rank"] == pytest.approx(1, abs=1e-3)


def test_a_stem_for_residual_networks_is_refused_for_others() -> None:
    with pytest.raises(UsageError, match="for residual networks"):
        small_model(SMALL_VIT, "cifar")
