"""MSN: anchor, target, prototypes, and what one step computes from its views.

    model = build_msn(recipe)                      # nn.Module on the CPU, in training mode; build_simsiam for SimSiam
    kept  = model.draw_kept(generator, images=b)   # which patches the random anchors keep, on the CPU
    step  = model(views, kept=kept)                # also through DistributedDataParallel(model)
    step.total.backward()                          # scalar of the global batch; mean over ranks = its gradient
    step.parts                                     # name -> detached scalar: total, cross_entropy, me_max, entropy
    step.statistics()                              # name -> float: target entropy, prototypes in use, rank, spread; costs
    model.after_update(settings)                   # EMA of the target, after the optimiser's step
    model.clipped_parameters()                     # whose gradients' norm is limited: encoder and head, not prototypes
    model.exported()                               # the trunk to evaluate: the target's, as timm names its weights

`views` are (b, 3, S, S) float tensors: the target's, the random anchors, then the focal ones. Both methods have this form;
`settings` is schedule.StepSettings, whose sharpening goes into forward as `model(views, kept=kept, sharpening=...)`.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.distributed.collective import rows_of_all_ranks
from msn_eval.errors import UsageError
from msn_eval.features.collapse import effective_rank as effective_rank
from msn_eval.features.collapse import spread as spread
from msn_pretrain.config.recipe import Criterion, Head, Masking, MSNRecipe
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.methods.heads import projection_head
from msn_pretrain.methods.loss import MSNLoss, log_prior, prior_matching_loss
from msn_pretrain.methods.vit import MaskedTransformer, build_transformer, kept_patches


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step of either method computed.

    total:    the loss, a scalar of the global batch, with gradient
    parts:    its parts by name, scalars of the global batch without gradient, `total` among them
    features: (b, width), what the encoder gave for this rank's images, without gradient
    targets:  (b, k), MSN's targets, None for SimSiam
    outputs:  (b, d), what the projection gave for this rank's images, without gradient
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    features: Tensor
    outputs: Tensor
    targets: Tensor | None = field(default=None)

    def statistics(self) -> dict[str, float]:
        """Give what tells a collapse, over the rows of all ranks; every rank must ask."""
        features, outputs = rows_of_all_ranks(self.features), rows_of_all_ranks(self.outputs)
        found = {
            "feature_rank": effective_rank(features),
            "feature_spread": spread(features),
            "output_spread": spread(outputs),
        }
        if self.targets is not None:
            targets = rows_of_all_ranks(self.targets)
            found["target_entropy"] = mean_entropy(targets)
            found["prototypes_in_use"] = float(prototypes_in_use(targets))
            found["target_max"] = float(targets.amax(dim=1).mean())
        return found


class Branch(nn.Module):
    """Encoder and projection head; MSN has two, the anchor's and the target's."""

    def __init__(self, trunk: MaskedTransformer, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give (b, width) features and (b, d) projections of (b, 3, S, S) images."""
        features = self.trunk(images, kept)
        return features, self.head(features)


class MSN(nn.Module):
    """Masked Siamese Networks.

    anchor:     trained
    target:     follows it by `after_update`; takes part in no gradient
    prototypes: (k, d), trained
    Source: arXiv:2204.07141; github.com/facebookresearch/msn, src/msn_train.py.
    """

    def __init__(
        self,
        anchor: Branch,
        prototypes: Tensor,
        *,
        criterion: Criterion,
        masking: Masking,
        random_views: int,
        pixels: int,
    ) -> None:
        super().__init__()
        self.anchor = anchor
        self.target = copy.deepcopy(anchor).requires_grad_(False)
        self.prototypes = nn.Parameter(prototypes)
        prior = log_prior(criterion.prior, len(prototypes), exponent=criterion.prior_exponent)
        self.register_buffer("logarithm_of_prior", prior, persistent=False)
        self.criterion = criterion
        self.masking = masking
        self.random_views = random_views
        self.n_patches = anchor.trunk.patches(pixels)

    def draw_kept(self, generator: torch.Generator, *, images: int) -> Tensor | None:
        """Draw which patches the random anchors of `images` images keep; None where the recipe drops none.

        returns: (m,), or with masking.per_image (random_views * images, m), view-major. On several ranks draw for the
        global batch from one generator, and take each rank's own rows of each view.
        """
        if not self.masking.ratio:
            return None
        rows = self.random_views * images if self.masking.per_image else None
        return kept_patches(self.n_patches, self.masking.ratio, generator, images=rows)

    def forward(self, views: Sequence[Tensor], kept: Tensor | None = None, *, sharpening: float | None = None) -> Step:
        """Compute the loss of this rank's share of a batch.

        views:      1 + random + focal of (b, 3, S, S): the target's view first
        kept:       as `draw_kept` gives it, for the random anchors alone
        sharpening: T of this step's targets, else the recipe's first
        """
        if len(views) < 1 + self.random_views:
            raise UsageError(
                f"{len(views)} views", hint=f"Give the target's view and at least {self.random_views} anchors'."
            )
        features, targets = self.targets(views[0])
        loss = self.compared(self.anchors(views[1:], kept), targets, sharpening=sharpening)
        parts = {name: getattr(loss, name).detach() for name in ("total", "cross_entropy", "me_max", "entropy")}
        return Step(total=loss.total, parts=parts, features=features, outputs=targets, targets=loss.targets)

    @torch.no_grad()
    def targets(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Give (b, width) features and (b, d) projections of the target network, without gradient."""
        return cast(tuple[Tensor, Tensor], self.target(images))

    def anchors(self, views: Sequence[Tensor], kept: Tensor | None = None) -> Tensor:
        """Give (views * b, d) projections, view-major; views of one size go through the network together.

        As in the release, the head's BatchNorm sees the views of each size by themselves.
        """
        outputs = []
        for number, (_, alike) in enumerate(groupby(self._in_masks(views), key=lambda one: (one[0], one[1].shape[-1]))):
            images = torch.cat([one for _, one in alike])
            outputs.append(self.anchor(images, kept if number == 0 else None)[1])
        return torch.cat(outputs)

    def compared(self, anchors: Tensor, targets: Tensor, *, sharpening: float | None = None) -> MSNLoss:
        """Give the loss of (views * b, d) anchors against (b, d) targets."""
        criterion = self.criterion
        return prior_matching_loss(
            anchors,
            targets,
            self.prototypes,
            logarithm_of_prior=cast(Tensor, self.logarithm_of_prior),
            temperature=criterion.temperature,
            sharpening=criterion.sharpening if sharpening is None else sharpening,
            sinkhorn_iterations=criterion.sinkhorn_iterations,
            me_max_weight=criterion.me_max_weight,
            entropy_weight=criterion.entropy_weight,
        )

    def after_update(self, settings: StepSettings) -> None:
        """Move the target after the anchor."""
        update_ema(self.target, self.anchor, share=settings.ema)

    def clipped_parameters(self) -> Iterator[nn.Parameter]:
        """Give the parameters whose common gradient norm is limited."""
        return self.anchor.parameters()

    def exported(self) -> nn.Module:
        """Give timm's network to evaluate, the target's."""
        return self.target.trunk.network

    def _in_masks(self, views: Sequence[Tensor]) -> list[tuple[bool, Tensor]]:
        return [(number < self.random_views, view) for number, view in enumerate(views)]


def build_msn(recipe: MSNRecipe) -> MSN:
    """Build the networks of a recipe on the CPU, in training mode, all weights drawn from its seed.

    Raises CheckpointError for an encoder that timm does not know, UsageError for one that cannot be masked or whose
    patches are larger than a view.
    """
    encoder = recipe.encoder
    network = build_transformer(
        encoder.name,
        drop_path=encoder.drop_path,
        first_weights=encoder.first_weights,
        position_scale=encoder.position_scale,
        seed=recipe.run.seed,
    )
    views = recipe.views
    sides = [views.image_pixels] + ([views.focal_pixels] if views.focal_views else [])
    trunk = MaskedTransformer(network, image_sides=sides)
    head, prototypes = _drawn_head(
        trunk.width, recipe.head, n_prototypes=recipe.criterion.prototypes, seed=recipe.run.seed
    )
    return MSN(
        Branch(trunk, head),
        prototypes,
        criterion=recipe.criterion,
        masking=recipe.masking,
        random_views=views.random_views,
        pixels=views.image_pixels,
    )


def _drawn_head(width: int, head: Head, *, n_prototypes: int, seed: int) -> tuple[nn.Module, Tensor]:
    """Draw as the release does: linear layers as the Transformer's, prototypes uniform within ± the root of 1 / d."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)  # not the Transformer's own numbers again
        layers = projection_head(width, hidden=head.hidden, output=head.output, batch_norm=head.batch_norm)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        bound = head.output**-0.5
        return layers, torch.empty(n_prototypes, head.output).uniform_(-bound, bound)


@torch.no_grad()
def update_ema(target: nn.Module, anchor: nn.Module, *, share: float) -> None:
    """Move the target's weights: `share` of each stays, the rest comes from the anchor.

    Buffers are left alone: as in the release, the target's BatchNorm has statistics of its own.
    Source: arXiv:2204.07141, section 3; github.com/facebookresearch/msn, src/msn_train.py.
    """
    weights = _values(target.parameters())
    torch._foreach_mul_(weights, share)
    torch._foreach_add_(weights, _values(anchor.parameters()), alpha=1.0 - share)


def _values(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in parameters]


@torch.no_grad()
def prototypes_in_use(targets: Tensor) -> int:
    """Give how many prototypes are the largest of some row. targets: (n, k)."""
    return len(set(targets.argmax(dim=1).tolist()))


@torch.no_grad()
def mean_entropy(targets: Tensor) -> float:
    """Give the mean entropy of rows that sum to 1, in nats. targets: (n, k)."""
    return float(torch.special.entr(targets.double()).sum(dim=1).mean())
