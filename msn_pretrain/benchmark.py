"""Bench: how fast a recipe trains here."""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from msn_eval.distributed.group import ALONE
from msn_eval.errors import printable
from msn_pretrain.config.load import recipe_as_yaml
from msn_pretrain.config.schedule import settings_at
from msn_pretrain.data.sampler import Order
from msn_pretrain.data.view_loader import ViewList, load_views
from msn_pretrain.local_ranks import choose_rank_device
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
    ranks = choose_rank_device(ALONE, recipe.run.device.split(",")[0])
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


_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a recipe comes to on some device.

    trained, kept: parameters with gradients, and all
    memory_bytes:  estimate for one rank: weights, gradients, optimiser, activations of one micro-batch
    """

    images: int
    steps_an_epoch: int
    steps: int
    trained: int
    kept: int
    encoder: int
    memory_bytes: int


def forecast(recipe: Recipe, *, world: int = 1) -> Forecast:
    """Look at the data set and build the networks; nothing is trained. Raises what training would."""
    images = len(training_images(recipe))
    model = build_learner(recipe, torch.device("cpu")).model
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    kept = sum(one.numel() for one in model.parameters())
    an_epoch = images // recipe.optimization.batch_size
    share = math.ceil(recipe.optimization.batch_size / world)
    at_once = min(share, recipe.run.micro_batch or share)
    return Forecast(
        images=images,
        steps_an_epoch=an_epoch,
        steps=an_epoch * recipe.optimization.epochs,
        trained=trained,
        kept=kept,
        encoder=sum(one.numel() for one in model.exported().parameters()),
        memory_bytes=_BYTES * (kept + 3 * trained) + _activation_bytes(recipe, model.exported(), at_once),
    )


def _activation_bytes(recipe: Recipe, network: nn.Module, images: int) -> int:
    """Estimate what is kept for the backward pass: in a Transformer's block some 16 values a token and channel in half of
    them, twice that in whole precision; in a residual network some 40 MB an image of 224 pixels."""
    half = recipe.run.precision == "bf16"
    blocks, width = getattr(network, "blocks", None), int(getattr(network, "embed_dim", 0))
    pixels = sum(kind.count * kind.pixels**2 for kind in view_kinds(recipe))
    if blocks is None or not width:
        return int(images * pixels / 224**2 * 40e6 * (1 if half else 2))
    patch = int(network.patch_embed.patch_size[0])  # type: ignore[index, union-attr]
    return int(images * pixels / patch**2 * len(blocks) * width * 16 * (2 if half else 4))


def describe(recipe: Recipe) -> str:
    """Give what `--dry-run` prints: the resolved recipe and what it comes to."""
    devices = recipe.run.device.split(",")
    found = forecast(recipe, world=len(devices))
    device = torch.device(devices[0] if devices[0] != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    kinds = ", ".join(f"{kind.count} of {kind.pixels} pixels" for kind in view_kinds(recipe))
    made = "on the device, many at once" if makes_views_on_device(recipe, device) else "in the loader, one by one"
    lines = [
        recipe_as_yaml(recipe).rstrip(),
        "",
        f"images      {found.images:,} for training, from {recipe.data.root}",
        f"views       {kinds} an image, made {made}",
        f"parameters  {found.trained:,} trained, {found.kept:,} in all, {found.encoder:,} in the encoder that is evaluated",
        f"steps       {found.steps:,}: {recipe.optimization.epochs} epochs of {found.steps_an_epoch}, "
        f"{recipe.optimization.batch_size} images each",
        f"computing   {precision_of(recipe, device)} on {recipe.run.device}",
        f"memory      about {found.memory_bytes / _GIB:.1f} GiB for each of {len(devices)} "
        f"{'ranks' if len(devices) > 1 else 'rank'} (an estimate)",
    ]
    return printable("\n".join(lines))
