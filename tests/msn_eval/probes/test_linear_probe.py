"""Linear heads by SGD: torch's own optimiser, heads together and alone, determinism."""

import pytest
import torch

from msn_eval.errors import NumericalError
from msn_eval.probes.linear_probe import Heads, Recipe, train_grid, train_heads

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
