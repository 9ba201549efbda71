"""Recipes: published defaults, and values out of range."""

import pytest

from msn_eval.errors import UsageError
from msn_pretrain.config.recipe import SGD, Criterion, Encoder, MSNRecipe, Optimization, SimSiamRecipe, Views


def test_defaults_of_simsiam_are_the_published_values() -> None:
    recipe = SimSiamRecipe()

    assert recipe.optimization == SGD(
        optimizer="sgd", batch_size=512, learning_rate=0.05, momentum=0.9, weight_decay=1e-4, fixed_predictor_rate=True
    )
    assert (recipe.encoder.name, recipe.views.crop_scale, recipe.views.focal_views) == ("resnet50", (0.2, 1.0), 0)
    assert (recipe.projector.layers, recipe.projector.output, recipe.projector.predictor) == (3, 2048, 512)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimization(epochs=0), "optimization.epochs: 0 is out of range"),
        (lambda: Optimization(learning_rate=float("nan")), "optimization.learning_rate: nan is out of range"),
        (lambda: Criterion(temperature=0.0), "criterion.temperature: 0.0 is out of range"),
        (lambda: Criterion(prior="powerlaw"), "criterion.prior: cannot be 'powerlaw'. Did you mean power_law?"),
        (lambda: Views(crop_scale=(0.5, 0.2)), "views.crop_scale: 0.2 is out of range"),
        (lambda: Views(flip=1.5), "views.flip: 1.5 is out of range"),
        (lambda: SimSiamRecipe(views=Views()), "views: SimSiam compares two views"),
        (lambda: MSNRecipe(encoder=Encoder(stem="cifar")), "encoder.stem: cannot be 'cifar'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(make, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()

    assert caught.value.what.startswith(message)
    assert caught.value.hint
