"""SimSiam: encoder, projector, predictor, and what one step computes from its two views; its form is that of msn.MSN."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.errors import UsageError
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import build_network, outline_network
from msn_pretrain.config.recipe import SimSiamRecipe, architecture_of
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.methods.heads import share_batch_norm, simsiam_predictor, simsiam_projector
from msn_pretrain.methods.loss import simsiam_loss
from msn_pretrain.methods.msn import Step
from msn_pretrain.methods.vit import draw_weights


class SimSiam(nn.Module):
    """Simple Siamese networks.

    network:   timm's, without classifier; (b, 3, S, S) -> (b, width)
    Source: arXiv:2011.10566; github.com/facebookresearch/simsiam, simsiam/builder.py.
    """

    def __init__(self, network: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.projector = projector
        self.predictor = predictor

    def draw_kept(self, generator: torch.Generator, *, images: int) -> Tensor | None:
        """Give None: no patches are dropped."""
        return None

    def forward(self, views: Sequence[Tensor], kept: Tensor | None = None, *, sharpening: float | None = None) -> Step:
        """Compute the loss of this rank's share of a batch. views: two of (b, 3, S, S); nothing else is used."""
        if len(views) != 2:
            raise UsageError(f"{len(views)} views", hint="SimSiam compares two.")
        (features, z1), (_, z2) = (self.projected(view) for view in views)
        total = simsiam_loss(self.predictor(z1), z2, self.predictor(z2), z1)
        return Step(
            total=total, parts={"total": total.detach()}, features=features.detach(), outputs=z1.detach(), targets=None
        )

    def projected(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Give (b, width) features and (b, d) projections. Each view goes alone: BatchNorm must not see both."""
        features = self.network(images)
        return features, self.projector(features)

    def after_update(self, settings: StepSettings) -> None:
        """Do nothing: both views share one network."""

    def clipped_parameters(self) -> Iterator[nn.Parameter]:
        """Give the parameters whose common gradient norm is limited, where the recipe limits it."""
        return self.parameters()

    def exported(self) -> nn.Module:
        """Give timm's network to evaluate."""
        return self.network


def build_simsiam(recipe: SimSiamRecipe) -> SimSiam:
    """Build the networks of a recipe on the CPU, in training mode, all weights drawn from its seed.

    A residual network has torch's first values, the last BatchNorm of each block at zero; a Transformer MSN's. Linear
    layers of projector and predictor have torch's: the paper found that others cost accuracy.
    Raises CheckpointError for an encoder that timm does not know, UsageError for a stem that does not fit.
    """
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    plain = outline_network(name_architecture(recipe.encoder.name))
    if recipe.encoder.stem == "cifar" and not isinstance(plain, ResNet):
        raise UsageError("encoder.stem: cifar is for residual networks", hint="Leave encoder.stem=imagenet.")
    name, drop_path, seed = architecture_of(recipe.encoder), recipe.encoder.drop_path, recipe.run.seed
    keywords = f"{'&' if '?' in name else '?'}drop_path_rate={drop_path}" if drop_path else ""
    network = build_network(name_architecture(name + keywords), seed=seed)
    if isinstance(network, VisionTransformer):
        draw_weights(network, seed=seed)
    width = cast(int, network.num_features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)  # not the encoder's own numbers again
        projector = simsiam_projector(width, layers=recipe.projector.layers, output=recipe.projector.output)
        predictor = simsiam_predictor(recipe.projector.output, hidden=recipe.projector.predictor)
    return SimSiam(share_batch_norm(network), projector, predictor).train()
