"""The linear probe: its grid, the choice on held-out labelled images, and the steps of its optimiser."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from msn_eval.config.recipes import LinearRecipe, read_linear_recipe
from msn_eval.errors import NumericalError, UsageError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FittedProbe, centre_rows
from msn_eval.probes.linear import (
    Heads,
    HeldOutScores,
    Linear,
    Recipe,
    choose_layer,
    draw_held_out,
    make_grid,
    score_held_out,
    stack_taps,
    train_grid,
    train_heads,
)

CPU = torch.device("cpu")
_SMALL = LinearRecipe(lr_first=0.1, lr_last=10.0, lrs=3, weight_decays=2, epochs=10, batch_size=16, seeds=2)
_WILD = replace(_SMALL, lr_last=1e38, lrs=3, weight_decay_last=1e3)


def _features(*, n: int = 60, n_classes: int = 4, noise: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    values = torch.randn(n_classes, 12, generator=generator)[labels] + noise * torch.randn(n, 12, generator=generator)
    return Features(values=values, labels=labels, image_ids=tuple(map(str, range(n))), n_classes=n_classes, tap="cls")


def _fit(recipe: LinearRecipe, train: Features, *other_taps: Features) -> FittedProbe:
    return Linear(recipe).fit(train, CPU, other_taps=other_taps)


def _scores(recipe: LinearRecipe, train: Features, queries: Tensor) -> Tensor:
    (scores,) = _fit(recipe, train).scores(queries)
    return scores


def _train(rows: Tensor, labels: Tensor, recipes: list[Recipe], *, seed: int, **changes: Any) -> Heads:
    options = {"n_classes": 4, "epochs": 10, "batch_size": 16} | changes
    return train_heads(rows, labels, recipes, generator=torch.Generator().manual_seed(seed), **options)


def test_the_default_grid_has_thirteen_rates_and_three_decays_all_apart() -> None:
    grid = make_grid(LinearRecipe())

    assert len({layer.learning_rate for layer in grid}) >= 13
    assert len({layer.weight_decay for layer in grid}) == 3
    assert len(set(grid)) == 39


def test_every_field_that_changes_the_result_is_part_of_the_protocol() -> None:
    (reference,) = Linear().configs(9)
    changes = {"lr_first": 0.2, "lr_last": 500.0, "lrs": 14, "weight_decay_first": 1e-8, "weight_decay_last": 1e-2}
    changes |= {"taps": ["mean"], "weight_decays": 4, "epochs": 99, "batch_size": 255, "seeds": 2, "seed": 1, "lr": 3.0}

    for name, value in changes.items():
        assert Linear(LinearRecipe(**{name: value})).configs(9) != (reference,), name


@pytest.mark.parametrize(
    "recipe",
    [_SMALL, LinearRecipe(lr=3.0, weight_decay=1e-4), replace(_SMALL, taps=["cls-norm", "mean"])],
    ids=["grid", "rate", "taps"],
)
def test_the_parameters_of_a_protocol_make_its_recipe_again(recipe: LinearRecipe) -> None:
    (params,) = Linear(recipe).configs(9)

    assert read_linear_recipe(params) == recipe


@pytest.mark.parametrize(("size", "held"), [(1, 0), (2, 1), (9, 1), (10, 1), (19, 1), (20, 2), (103, 10)])
def test_a_tenth_of_each_class_and_at_least_one_image_is_held_out(size: int, held: int) -> None:
    labels = torch.cat([torch.zeros(size, dtype=torch.int64), torch.ones(30, dtype=torch.int64)])

    held_out = draw_held_out(labels, seed=3)

    assert labels[held_out].bincount(minlength=2).tolist() == [held, 3]


def test_the_chosen_layer_is_trained_again_on_all_images() -> None:
    train = _features()
    fitted = _fit(_SMALL, train)
    chosen = fitted.settings[0].chosen
    assert chosen is not None
    recipe = Recipe(learning_rate=float(chosen["lr"]), weight_decay=float(chosen["weight_decay"]))
    alone = _train(centre_rows(train.values), train.labels, [recipe], seed=0)

    (scores,) = fitted.scores(train.values)

    expected = centre_rows(train.values) @ alone.weights[0].double().T + alone.biases[0].double()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_held_out_accuracy_is_that_of_a_layer_trained_without_them() -> None:
    train, recipe = _features(n=200, noise=1.5), replace(_SMALL, lr_first=0.001, seeds=1, seed=5)
    held = draw_held_out(train.labels, seed=5)
    rows = centre_rows(train.values)
    expected = []
    for layer in make_grid(recipe):
        alone = _train(rows[~held], train.labels[~held], [layer], seed=5)
        scores = rows[held].float() @ alone.weights[0].T + alone.biases[0]
        expected.append(float((scores.argmax(dim=1) == train.labels[held]).double().mean()))

    held_out = score_held_out(recipe, stack_taps([train], CPU), train.labels, n_classes=4)

    torch.testing.assert_close(held_out.accuracies, torch.tensor(expected, dtype=torch.float64))
    assert len(set(expected)) > 1


def _taps(*names: str) -> list[Features]:
    """Return features of the same images at several taps: noise except at `good`, of a different width except at `cls`."""
    train, generator = _features(noise=0.3), torch.Generator().manual_seed(1)
    noise = {name: torch.randn(60, 12 if name == "cls" else 9, generator=generator) for name in names}
    return [replace(train, values=train.values if name == "good" else noise[name], tap=name) for name in names]


@pytest.mark.parametrize("order", [("cls", "good", "wide"), ("wide", "cls", "good"), ("good", "wide")])
def test_of_several_taps_the_most_accurate_on_held_out_images_is_chosen_and_trained(order: tuple[str, ...]) -> None:
    offered = _taps(*order)
    (good,) = (features for features in offered if features.tap == "good")

    fitted = _fit(_SMALL, *offered)

    assert fitted.tap == "good"
    assert fitted.settings[0].chosen == {"tap": "good", **(_fit(_SMALL, good).settings[0].chosen or {})}
    (scores,) = fitted.scores(good.values)
    torch.testing.assert_close(scores, _scores(_SMALL, good, good.values), rtol=0, atol=1e-5)


def test_held_out_scores_of_several_taps_are_those_of_each_alone() -> None:
    offered = _taps("good", "cls", "wide", "narrow")
    labels = offered[0].labels

    together = score_held_out(_SMALL, stack_taps(offered, CPU), labels, n_classes=4)

    alone = [score_held_out(_SMALL, stack_taps([tap], CPU), labels, n_classes=4) for tap in offered]
    torch.testing.assert_close(together.accuracies, torch.cat([scores.accuracies for scores in alone]))
    torch.testing.assert_close(together.losses, torch.cat([scores.losses for scores in alone]), rtol=1e-4, atol=1e-5)


def test_of_equally_accurate_layers_the_smallest_loss_then_the_smallest_rate_wins() -> None:
    layers = [Recipe(learning_rate=rate) for rate in (4.0, 3.0, 2.0, 1.0, 0.5)]
    scores = HeldOutScores(
        accuracies=torch.tensor([0.9, 0.9, 0.9, 0.9, 0.8]), losses=torch.tensor([0.2, 0.2, 0.2, 0.5, 0.1])
    )

    assert choose_layer(scores, layers) == 2


@pytest.mark.parametrize(("taps", "where"), [(["cls"], ""), (["cls", "good"], " at cls")], ids=["one tap", "two taps"])
def test_layers_that_diverge_are_left_out_with_a_warning(
    taps: list[str], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    offered = _taps(*taps)

    with caplog.at_level(logging.WARNING):
        fitted = _fit(_WILD, *offered)

    chosen = fitted.settings[0].chosen
    assert chosen is not None
    assert (
        f"left out {chosen['diverged']} of {6 * len(taps)} layers, which diverged: learning rates 0.1 with decay 1000{where}, "
        in caplog.text
    )
    (scores,) = fitted.scores(offered[-1].values)
    assert scores.isfinite().all()


def test_a_grid_of_which_every_layer_diverges_is_refused() -> None:
    wild = replace(_SMALL, lr_first=1e38, lr_last=2e38, weight_decay_first=10.0, weight_decay_last=20.0)

    with pytest.raises(NumericalError) as caught:
        _fit(wild, _features())

    assert (
        str(caught.value)
        == "linear: diverged at every learning rate\nUse smaller ones: linear.lr_last, linear.lr_first."
    )


@pytest.mark.parametrize(
    ("recipe", "taps", "hint"),
    [
        (_SMALL, ["cls"], "linear.lr=3, or use"),
        (LinearRecipe(lr=3.0, epochs=2), ["cls", "mean"], "linear.lr=3, and one tap, linear.taps=cls, or use"),
    ],
)
def test_one_image_per_class_leaves_nothing_to_choose_by(recipe: LinearRecipe, taps: list[str], hint: str) -> None:
    offered = [replace(tap.only([str(row) for row in range(4)]), tap=tap.tap) for tap in _taps(*taps)]

    with pytest.raises(NumericalError, match="4 labelled images are one per class") as caught:
        _fit(recipe, *offered)

    assert hint in str(caught.value)


def test_one_learning_rate_needs_no_more_than_one_image_per_class() -> None:
    train = _features(n=4)

    scores = _scores(LinearRecipe(lr=3.0, epochs=10), train, train.values)

    assert (scores.argmax(dim=1) == train.labels).all()


def test_a_class_without_labelled_images_is_never_predicted() -> None:
    train = replace(_features(), n_classes=6)

    scores = _scores(_SMALL, train, train.values)

    assert (scores[:, 4:] == -torch.inf).all()
    assert scores[:, :4].isfinite().all()


@pytest.mark.parametrize(("taps", "named"), [(["cls"], None), (["cls", "cls"], None), (["mean", "cls"], "cls,mean")])
def test_taps_are_a_set_and_cls_alone_is_the_default_protocol(taps: list[str], named: str | None) -> None:
    (params,) = Linear(LinearRecipe(taps=taps)).configs(9)

    assert params.get("taps") == named


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"taps": ["meen"]}, "linear.taps: cannot be 'meen'. Did you mean mean?\nAllowed: cls, cls-norm, "),
        ({"taps": []}, "linear.taps: nothing given\nName"),
        ({"lr": 0.0}, "linear.lr: "),
        ({"lrs": 0}, "linear.lrs: "),
        ({"epochs": -1}, "linear.epochs: "),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        LinearRecipe(**fields)

    assert str(caught.value).startswith(message)


_RECIPES = [Recipe(learning_rate=0.5), Recipe(learning_rate=2.0, weight_decay=1e-3), Recipe(learning_rate=0.1)]


def _task() -> tuple[Tensor, Tensor]:
    train = _features(n=50)
    return train.values, train.labels


def _trained(recipes: list[Recipe], *, seed: int = 7, epochs: int = 5) -> Heads:
    return _train(*_task(), recipes, seed=seed, epochs=epochs)


def _assert_close(together: Heads, alone: list[Heads]) -> None:
    for name in ("weights", "biases", "losses"):
        expected = torch.cat([getattr(heads, name) for heads in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", _RECIPES)
def test_steps_are_those_of_torchs_optimiser(recipe: Recipe) -> None:
    rows, labels = _task()
    layer = torch.nn.Linear(12, 4)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.SGD(
        [{"params": [layer.weight], "weight_decay": recipe.weight_decay}, {"params": [layer.bias]}],
        lr=recipe.learning_rate,
        momentum=0.9,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=5 * 4)
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        for batch in torch.randperm(50, generator=generator).split(16):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(layer(rows[batch]), labels[batch]).backward()
            optimiser.step()
            schedule.step()

    heads = _trained([recipe])

    torch.testing.assert_close(heads.weights[0], layer.weight.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(heads.biases[0], layer.bias.detach(), rtol=0, atol=1e-5)


def test_heads_trained_together_are_those_trained_alone() -> None:
    _assert_close(_trained(_RECIPES), [_trained([recipe]) for recipe in _RECIPES])


def test_heads_of_several_taps_trained_together_are_those_trained_alone() -> None:
    rows, labels = _task()
    taps = torch.stack([rows, rows.flip(1), rows.abs()])

    together = train_grid(
        lambda indices: taps[:, indices],
        labels,
        _RECIPES,
        n_classes=4,
        epochs=5,
        batch_size=16,
        generator=torch.Generator().manual_seed(7),
    )

    _assert_close(together, [_train(tap, labels, [recipe], seed=7, epochs=5) for tap in taps for recipe in _RECIPES])


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again, different = _trained(_RECIPES), _trained(_RECIPES), _trained(_RECIPES, seed=8)

    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.weights, different.weights)


def test_the_global_generator_is_unchanged() -> None:
    before = torch.get_rng_state()

    _trained(_RECIPES)

    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_that_diverges_is_named() -> None:
    with pytest.raises(NumericalError) as caught:
        _trained([Recipe(learning_rate=0.1), Recipe(learning_rate=3e38)])

    assert str(caught.value) == "the linear layer diverged at learning rate 3e+38\nUse a smaller one."
