"""Trainee: a checkpoint's network with a linear head, in float32, and which of its weights fine-tuning moves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.errors import UsageError
from msn_eval.features.encoder import Encoder, build_encoder

TAPS = ("cls-norm", "mean", "pool", "out", "pixels")  # what a head may be put on
_POOLS = {"cls-norm": "token", "mean": "avg"}
_BETA1 = 0.9
_PATHS = ("drop_path", "drop_path1", "drop_path2")


@dataclass(frozen=True, kw_only=True)
class FinetuneModel:
    """A network from images to logits, in evaluation mode throughout: norms of batches keep their statistics, and drop path
    alone tells training from evaluation.

    network:   (b, 3, S, S) normalised images -> (b, n_classes)
    head:      its last layer, zero at first
    dim:       of what the head is given
    paths:   residual branches that may be left out, from the first to the last
    encoder: around the same network, in float32: its transform, mean and std
    """

    network: nn.Module
    head: nn.Linear
    dim: int
    tap: str
    paths: tuple["DrawnDropPath", ...]
    encoder: Encoder

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Give the weights that are trained, by name."""
        return {name: one for name, one in self.network.named_parameters() if one.requires_grad}


class DrawnDropPath(DropPath):  # type: ignore[misc]
    """timm's stochastic depth with its draws given from outside, one an image: they must not depend on how a batch is cut.

    draws: (b,) uniform in [0, 1) for the images of the next pass; None: nothing is left out
    """

    draws: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Give x with the images whose draw is below drop_prob set to zero, and the others made up for it."""
        if self.draws is None:
            return x
        kept = (self.draws >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob)
        found: Tensor = x * kept.view(-1, *[1] * (x.dim() - 1))
        return found


def build_finetune_model(encoder: Encoder, recipe: FinetuneRecipe, *, tap: str, n_classes: int) -> FinetuneModel:
    """Copy an encoder's network, put a head of zeros on a tap of it, and mark what the recipe trains.

    Raises UsageError for a tap that fine-tuning knows no head for, for `blocks` of a network that has none or fewer, and
    for drop path where the network has no residual branches to leave out.
    """
    if tap not in TAPS:
        raise UsageError(
            f"--tap {tap}: a head that is trained with its encoder is put on {', '.join(TAPS)}",
            hint="Leave out --tap.",
        )
    copied = build_encoder(
        encoder.checkpoint,
        device=encoder.device,
        precision="fp32",
        image_pixels=encoder.transform.crop,
    )
    trunk = copied.network
    if encoder.checkpoint.runs_own_code or encoder.checkpoint.format == "pixels":
        head = nn.Linear(encoder.dim, n_classes)
        network: nn.Module = nn.Sequential()
        network.add_module("trunk", trunk)
        network.add_module("head", head)
    else:
        network = trunk
        trunk.reset_classifier(n_classes, *([_POOLS[tap]] if tap in _POOLS else []))  # type: ignore[operator]
        head = trunk.get_classifier()  # type: ignore[operator]
    nn.init.zeros_(head.weight)  # so that no draw of weights decides
    nn.init.zeros_(head.bias)
    network.to(encoder.device).eval()
    _freeze(network, head, recipe, encoder)
    return FinetuneModel(
        network=network,
        head=head,
        dim=head.in_features,
        tap=tap,
        paths=tuple(_put_drop_path(trunk, recipe, encoder)),
        encoder=copied,
    )


def _freeze(network: nn.Module, head: nn.Linear, recipe: FinetuneRecipe, encoder: Encoder) -> None:
    network.requires_grad_(recipe.blocks is None)
    head.requires_grad_(True)
    if recipe.blocks is None:
        return
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise UsageError(
            f"finetune.blocks: {encoder.checkpoint.name} ({encoder.arch}) has no blocks that could be counted",
            hint="Train all of its weights: finetune.blocks=null.",
        )
    if recipe.blocks > len(blocks):
        raise UsageError(
            f"finetune.blocks: {encoder.checkpoint.name} ({encoder.arch}) has {len(blocks)} blocks, not {recipe.blocks}",
            hint=f"Give at most {len(blocks)}, or null for all weights.",
        )
    parts = [
        *list(blocks)[len(blocks) - recipe.blocks :],
        getattr(network, "norm", None),
        getattr(network, "fc_norm", None),
    ]
    for part in parts:
        if isinstance(part, nn.Module):
            part.requires_grad_(True)


def _put_drop_path(trunk: nn.Module, recipe: FinetuneRecipe, encoder: Encoder) -> Iterator[DrawnDropPath]:
    if recipe.drop_path == 0:
        return
    residual = [one for one in trunk.modules() if any(hasattr(one, path) for path in _PATHS)]
    if not residual:
        raise UsageError(
            f"finetune.drop_path: {encoder.checkpoint.name} ({encoder.arch}) has no residual branches that could be left out",
            hint="Set finetune.drop_path=0.",
        )
    for depth, block in enumerate(residual):
        rate = recipe.drop_path * depth / max(1, len(residual) - 1)
        if rate > 0 and any(one.requires_grad for one in block.parameters()):
            for name in _PATHS:
                if hasattr(block, name):
                    path = DrawnDropPath(rate)
                    setattr(block, name, path)
                    yield path


def build_optimizer(trainee: FinetuneModel, recipe: FinetuneRecipe) -> torch.optim.Optimizer:
    """Give timm's AdamW over the trained weights; a group's `lr_scale` is its layer's share of the learning rate."""
    betas = _BETA1, recipe.beta2
    if hasattr(trainee.network, "group_matcher"):
        found = create_optimizer_v2(
            trainee.network,
            "adamw",
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=betas,
        )
        return cast(torch.optim.Optimizer, found)
    head = {id(one) for one in trainee.head.parameters()}
    groups = [
        {
            "params": [
                one for one in trainee.trained.values() if (id(one) in head) == is_head and (one.dim() > 1) == decays
            ],
            "lr_scale": 1.0 if is_head else recipe.layer_decay,
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for is_head in (False, True)
        for decays in (False, True)
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.learning_rate, betas=betas)
