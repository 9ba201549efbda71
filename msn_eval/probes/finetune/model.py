"""Fine-tuning model: a checkpoint's network with a linear head, in float32, and which of its weights are trained."""

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
from msn_eval.models.hub import HubNetwork

TAPS = ("cls-norm", "mean", "pool", "out", "pixels")  # that a head can be put on
_POOLS = {"cls-norm": "token", "mean": "avg"}
_BETA1 = 0.9
_PATHS = ("drop_path", "drop_path1", "drop_path2")


@dataclass(frozen=True, kw_only=True)
class FinetuneModel:
    """A network from images to logits.

    It is in evaluation mode throughout: batch norms keep their statistics, and only drop path differs in training.

    Attributes:
        network: From (b, 3, S, S) normalised images to (b, n_classes).
        head: Its last layer, zero at first.
        dim: Width of the head's input.
        tap: The tap that the head is on.
        paths: Residual branches that can be dropped, from the first to the last.
        encoder: Around the same network without the head, in float32: its transform, mean and std.
    """

    network: nn.Module
    head: nn.Linear
    dim: int
    tap: str
    paths: tuple["DrawnDropPath", ...]
    encoder: Encoder

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, by name."""
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}


class DrawnDropPath(DropPath):  # type: ignore[misc]
    """timm's stochastic depth with one draw per image, set from outside: so it does not depend on how a batch is cut.

    Attributes:
        draws: (b,) uniform in [0, 1) for the images of the next pass; None drops nothing.
    """

    draws: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zero the images whose draw is below drop_prob, and scale the others so that the expectation stays."""
        if self.draws is None:
            return x
        scale = (self.draws >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob)
        scaled: Tensor = x * scale.view(-1, *[1] * (x.dim() - 1))
        return scaled


def check_trainable(encoder: Encoder, recipe: FinetuneRecipe, *, tap: str) -> None:
    """Check that a recipe can train an encoder with a head on a tap.

    Raises:
        UsageError: transformers runs the network, there is no head for this tap, `blocks` is above the number of blocks, or the
            network has no blocks, or no residual branches for drop path.
    """
    if tap not in TAPS:
        what = f"--tap {tap}: a head that is trained with its encoder is put on {', '.join(TAPS)}"
        raise UsageError(what, hint="Leave out --tap.")
    name, network = f"{encoder.checkpoint.name} ({encoder.arch})", encoder.network
    if isinstance(network, HubNetwork):
        what = f"finetune trains networks of timm and those of py: factories; transformers runs {name}"
        raise UsageError(what, hint="Wrap the network: py:package.module:factory.")
    if recipe.blocks is not None:
        blocks = getattr(network, "blocks", None)
        if not isinstance(blocks, nn.Sequential | nn.ModuleList):
            what = f"finetune.blocks: {name} has no blocks that could be counted"
            raise UsageError(what, hint="Train all of its weights: finetune.blocks=null.")
        if recipe.blocks > len(blocks):
            what = f"finetune.blocks: {name} has {len(blocks)} blocks, not {recipe.blocks}"
            raise UsageError(what, hint=f"Give at most {len(blocks)}, or null for all weights.")
    if recipe.drop_path > 0 and not _list_residual_blocks(network):
        what = f"finetune.drop_path: {name} has no residual branches that could be left out"
        raise UsageError(what, hint="Set finetune.drop_path=0.")


def _list_residual_blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if any(hasattr(module, path) for path in _PATHS)]


def build_finetune_model(encoder: Encoder, recipe: FinetuneRecipe, *, tap: str, n_classes: int) -> FinetuneModel:
    """Copy an encoder's network, put a head of zeros on a tap of it, and mark what the recipe trains.

    Raises:
        UsageError: The recipe cannot train it, as `check_trainable` has it.
    """
    check_trainable(encoder, recipe, tap=tap)
    copied = build_encoder(
        encoder.checkpoint, device=encoder.device, precision="fp32", image_pixels=encoder.transform.crop
    )
    backbone = network = copied.network
    if encoder.checkpoint.runs_own_code or encoder.checkpoint.format == "pixels":
        head = nn.Linear(encoder.dim, n_classes)
        network = nn.Sequential()
        network.add_module("trunk", backbone)  # the name in states
        network.add_module("head", head)
    else:
        backbone.reset_classifier(n_classes, *([_POOLS[tap]] if tap in _POOLS else []))  # type: ignore[operator]
        head = backbone.get_classifier()  # type: ignore[operator]
    nn.init.zeros_(head.weight)  # a random head would add a draw that decides
    nn.init.zeros_(head.bias)
    network.to(encoder.device).eval()
    _freeze(network, head, recipe)
    return FinetuneModel(
        network=network,
        head=head,
        dim=head.in_features,
        tap=tap,
        paths=tuple(_add_drop_path(backbone, recipe)),
        encoder=copied,
    )


def _freeze(network: nn.Module, head: nn.Linear, recipe: FinetuneRecipe) -> None:
    network.requires_grad_(recipe.blocks is None)
    head.requires_grad_(True)
    if recipe.blocks is None:
        return
    blocks = cast(nn.Sequential, network.blocks)
    norms = [getattr(network, "norm", None), getattr(network, "fc_norm", None)]
    for module in [*list(blocks)[len(blocks) - recipe.blocks :], *norms]:
        if isinstance(module, nn.Module):
            module.requires_grad_(True)


def _add_drop_path(backbone: nn.Module, recipe: FinetuneRecipe) -> Iterator[DrawnDropPath]:
    blocks = _list_residual_blocks(backbone) if recipe.drop_path > 0 else []
    for depth, block in enumerate(blocks):
        rate = recipe.drop_path * depth / max(1, len(blocks) - 1)
        if rate > 0 and any(weight.requires_grad for weight in block.parameters()):
            for attribute in _PATHS:
                if hasattr(block, attribute):
                    path = DrawnDropPath(rate)
                    setattr(block, attribute, path)
                    yield path


def build_optimizer(model: FinetuneModel, recipe: FinetuneRecipe) -> torch.optim.Optimizer:
    """Return AdamW over the trained weights; `lr_scale` of a group is its layer's factor of the learning rate."""
    betas = _BETA1, recipe.beta2
    if hasattr(model.network, "group_matcher"):
        optimizer = create_optimizer_v2(
            model.network,
            "adamw",
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=betas,
        )
        return cast(torch.optim.Optimizer, optimizer)
    # timm knows no layers of this network: one for the head, one for everything below it.
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for weight in model.trained.values():
        is_head = any(weight is parameter for parameter in model.head.parameters())
        groups.setdefault((is_head, weight.dim() > 1), []).append(weight)
    return torch.optim.AdamW(
        [
            {
                "params": weights,
                "lr_scale": 1.0 if is_head else recipe.layer_decay,
                "weight_decay": recipe.weight_decay if decays else 0.0,
            }
            for (is_head, decays), weights in sorted(groups.items())
        ],
        lr=recipe.learning_rate,
        betas=betas,
    )
