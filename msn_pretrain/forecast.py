"""Forecast: what a recipe comes to, before anything is trained."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from msn_eval.errors import printable
from msn_pretrain.config.load import recipe_as_yaml
from msn_pretrain.training.run import (
    Recipe,
    build_learner,
    makes_views_on_device,
    precision_of,
    training_images,
    view_kinds,
)

_BYTES = 4
_GIB = 2**30


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
