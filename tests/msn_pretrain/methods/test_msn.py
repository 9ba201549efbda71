"""MSN's step against plain formulas in float64, on one rank and on two."""

import copy
import math

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from msn_eval.features.collapse import effective_rank, spread
from msn_pretrain.config.recipe import Criterion, Encoder, Head, Masking, MSNRecipe, Run, Views
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.methods.msn import MSN, build_msn, collapse_statistics, count_prototypes_in_use, mean_entropy

KEPT = torch.tensor([0, 2, 3])
ROUNDING = {"rtol": 1e-6, "atol": 1e-8}  # interpolated positions are a float32 matrix's


def small_recipe(**sections: object) -> MSNRecipe:
    given = {
        "run": Run(seed=3),
        "encoder": Encoder(name="vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=12&depth=2&num_heads=3"),
        "views": Views(image_pixels=16, focal_pixels=8, focal_views=2),
        "head": Head(hidden=10, output=6),
        "criterion": Criterion(prototypes=7, entropy_weight=0.2),
        "masking": Masking(ratio=0.25),
    }
    return MSNRecipe(**(given | sections))


def small_model(**sections: object) -> MSN:
    """Return a model whose target already differs from its anchor."""
    model = build_msn(small_recipe(**sections)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return model


def some_views(images: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(images, 3, side, side, dtype=torch.float64, generator=generator) for side in (16, 16, 8, 8)]


def plain_head(head: nn.Sequential, rows: Tensor) -> Tensor:
    for linear, norm in ((head.fc1, head.bn1), (head.fc2, head.bn2)):
        rows = rows @ linear.weight.T + linear.bias
        rows = (rows - rows.mean(dim=0)) / (rows.var(dim=0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
        rows = rows * 0.5 * (1 + torch.erf(rows / math.sqrt(2)))
    return rows @ head.fc3.weight.T + head.fc3.bias


def plain_class_token(network: nn.Module, images: Tensor, kept: Tensor | None = None) -> Tensor:
    patches = network.patch_embed.proj(images).flatten(2).transpose(1, 2)
    positions = network.pos_embed[:, 1:]
    if patches.shape[1] != positions.shape[1]:
        grid = positions.reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
        positions = nn.functional.interpolate(grid, size=1, mode="bicubic").flatten(2).transpose(1, 2)
    patches = patches + positions
    if kept is not None:
        patches = patches[:, kept]
    front = (network.cls_token + network.pos_embed[:, :1]).expand(len(images), -1, -1)
    return network.norm(network.blocks(torch.cat([front, patches], dim=1)))[:, 0]


def plain_loss(model: MSN, views: list[Tensor]) -> dict[str, Tensor]:
    """Compute the loss of the paper with the release's settings, from images on."""
    anchor, target = model.anchor, model.target
    random = plain_head(anchor.head, plain_class_token(anchor.trunk.network, views[1], KEPT))
    focal = plain_head(anchor.head, plain_class_token(anchor.trunk.network, torch.cat(views[2:])))
    wanted = plain_head(target.head, plain_class_token(target.trunk.network, views[0])).detach()
    anchors = torch.cat([random, focal])
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (anchors, wanted, model.prototypes)]
    p = (unit[0] @ unit[2].T / 0.1).softmax(dim=1)
    t = (unit[1] @ unit[2].T / 0.1).softmax(dim=1).detach() ** 4
    t = t / t.sum(dim=1, keepdim=True)
    for _ in range(3):
        t = t / t.sum(dim=0, keepdim=True)
        t = t / t.sum(dim=1, keepdim=True)
    parts = {
        "cross_entropy": -(t.repeat(3, 1) * p.log()).sum(dim=1).mean(),
        "me_max": math.log(7) + (p.mean(dim=0) * p.mean(dim=0).log()).sum(),
        "entropy": -(p * p.log()).sum(dim=1).mean(),
    }
    return parts | {"total": parts["cross_entropy"] + parts["me_max"] + 0.2 * parts["entropy"]}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = small_model()
    parts = plain_loss(model, some_views())
    parts["total"].backward()
    return {name: value.detach() for name, value in parts.items()}, gradients_of(model)


def test_step_has_the_parts_and_gradients_of_the_plain_formulas() -> None:
    model = small_model()

    step = model(some_views(), KEPT)
    step.total.backward()

    torch.testing.assert_close((dict(step.parts), gradients_of(model)), plain_step(), **ROUNDING)


def step_of_own_share() -> tuple[tuple[dict[str, Tensor], dict[str, Tensor]], dict[str, float]]:
    model = small_model()
    parallel = DistributedDataParallel(model)
    step = parallel([view.chunk(2)[distributed.get_rank()] for view in some_views()], KEPT)
    step.total.backward()
    return (dict(step.parts), gradients_of(model)), collapse_statistics(step.all_rows())


def test_two_ranks_have_the_parts_gradients_and_statistics_of_the_global_batch(on_ranks) -> None:
    expected = collapse_statistics(small_model()(some_views(), KEPT).all_rows())

    for step, statistics in on_ranks(step_of_own_share):
        torch.testing.assert_close(step, plain_step(), **ROUNDING)
        assert statistics == pytest.approx(expected, rel=1e-6)


def test_target_starts_as_the_anchor_and_follows_unless_skipped_except_for_batch_norm_statistics() -> None:
    model = build_msn(small_recipe())
    start = copy.deepcopy(model.target.state_dict())
    torch.testing.assert_close(model.anchor.state_dict(), start, rtol=0, atol=0)
    for tensor in model.anchor.state_dict().values():
        tensor += 1

    settings = StepSettings(learning_rate=0.0, fixed_learning_rate=0.0, weight_decay=0.0, ema=0.75)
    model.after_update(settings, torch.tensor(1.0))
    torch.testing.assert_close(dict(model.target.state_dict()), dict(start), rtol=0, atol=0)
    model.after_update(settings, torch.tensor(0.0))

    expected = start | {name: start[name] + 0.25 for name, _ in model.target.named_parameters()}
    torch.testing.assert_close(dict(model.target.state_dict()), dict(expected))


def test_without_masking_nothing_is_drawn_and_nothing_dropped() -> None:
    model = small_model(masking=Masking(ratio=0.0))

    assert model.draw_kept(torch.Generator(), images=8) is None
    expected = model(some_views(), torch.arange(4)).total
    assert torch.equal(model(some_views()).total, expected)


def test_each_image_may_have_its_own_mask() -> None:
    model = small_model(masking=Masking(ratio=0.5, per_image=True))

    assert model.draw_kept(torch.Generator().manual_seed(0), images=8).shape == (8, 2)


def test_random_views_of_the_focal_size_are_masked_and_focal_ones_are_not() -> None:
    model = small_model(views=Views(image_pixels=16, focal_pixels=16, focal_views=1))
    views = [*some_views()[:2], some_views()[1]]

    masked, complete = model.encode_anchors(views[1:], KEPT).chunk(2)

    torch.testing.assert_close(complete, model.encode_anchors(views[2:]))
    assert not torch.allclose(masked, complete)


def test_sharpening_of_a_step_replaces_that_of_the_recipe() -> None:
    model = small_model()

    soft, sharp = (model(some_views(), KEPT, sharpening=value) for value in (1.0, 0.25))

    sharp_statistics, soft_statistics = (collapse_statistics(step.all_rows()) for step in (sharp, soft))
    assert sharp_statistics["target_entropy"] < soft_statistics["target_entropy"]
    assert torch.equal(sharp.total, model(some_views(), KEPT).total)


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first = build_msn(small_recipe()).state_dict()
    torch.manual_seed(2)
    again, other = build_msn(small_recipe()).state_dict(), build_msn(small_recipe(run=Run(seed=4))).state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["prototypes"], other["prototypes"])


def test_prototypes_start_within_the_root_of_the_width() -> None:
    prototypes = build_msn(small_recipe(criterion=Criterion(prototypes=500))).prototypes.detach()

    assert float(prototypes.abs().max()) == pytest.approx(6**-0.5, rel=0.01)


def test_state_holds_anchor_target_and_prototypes_by_timms_names() -> None:
    names = build_msn(small_recipe()).state_dict().keys()

    assert {"prototypes", "anchor.trunk.network.cls_token", "target.head.fc3.weight"} <= names
    assert not any("to_1_per_side" in name or "prior" in name for name in names)


def test_equal_features_have_no_spread_and_rank_one() -> None:
    features = torch.ones(20, 8)

    assert spread(features) == pytest.approx(0, abs=1e-6)
    assert effective_rank(features) == pytest.approx(1)
    assert effective_rank(torch.zeros(4, 3)) == 1


def test_random_directions_have_spread_one() -> None:
    features = torch.randn(5_000, 64, generator=torch.Generator().manual_seed(0))

    assert spread(features) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, shape[1])
    shares = torch.linalg.svdvals(features.double())
    shares = shares / shares.sum()

    assert effective_rank(features) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-6)


def test_prototypes_in_use_are_the_largest_of_some_image() -> None:
    assert count_prototypes_in_use(torch.tensor([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])) == 2


def test_entropy_of_certain_and_even_targets() -> None:
    assert mean_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(math.log(2) / 2)
