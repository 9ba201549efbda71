"""Schedule: rates, decay, momentum and sharpening as pure functions of the global step.

The step counts updates from 0, over all epochs; nothing else is remembered, so a resumed run goes on exactly.
"""

import math
from dataclasses import dataclass

from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe

_BATCH_OF_RATE = 256  # images that SimSiam states its learning rate for


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What one update uses.

    learning_rate:       of all parameters whose rate is scheduled
    fixed_learning_rate: of those whose rate is not: SimSiam's predictor
    weight_decay:        of all parameters that decay
    ema:                 share of the target encoder that stays; 1 where there is none
    sharpening:          T of the power 1 / T of targets
    """

    learning_rate: float
    fixed_learning_rate: float
    weight_decay: float
    ema: float = 1.0
    sharpening: float = 1.0


def warmup_cosine(time: float, *, start: float, peak: float, final: float, warmup: float, duration: float) -> float:
    """Rise linearly from `start` to `peak` during `warmup`, then fall on half a cosine to `final` at `duration`."""
    if time < warmup:
        return start + (peak - start) * time / warmup
    progress = min(1.0, (time - warmup) / max(1.0, duration - warmup))
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine(time: float, *, start: float, final: float, duration: float) -> float:
    """Go from `start` to `final` on half a cosine."""
    progress = min(1.0, time / duration)
    return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(time: float, *, start: float, final: float, duration: float) -> float:
    """Go from `start` to `final` on a straight line."""
    return start + (final - start) * min(1.0, time / duration)


def msn_settings(recipe: MSNRecipe, *, step: int, steps_per_epoch: int) -> StepSettings:
    """Give the settings of MSN's update number `step`, from 0.

    As in the release, rate and decay are those one step ahead of momentum and sharpening, and all are stretched over 1.25
    times the epochs. Source: github.com/facebookresearch/msn, src/msn_train.py and src/utils.py.
    """
    optimization, criterion = recipe.optimization, recipe.criterion
    duration = optimization.stretch * optimization.epochs * steps_per_epoch
    whole = int(duration)
    rate = warmup_cosine(
        step + 1,
        start=optimization.start_learning_rate,
        peak=optimization.learning_rate,
        final=optimization.final_learning_rate,
        warmup=int(optimization.warmup * steps_per_epoch),
        duration=whole,
    )
    return StepSettings(
        learning_rate=rate,
        fixed_learning_rate=rate,
        weight_decay=cosine(
            step + 1, start=optimization.weight_decay, final=optimization.final_weight_decay, duration=whole
        ),
        ema=linear(step, start=recipe.ema.start, final=recipe.ema.final, duration=duration),
        sharpening=linear(step, start=criterion.sharpening, final=criterion.final_sharpening, duration=duration),
    )


def simsiam_settings(recipe: SimSiamRecipe, *, step: int, steps_per_epoch: int) -> StepSettings:
    """Give the settings of SimSiam's update number `step`, from 0: the rate changes from epoch to epoch.

    Source: github.com/facebookresearch/simsiam, main_simsiam.py; the warm-up, from 0 and by step, is ours and off.
    """
    optimization = recipe.optimization
    peak = optimization.learning_rate * optimization.batch_size / _BATCH_OF_RATE
    warmup = int(optimization.warmup * steps_per_epoch)
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    epoch = step // steps_per_epoch
    rate = rising * cosine(epoch, start=peak, final=0.0, duration=optimization.epochs)
    fixed = rising * peak if optimization.fixed_predictor_rate else rate
    return StepSettings(learning_rate=rate, fixed_learning_rate=fixed, weight_decay=optimization.weight_decay)


def settings_at(recipe: MSNRecipe | SimSiamRecipe, *, step: int, steps_per_epoch: int) -> StepSettings:
    """Give the settings of update number `step`, from 0, of either method."""
    if isinstance(recipe, MSNRecipe):
        return msn_settings(recipe, step=step, steps_per_epoch=steps_per_epoch)
    return simsiam_settings(recipe, step=step, steps_per_epoch=steps_per_epoch)
