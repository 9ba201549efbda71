"""Schedules against the closed forms, written from the paper and the release's code."""

import math

import pytest

from msn_pretrain.config.recipe import SGD, Criterion, MSNRecipe, Optimization, SimSiamRecipe
from msn_pretrain.config.schedule import settings_at

_PER_EPOCH, _EPOCHS, _WARMUP = 50, 20, 3


def recipe() -> MSNRecipe:
    return MSNRecipe(
        optimization=Optimization(epochs=_EPOCHS, warmup=_WARMUP),
        criterion=Criterion(sharpening=0.5, final_sharpening=0.25),
    )


def test_a_thousand_steps_of_msn_are_the_closed_forms() -> None:
    long = 1.25 * _EPOCHS * _PER_EPOCH  # 1,250 steps of which 1,000 are done
    for step in range(_EPOCHS * _PER_EPOCH):
        now, warm = step + 1, _WARMUP * _PER_EPOCH
        fall = 0.5 * (1 + math.cos(math.pi * (now - warm) / (long - warm)))
        rate = 2e-4 + 8e-4 * now / warm if now < warm else 1e-6 + (1e-3 - 1e-6) * fall
        decay = 0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * now / long))

        settings = settings_at(recipe(), step=step, steps_per_epoch=_PER_EPOCH)

        assert settings.learning_rate == pytest.approx(rate, rel=1e-12)
        assert settings.weight_decay == pytest.approx(decay, rel=1e-12)
        assert settings.ema == pytest.approx(0.996 + 0.004 * step / long, rel=1e-12)
        assert settings.sharpening == pytest.approx(0.5 - 0.25 * step / long, rel=1e-12)


def test_schedules_reach_their_ends_only_without_stretching() -> None:
    unstretched = MSNRecipe(optimization=Optimization(epochs=_EPOCHS, warmup=_WARMUP, stretch=1.0))
    stretched, ended, beyond = (
        settings_at(kind, step=step, steps_per_epoch=_PER_EPOCH)
        for kind, step in ((recipe(), 999), (unstretched, 999), (unstretched, 3000))
    )

    assert stretched.learning_rate > 1e-4
    for settings in (ended, beyond):
        assert (settings.learning_rate, settings.weight_decay) == pytest.approx((1e-6, 0.4))


def test_a_thousand_steps_of_simsiam_are_the_closed_forms() -> None:
    simsiam = SimSiamRecipe(optimization=SGD(epochs=_EPOCHS, batch_size=512))
    for step in range(_EPOCHS * _PER_EPOCH):
        epoch = step // _PER_EPOCH

        settings = settings_at(simsiam, step=step, steps_per_epoch=_PER_EPOCH)

        assert settings.learning_rate == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * epoch / _EPOCHS)), rel=1e-12)
        assert (settings.fixed_learning_rate, settings.weight_decay) == (0.1, 1e-4)


def test_predictor_rate_may_follow_the_schedule() -> None:
    simsiam = SimSiamRecipe(optimization=SGD(epochs=4, fixed_predictor_rate=False))

    settings = settings_at(simsiam, step=25, steps_per_epoch=10)

    assert settings.fixed_learning_rate == settings.learning_rate < 0.1
