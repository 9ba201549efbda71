"""SimSiam: encoder, projector, predictor. The interface is that of `msn.MSN`."""

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
from msn_pretrain.methods.vit import init_weights


class SimSiam(nn.Module):
    """Simple Siamese networks.

    Attributes:
        network: timm's network without classifier, (b, 3, S, S) -> (b, width).
        projector: (b, width) -> (b, d).
        predictor: (b, d) -> (b, d).

    Source: arXiv:2011.10566; github.com/facebookresearch/simsiam, simsiam/builder.py.
    """

    def __init__(self, network: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.projector = projector
        self.predictor = predictor

    def draw_kept(self, generator: torch.Generator, *, images: int) -> Tensor | None:
        """Return None: SimSiam drops no patches."""
        return None

    def forward(self, views: Sequence[Tensor], kept: Tensor | None = None, *, sharpening: float | None = None) -> Step:
        """Compute the loss of this rank's share of a batch.

        Args:
            views: Two views of (b, 3, S, S).
            kept: Unused.
            sharpening: Unused.
        """
        (features, z1), (_, z2) = (self.project(view) for view in views)
        total = simsiam_loss(self.predictor(z1), z2, self.predictor(z2), z1)
        parts = {"total": total.detach()}
        return Step(total=total, parts=parts, features=features.detach(), outputs=z1.detach())

    def project(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features (b, width) and projections (b, d) of one view. BatchNorm must not see both views together."""
        # Convolutions are faster in this layout; Transformers cut images into patches anyway.
        features = self.network(images.contiguous(memory_format=torch.channels_last))
        return features, self.projector(features)

    def after_update(self, settings: StepSettings, skipped: Tensor) -> None:
        """Do nothing: both views share one network."""

    def clipped_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters whose common gradient norm is limited, if the recipe limits it."""
        return self.parameters()

    def exported(self) -> nn.Module:
        """Return timm's network to evaluate."""
        return self.network


def build_simsiam(recipe: SimSiamRecipe) -> SimSiam:
    """Build the networks of a recipe on the CPU, in training mode, with all weights drawn from its seed.

    Residual networks start with timm's initial values, the last BatchNorm of each block at zero. Transformers start with MSN's.
    Projector and predictor start with torch's: the paper found that others cost accuracy.

    Raises:
        CheckpointError: timm does not know the encoder.
        UsageError: The stem does not fit the encoder.
    """
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    plain = outline_network(name_architecture(recipe.encoder.name))
    if recipe.encoder.stem == "cifar" and not isinstance(plain, ResNet):
        raise UsageError("encoder.stem=cifar is for residual networks only", hint="Use encoder.stem=imagenet.")
    architecture, seed = architecture_of(recipe.encoder, drop_path=recipe.encoder.drop_path), recipe.run.seed
    network = build_network(name_architecture(architecture), seed=seed)
    if isinstance(network, VisionTransformer):
        init_weights(network, seed=seed)
    width = cast(int, network.num_features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)  # not the random numbers of the encoder again
        projector = simsiam_projector(width, layers=recipe.projector.layers, output=recipe.projector.output)
        predictor = simsiam_predictor(recipe.projector.output, hidden=recipe.projector.predictor)
    return SimSiam(share_batch_norm(network), projector, predictor).train()
