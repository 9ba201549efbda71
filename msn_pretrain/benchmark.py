"""Training speed of a recipe on this machine, and the estimate of `--dry-run`."""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from msn_eval.distributed.group import ALONE
from msn_eval.errors import printable
from msn_pretrain.config.load import recipe_as_yaml
from msn_pretrain.config.schedule import settings_at
from msn_pretrain.data.sampler import Order
from msn_pretrain.local_ranks import check_devices, choose_rank_device
from msn_pretrain.training.determinism import deterministic_kernels
from msn_pretrain.training.run import (
    Recipe,
    build_learner,
    find_snapshot,
    makes_views_on_device,
    precision_of,
    training_images,
    view_kinds,
)
from msn_pretrain.training.train import Session, compute, load_session_views, memory_bytes

_WARM_UP = 2
_GIB = 2**30


def bench(recipe: Recipe, *, steps: int) -> str:
    """Measure the speed of a recipe.

    Trains 2 + `steps` steps on one device, writes nothing, and returns a line with the medians of the last `steps`. Raises what
    training would.
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
    )
    waits, computes, ended = [], [], time.perf_counter()
    with deterministic_kernels(ranks.device):  # as in training
        for batch in load_session_views(session, 0):
            loaded = time.perf_counter()
            settings = settings_at(recipe, step=batch.batch.step, steps_per_epoch=order.steps_per_epoch)
            compute(session, batch, settings)  # waits for the device
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


def describe(recipe: Recipe, *, allowed: Sequence[str] = (), elsewhere: bool = False) -> str:
    """Return what `--dry-run` prints: the resolved recipe, its size and an estimate of its memory.

    Args:
        recipe: The recipe.
        allowed: Keys of the recipe whose values may differ from those of its folder.
        elsewhere: Whether it would be trained on another machine, which may have other devices.

    Raises:
        MsnEvalError: What training would raise before its first step.
    """
    devices = recipe.run.device.split(",")
    if not elsewhere:
        check_devices(devices)
    device = torch.device(devices[0] if devices[0] != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    images = training_images(recipe)
    order = Order(
        n_images=len(images), batch_size=recipe.optimization.batch_size, seed=recipe.run.seed, world=len(devices)
    )
    find_snapshot(recipe, images, allowed=allowed)
    model = build_learner(recipe, torch.device("cpu")).model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    encoder = sum(parameter.numel() for parameter in model.exported().parameters())
    epochs = recipe.optimization.epochs
    share = math.ceil(recipe.optimization.batch_size / len(devices))
    half = precision_of(recipe, device) == "bf16"
    activations = _activation_bytes(recipe, model.exported(), min(share, recipe.run.micro_batch or share), half=half)
    # float32 weights, and for trained ones a gradient and two moments
    memory = 4 * (total + 3 * trained) + activations
    kinds = ", ".join(f"{kind.count} of {kind.pixels} pixels" for kind in view_kinds(recipe))
    where = "on the device" if makes_views_on_device(recipe, device) else "in the loader"
    lines = [
        recipe_as_yaml(recipe).rstrip(),
        "",
        f"images      {len(images):,} for training, from {recipe.data.root}",
        f"views       {kinds} per image, made {where}",
        f"parameters  {trained:,} trained, {total:,} in total, {encoder:,} in the encoder that is evaluated",
        f"steps       {order.steps_per_epoch * epochs:,}: {epochs} epochs of {order.steps_per_epoch}, "
        f"{recipe.optimization.batch_size} images each",
        f"computing   {precision_of(recipe, device)} on {recipe.run.device}",
        f"memory      about {memory / _GIB:.1f} GiB for each of {len(devices)} {'ranks' if len(devices) > 1 else 'rank'} "
        "(estimate)",
    ]
    return printable("\n".join(lines))


def _activation_bytes(recipe: Recipe, network: nn.Module, images: int, *, half: bool) -> int:
    """Estimate the memory that the backward pass needs for `images` images.

    Measured values: a Transformer block keeps about 16 values per token and channel, of 2 bytes in bf16 and 4 in fp32. A residual
    network keeps about 40 MB per image of 224 pixels in bf16, twice that in fp32.
    """
    blocks, width = getattr(network, "blocks", None), int(getattr(network, "embed_dim", 0))
    pixels = sum(kind.count * kind.pixels**2 for kind in view_kinds(recipe))
    if blocks is None or not width:
        return int(images * pixels / 224**2 * 40e6 * (1 if half else 2))
    patch = int(network.patch_embed.patch_size[0])  # type: ignore[index, union-attr]
    return int(images * pixels / patch**2 * len(blocks) * width * 16 * (2 if half else 4))
