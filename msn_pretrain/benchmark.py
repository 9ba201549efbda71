"""Bench: how fast a recipe trains here."""

import statistics
import time
from pathlib import Path

from msn_pretrain.config.schedule import settings_at
from msn_pretrain.data.sampler import Order
from msn_pretrain.data.view_loader import ViewList, load_views
from msn_pretrain.distributed.process_group import join_ranks
from msn_pretrain.training.journal import Journal
from msn_pretrain.training.run import (
    Recipe,
    build_learner,
    makes_views_on_device,
    precision_of,
    training_images,
    view_kinds,
)
from msn_pretrain.training.train import Session, compute, memory_bytes
from msn_pretrain.training.watchdog import Watchdog

_WARM_UP = 2
_GIB = 2**30


def bench(recipe: Recipe, *, steps: int) -> str:
    """Train a recipe for 2 + `steps` steps on this process's device, keep nothing, and say what the last `steps` took.

    Raises what training would.
    """
    with join_ranks(recipe.run.device.split(",")[0], environment={}) as ranks:
        images = training_images(recipe)
        order = Order(n_images=len(images), batch_size=recipe.optimization.batch_size, seed=recipe.run.seed)
        session = Session(
            recipe=recipe,
            ranks=ranks,
            run=Path(),
            images=images,
            order=order,
            steps=_WARM_UP + steps,
            learner=build_learner(recipe, ranks.device),
            journal=Journal(steps=_WARM_UP + steps),
            dog=Watchdog(),
        )
        wanted = ViewList(
            images=images,
            kinds=view_kinds(recipe),
            seed=recipe.run.seed,
            batched=makes_views_on_device(recipe, ranks.device),
            device=ranks.device,
        )
        waits, computes, ended = [], [], time.perf_counter()
        for batch in load_views(wanted, order, first_step=0, steps=session.steps, workers=recipe.data.workers):
            loaded = time.perf_counter()
            step = batch.batch.step
            settings = settings_at(recipe, step=step, steps_per_epoch=order.steps_an_epoch)
            compute(session, batch, settings)  # ends with numbers on the host: all is done then
            session.learner.optimizer.step()
            session.learner.model.after_update(settings)
            waits.append(loaded - ended)
            ended = time.perf_counter()
            computes.append(ended - loaded)
    waited, computed = (statistics.median(times[_WARM_UP:]) for times in (waits, computes))
    return (
        f"{order.batch_size / (waited + computed):,.1f} images/s on {ranks.device} in {precision_of(recipe, ranks.device)}: "
        f"{waited:.3f} s for views and {computed:.3f} s for the step, medians of {steps} steps of {order.batch_size} images; "
        f"at most {memory_bytes(ranks.device) / _GIB:.2f} GiB"
    )
