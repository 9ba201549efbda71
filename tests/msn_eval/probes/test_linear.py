"""The linear probe: its grid, the choice on held-out labelled images, and what it must never see."""

import logging
from dataclasses import replace

import pytest
import torch

from msn_eval.config.recipes import linear_recipe_of
from msn_eval.errors import NumericalError, UsageError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import centred_rows
from msn_eval.probes.linear import (
    Heads,
    HeldOut,
    Linear,
    Recipe,
    best_layer,
    draw_held_out,
    fit_linear,
    held_out_scores,
    linear_settings,
    stacked,
    train_grid,
    train_heads,
)

CPU = torch.device("cpu")
_SMALL = Linear(lr_first=0.1, lr_last=10.0, lrs=3, weight_decays=2, epochs=10, batch_size=16, seeds=2)


def _features(*, n: int = 60, n_classes: int = 4, noise: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    values = torch.randn(n_classes, 12, generator=generator)[labels] + noise * torch.randn(n, 12, generator=generator)
    return Features(values=values, labels=labels, image_ids=tuple(map(str, range(n))), n_classes=n_classes, tap="cls")


def _scores(probe: Linear, train: Features, queries: torch.Tensor) -> torch.Tensor:
    (scores,) = fit_linear(probe, train, CPU).scores(queries)
    return scores


def test_the_default_grid_has_thirteen_rates_and_three_decays_all_apart() -> None:
    grid = Linear().grid

    assert len({one.learning_rate for one in grid}) >= 13
    assert len({one.weight_decay for one in grid}) == 3
    assert len(set(grid)) == 39


def test_every_field_that_moves_the_result_is_among_the_protocols_settings() -> None:
    (reference,) = linear_settings(Linear())
    changed = {"lr_first": 0.2, "lr_last": 500.0, "lrs": 14, "weight_decay_first": 1e-8, "weight_decay_last": 1e-2}
    changed |= {"taps": ["mean"], "weight_decays": 4, "epochs": 99, "batch_size": 255, "seeds": 2, "seed": 1, "lr": 3.0}

    for name, value in changed.items():
        assert linear_settings(replace(Linear(), **{name: value})) != (reference,), name


def test_a_protocols_settings_make_its_probe_again() -> None:
    for probe in (_SMALL, Linear(lr=3.0, weight_decay=1e-4), replace(_SMALL, taps=["cls-norm", "mean"])):
        (params,) = linear_settings(probe)

        assert Linear(**vars(linear_recipe_of(params))) == probe


@pytest.mark.parametrize(("size", "given"), [(1, 0), (2, 1), (9, 1), (10, 1), (19, 1), (20, 2), (103, 10)])
def test_a_class_gives_a_tenth_of_its_images_and_at_least_one(size: int, given: int) -> None:
    labels = torch.cat([torch.zeros(size, dtype=torch.int64), torch.ones(30, dtype=torch.int64)])

    held = draw_held_out(labels, seed=3)

    assert int(held[labels == 0].sum()) == given
    assert int(held[labels == 1].sum()) == 3


def test_the_chosen_layer_is_trained_anew_on_all_images() -> None:
    train = _features()
    fitted = fit_linear(_SMALL, train, CPU)
    chosen = fitted.settings[0].chosen
    assert chosen is not None
    alone = train_heads(
        centred_rows(train.values),
        train.labels,
        [Recipe(learning_rate=chosen["lr"], weight_decay=chosen["weight_decay"])],
        n_classes=4,
        epochs=10,
        batch_size=16,
        generator=torch.Generator().manual_seed(0),
    )

    (scores,) = fitted.scores(train.values)

    expected = centred_rows(train.values) @ alone.weights[0].double().T + alone.biases[0].double()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_held_out_accuracy_is_that_of_a_layer_trained_without_them() -> None:
    train, probe = _features(n=200, noise=1.5), replace(_SMALL, lr_first=0.001, seeds=1, seed=5)
    held = draw_held_out(train.labels, seed=5)
    rows = centred_rows(train.values)
    expected = []
    for recipe in probe.grid:
        alone = train_heads(
            rows[~held],
            train.labels[~held],
            [recipe],
            n_classes=4,
            epochs=10,
            batch_size=16,
            generator=torch.Generator().manual_seed(5),
        )
        scores = rows[held].float() @ alone.weights[0].T + alone.biases[0]
        expected.append(float((scores.argmax(dim=1) == train.labels[held]).double().mean()))

    found = held_out_scores(probe, stacked([train], CPU), train.labels, n_classes=4)

    torch.testing.assert_close(found.accuracies, torch.tensor(expected, dtype=torch.float64))
    assert len(set(expected)) > 1


def _taps(*names: str) -> list[Features]:
    """Give features of the same images at several taps: noise but for `good`, of another width but for `cls`."""
    train, generator = _features(noise=0.3), torch.Generator().manual_seed(1)
    noise = {name: torch.randn(60, 12 if name == "cls" else 9, generator=generator) for name in names}
    return [replace(train, values=train.values if name == "good" else noise[name], tap=name) for name in names]


@pytest.mark.parametrize("order", [("cls", "good", "wide"), ("wide", "cls", "good"), ("good", "wide")])
def test_of_several_taps_the_one_whose_held_out_images_come_out_right_is_chosen_and_retrained(
    order: tuple[str, ...],
) -> None:
    first, *others = _taps(*order)
    (good,) = (one for one in (first, *others) if one.tap == "good")

    fitted = fit_linear(_SMALL, first, CPU, elsewhere=others)

    chosen = fitted.settings[0].chosen
    assert chosen is not None
    assert (fitted.tap, chosen["tap"]) == ("good", "good")
    alone = fit_linear(_SMALL, good, CPU)
    assert chosen == {"tap": "good", **(alone.settings[0].chosen or {})}
    (scores,) = fitted.scores(good.values)
    torch.testing.assert_close(scores, _scores(_SMALL, good, good.values), rtol=0, atol=1e-5)


def test_held_out_scores_of_several_taps_are_those_of_each_alone() -> None:
    offered = _taps("good", "cls", "wide", "narrow")
    labels = offered[0].labels

    found = held_out_scores(_SMALL, stacked(offered, CPU), labels, n_classes=4)

    alone = [held_out_scores(_SMALL, stacked([one], CPU), labels, n_classes=4) for one in offered]
    torch.testing.assert_close(found.accuracies, torch.cat([one.accuracies for one in alone]))
    torch.testing.assert_close(found.losses, torch.cat([one.losses for one in alone]), rtol=1e-4, atol=1e-5)


def test_one_image_a_class_leaves_nothing_to_choose_a_tap_by_either() -> None:
    first, other = (replace(one.only([str(row) for row in range(4)]), tap=one.tap) for one in _taps("cls", "mean"))

    with pytest.raises(NumericalError) as caught:
        fit_linear(Linear(lr=3.0, taps=["cls", "mean"], epochs=2), first, CPU, elsewhere=[other])

    assert "linear.lr=3, and one tap, linear.taps=cls, or use" in str(caught.value)


def test_layers_that_diverge_are_told_with_their_tap(caplog: pytest.LogCaptureFixture) -> None:
    first, other = _taps("cls", "good")
    wild = replace(_SMALL, lr_last=1e38, lrs=3, weight_decay_last=1e3)

    with caplog.at_level(logging.WARNING):
        fit_linear(wild, first, CPU, elsewhere=[other])

    assert " of 12 layers diverged and are left out: learning rates 0.1 with decay 1000 at cls, " in caplog.text


def test_of_equally_accurate_layers_the_smallest_loss_then_the_smallest_rate_wins() -> None:
    grid = [Recipe(learning_rate=rate) for rate in (4.0, 3.0, 2.0, 1.0)]
    found = HeldOut(accuracies=torch.tensor([0.9, 0.9, 0.9, 0.8]), losses=torch.tensor([0.2, 0.2, 0.5, 0.1]))

    assert best_layer(found, grid) == 1


def test_layers_that_diverge_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    wild = replace(_SMALL, lr_last=1e38, lrs=3, weight_decay_last=1e3)

    with caplog.at_level(logging.WARNING):
        fitted = fit_linear(wild, _features(), CPU)

    chosen = fitted.settings[0].chosen
    assert chosen is not None
    assert chosen["diverged"] > 0
    assert f"{chosen['diverged']} of 6 layers diverged and are left out: learning rates" in caplog.text
    (scores,) = fitted.scores(_features().values)
    assert scores.isfinite().all()


def test_a_grid_that_diverges_as_a_whole_is_refused() -> None:
    wild = replace(_SMALL, lr_first=1e38, lr_last=2e38, weight_decay_first=10.0, weight_decay_last=20.0)

    with pytest.raises(NumericalError) as caught:
        fit_linear(wild, _features(), CPU)

    assert str(caught.value) == "linear: all 6 layers diverged\nUse smaller ones: linear.lr_last, linear.lr_first."


def test_one_image_a_class_is_refused_unless_there_is_nothing_to_choose() -> None:
    train = _features(n=4)

    with pytest.raises(NumericalError) as caught:
        fit_linear(_SMALL, train, CPU)

    assert "4 labelled images are one a class" in str(caught.value)
    scores = _scores(Linear(lr=3.0, epochs=10), train, train.values)
    assert (scores.argmax(dim=1) == train.labels).all()


def test_a_class_without_labelled_images_is_never_chosen() -> None:
    train = replace(_features(), n_classes=6)

    scores = _scores(_SMALL, train, train.values)

    assert (scores[:, 4:] == -torch.inf).all()
    assert scores[:, :4].isfinite().all()


@pytest.mark.parametrize(("asked", "named"), [(["cls"], ()), (["cls", "cls"], ()), (["mean", "cls"], ("cls", "mean"))])
def test_taps_are_a_set_and_the_own_one_alone_is_the_protocol_as_it_was(
    asked: list[str], named: tuple[str, ...]
) -> None:
    (settings,) = linear_settings(Linear(taps=asked))

    assert settings.get("taps") == (",".join(named) if named else None)


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["cls", "meen"], "there is no tap 'meen'. Did you mean mean?\nKnown: cls, cls-norm, "),
        ([], "nothing given\nName"),
    ],
)
def test_taps_that_are_none_are_refused(taps: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Linear(taps=taps)

    assert str(caught.value).startswith(f"linear.taps: {message}")


@pytest.mark.parametrize(
    ("fields", "key"), [({"lr": 0.0}, "linear.lr"), ({"lrs": 0}, "linear.lrs"), ({"epochs": -1}, "linear.epochs")]
)
def test_a_field_out_of_range_is_named(fields: dict[str, float], key: str) -> None:
    with pytest.raises(UsageError, match=rf"^{key}: "):
        Linear(**fields)


_RECIPES = [Recipe(learning_rate=0.5), Recipe(learning_rate=2.0, weight_decay=1e-3), Recipe(learning_rate=0.1)]


def _task() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 4
    return torch.randn(4, 12, generator=generator)[labels] + torch.randn(50, 12, generator=generator), labels


def _trained(recipes: list[Recipe], *, seed: int = 7, epochs: int = 5) -> Heads:
    rows, labels = _task()
    generator = torch.Generator().manual_seed(seed)
    return train_heads(rows, labels, recipes, n_classes=4, epochs=epochs, batch_size=16, generator=generator)


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
        for some in torch.randperm(50, generator=generator).split(16):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(layer(rows[some]), labels[some]).backward()
            optimiser.step()
            schedule.step()

    heads = _trained([recipe])

    torch.testing.assert_close(heads.weights[0], layer.weight.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(heads.biases[0], layer.bias.detach(), rtol=0, atol=1e-5)


def test_heads_trained_together_are_those_trained_alone() -> None:
    together = _trained(_RECIPES)

    alone = [_trained([recipe]) for recipe in _RECIPES]

    torch.testing.assert_close(together.weights, torch.cat([one.weights for one in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.biases, torch.cat([one.biases for one in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.losses, torch.cat([one.losses for one in alone]), rtol=0, atol=1e-5)


def test_heads_of_several_taps_trained_together_are_those_trained_alone() -> None:
    rows, labels = _task()
    taps = torch.stack([rows, rows.flip(1), rows.abs()])
    plan = {"n_classes": 4, "epochs": 5, "batch_size": 16}

    together = train_grid(
        lambda some: taps[:, some], labels, _RECIPES, generator=torch.Generator().manual_seed(7), **plan
    )

    alone = [
        train_heads(one, labels, [recipe], generator=torch.Generator().manual_seed(7), **plan)
        for one in taps
        for recipe in _RECIPES
    ]
    torch.testing.assert_close(together.weights, torch.cat([one.weights for one in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.biases, torch.cat([one.biases for one in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together.losses, torch.cat([one.losses for one in alone]), rtol=0, atol=1e-5)


def test_a_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = _trained(_RECIPES), _trained(_RECIPES), _trained(_RECIPES, seed=8)

    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.weights, other.weights)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()

    _trained(_RECIPES)

    assert torch.equal(torch.get_rng_state(), before)


def test_longer_training_lowers_the_loss() -> None:
    assert (_trained(_RECIPES, epochs=30).losses < _trained(_RECIPES, epochs=2).losses).all()


def test_a_head_that_diverges_is_named() -> None:
    with pytest.raises(NumericalError) as caught:
        _trained([Recipe(learning_rate=0.1), Recipe(learning_rate=3e38)])

    assert str(caught.value) == "the linear layer diverged at learning rate 3e+38\nUse a smaller one."
