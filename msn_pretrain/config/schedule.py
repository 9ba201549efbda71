"""Schedules of learning rate, weight decay, EMA and sharpening as pure functions of the global step.

The step counts updates from 0, over all epochs. There is no other state, so a resumed run continues exactly.
"""

import math
from dataclasses import dataclass

from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe

_BATCH_OF_RATE = 256  # batch size of SimSiam's base learning rate


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Hyper-parameters of one update.

    Attributes:
        learning_rate: Of parameters with a scheduled learning rate.
        fixed_learning_rate: Of SimSiam's predictor.
        weight_decay: Of parameters with weight decay.
        ema: Decay of the target encoder; 1 if there is none.
        sharpening: T of the power 1 / T of targets.
    """

    learning_rate: float
    fixed_learning_rate: float
    weight_decay: float
    ema: float = 1.0
    sharpening: float = 1.0


def warmup_cosine(time: float, *, start: float, peak: float, final: float, warmup: float, duration: float) -> float:
    """Return a value that rises linearly from `start` to `peak` during `warmup`, then falls on half a cosine to `final`."""
    if time < warmup:
        return start + (peak - start) * time / warmup
    progress = min(1.0, (time - warmup) / max(1.0, duration - warmup))
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine(time: float, *, start: float, final: float, duration: float) -> float:
    """Return the value at `time` on half a cosine from `start` to `final`."""
    progress = min(1.0, time / duration)
    return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(time: float, *, start: float, final: float, duration: float) -> float:
    """Return the value at `time` on a line from `start` to `final`."""
    return start + (final - start) * min(1.0, time / duration)


def msn_settings(recipe: MSNRecipe, *, step: int, steps_per_epoch: int) -> StepSettings:
    """Return the settings of MSN's update number `step`, from 0.

    As in the release, learning rate and weight decay are one step ahead of EMA and sharpening, and all schedules are stretched to
    1.25 times the epochs.

    Source: github.com/facebookresearch/msn, src/msn_train.py and src/utils.py.
    """
    optimization, criterion = recipe.optimization, recipe.criterion
    duration = optimization.stretch * optimization.epochs * steps_per_epoch
    whole_steps = int(duration)  # the release truncates here, but not for EMA and sharpening
    rate = warmup_cosine(
        step + 1,
        start=optimization.start_learning_rate,
        peak=optimization.learning_rate,
        final=optimization.final_learning_rate,
        warmup=int(optimization.warmup * steps_per_epoch),
        duration=whole_steps,
    )
    return StepSettings(
        learning_rate=rate,
        fixed_learning_rate=rate,
        weight_decay=cosine(
            step + 1, start=optimization.weight_decay, final=optimization.final_weight_decay, duration=whole_steps
        ),
        ema=linear(step, start=recipe.ema.start, final=recipe.ema.final, duration=duration),
        sharpening=linear(step, start=criterion.sharpening, final=criterion.final_sharpening, duration=duration),
    )


def simsiam_settings(recipe: SimSiamRecipe, *, step: int, steps_per_epoch: int) -> StepSettings:
    """Return the settings of SimSiam's update number `step`, from 0. The learning rate changes per epoch.

    Source: github.com/facebookresearch/simsiam, main_simsiam.py. The linear warm-up per step is an addition, off by default.
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
    """Return the settings of update number `step`, from 0, of either method."""
    if isinstance(recipe, MSNRecipe):
        return msn_settings(recipe, step=step, steps_per_epoch=steps_per_epoch)
    return simsiam_settings(recipe, step=step, steps_per_epoch=steps_per_epoch)
