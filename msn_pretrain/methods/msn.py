"""MSN: anchor and target networks, prototypes, and the computation of one step.

`MSN` and `SimSiam` have the same interface:

    model = build_msn(recipe)                      # on the CPU, in training mode
    kept  = model.draw_kept(generator, images=b)   # patches that the random anchor views keep, on the CPU
    step  = model(views, kept=kept)                # also through DistributedDataParallel(model)
    step.total.backward()                          # the mean over ranks is the gradient of the global batch
    step.parts                                     # name -> detached scalar: total, cross_entropy, me_max, entropy
    step.all_rows()                                # features, outputs and targets of all ranks, for `collapse_statistics`
    model.after_update(settings, skipped)          # EMA of the target, after the optimiser's step
    model.clipped_parameters()                     # parameters whose gradient norm is limited: encoder and head
    model.exported()                               # the backbone to evaluate: the target's, with timm's names

`views` are (b, 3, S, S) float tensors: the target's view, the random anchor views, then the focal ones. `settings` is
`schedule.StepSettings`; its sharpening is passed as `model(views, kept=kept, sharpening=...)`.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.distributed.collective import all_gather_rows, is_sharded
from msn_eval.features.collapse import effective_rank, spread
from msn_pretrain.config.recipe import Criterion, Head, Masking, MSNRecipe
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.methods.heads import projection_head
from msn_pretrain.methods.loss import MSNLoss, make_log_prior, msn_loss
from msn_pretrain.methods.vit import MaskedTransformer, build_transformer, draw_kept_patches


@dataclass(frozen=True, kw_only=True)
class Step:
    """Result of one step of either method.

    Attributes:
        total: The loss, a scalar of the global batch, with gradient.
        parts: Its parts and `total` by name, scalars of the global batch without gradient.
        features: (b, width), the encoder's features of this rank's images, without gradient.
        outputs: (b, d), the projections of this rank's images, without gradient.
        targets: (b, k), MSN's targets; None for SimSiam.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    features: Tensor
    outputs: Tensor
    targets: Tensor | None = None

    def all_rows(self) -> dict[str, Tensor]:
        """Return features, outputs and targets of all ranks, on the device. Every rank must call this."""
        rows = {"features": self.features, "outputs": self.outputs, "targets": self.targets}
        return {name: all_gather_rows(values) for name, values in rows.items() if values is not None}


def collapse_statistics(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute target entropy, prototypes in use, rank and spread of what `Step.all_rows` returns."""
    statistics = {
        "feature_rank": effective_rank(rows["features"]),
        "feature_spread": spread(rows["features"]),
        "output_spread": spread(rows["outputs"]),
    }
    if "targets" in rows:
        statistics["target_entropy"] = mean_entropy(rows["targets"])
        statistics["prototypes_in_use"] = float(count_prototypes_in_use(rows["targets"]))
        statistics["target_max"] = float(rows["targets"].amax(dim=1).mean())
    return statistics


class Branch(nn.Module):
    """Encoder and projection head. MSN has two branches, the anchor's and the target's.

    The encoder is called `trunk` because snapshots and the released checkpoints store its weights under that name.
    """

    def __init__(self, trunk: MaskedTransformer, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute features (b, width) and projections (b, d) of (b, 3, S, S) images."""
        features = self.trunk(images, kept)
        return features, self.head(features)


class MSN(nn.Module):
    """Masked Siamese Networks.

    Attributes:
        anchor: The trained branch.
        target: Exponential moving average of the anchor; receives no gradient.
        prototypes: (k, d), trained.

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
        log_prior = make_log_prior(criterion.prior, len(prototypes), exponent=criterion.prior_exponent)
        self.register_buffer("log_prior", log_prior, persistent=False)
        self.criterion = criterion
        self.masking = masking
        self.random_views = random_views
        self.n_patches = anchor.trunk.patches(pixels)

    def draw_kept(self, generator: torch.Generator, *, images: int) -> Tensor | None:
        """Draw the patches that the random anchor views keep; None if the recipe drops none.

        On several ranks, draw for the global batch from one generator, and take each rank's own rows of each view.

        Returns:
            (m,) int64, or with `masking.per_image` (random_views * images, m), view-major.
        """
        if not self.masking.ratio:
            return None
        rows = self.random_views * images if self.masking.per_image else None
        return draw_kept_patches(self.n_patches, self.masking.ratio, generator, images=rows)

    def forward(self, views: Sequence[Tensor], kept: Tensor | None = None, *, sharpening: float | None = None) -> Step:
        """Compute the loss of this rank's share of a batch.

        Args:
            views: 1 + random + focal views of (b, 3, S, S); the target's view first.
            kept: As returned by `draw_kept`; used for the random anchor views only.
            sharpening: T of this step's targets; None means the recipe's first value.
        """
        features, targets = self.encode_targets(views[0])
        loss = self.compute_loss(self.encode_anchors(views[1:], kept), targets, sharpening=sharpening)
        return Step(
            total=loss.total, parts=loss.detached_parts(), features=features, outputs=targets, targets=loss.targets
        )

    @torch.no_grad()
    def encode_targets(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features (b, width) and projections (b, d) of the target network, without gradient."""
        return cast(tuple[Tensor, Tensor], self.target(images))

    def encode_anchors(self, views: Sequence[Tensor], kept: Tensor | None = None) -> Tensor:
        """Compute the projections of anchor views, (views * b, d), view-major.

        Views of one size go through the network together. As in the release, the head's BatchNorm sees the views of each size
        separately.
        """
        outputs = []
        masked = [(number < self.random_views, view) for number, view in enumerate(views)]
        groups = groupby(masked, key=lambda pair: (pair[0], pair[1].shape[-1]))
        for number, (_, group) in enumerate(groups):
            images = torch.cat([view for _, view in group])
            outputs.append(self.anchor(images, kept if number == 0 else None)[1])
        return torch.cat(outputs)

    def compute_loss(self, anchors: Tensor, targets: Tensor, *, sharpening: float | None = None) -> MSNLoss:
        """Compute the loss of (views * b, d) anchors against (b, d) targets."""
        criterion = self.criterion
        return msn_loss(
            anchors,
            targets,
            self.prototypes,
            temperature=criterion.temperature,
            sharpening=criterion.sharpening if sharpening is None else sharpening,
            sinkhorn_iterations=criterion.sinkhorn_iterations,
            me_max_weight=criterion.me_max_weight,
            entropy_weight=criterion.entropy_weight,
            log_prior=cast(Tensor, self.log_prior),
        )

    def after_update(self, settings: StepSettings, skipped: Tensor) -> None:
        """Update the target's moving average; `skipped` as for `update_ema`."""
        update_ema(self.target, self.anchor, decay=settings.ema, skipped=skipped)

    def clipped_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters whose common gradient norm is limited."""
        return self.anchor.parameters()

    def exported(self) -> nn.Module:
        """Return timm's network to evaluate, the target's."""
        return self.target.trunk.network


def build_msn(recipe: MSNRecipe) -> MSN:
    """Build the networks of a recipe on the CPU, in training mode, with all weights drawn from its seed.

    Raises:
        CheckpointError: timm does not know the encoder.
        UsageError: The encoder cannot be masked, or its patches are larger than a view.
    """
    views = recipe.views
    network = build_transformer(recipe.encoder, seed=recipe.run.seed)
    sides = [views.image_pixels] + ([views.focal_pixels] if views.focal_views else [])
    backbone = MaskedTransformer(network, image_sides=sides)
    head, prototypes = _init_head(
        backbone.width, recipe.head, n_prototypes=recipe.criterion.prototypes, seed=recipe.run.seed
    )
    return MSN(
        Branch(backbone, head),
        prototypes,
        criterion=recipe.criterion,
        masking=recipe.masking,
        random_views=views.random_views,
        pixels=views.image_pixels,
    )


def _init_head(width: int, head: Head, *, n_prototypes: int, seed: int) -> tuple[nn.Module, Tensor]:
    """Draw head and prototypes as the release does: linear layers like the Transformer's, prototypes uniform in ±d**-0.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)  # not the random numbers of the Transformer again
        layers = projection_head(width, hidden=head.hidden, output=head.output, batch_norm=head.batch_norm)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        bound = head.output**-0.5
        return layers, torch.empty(n_prototypes, head.output).uniform_(-bound, bound)


@torch.no_grad()
def update_ema(target: nn.Module, anchor: nn.Module, *, decay: float, skipped: Tensor) -> None:
    """Update the target's weights: target = decay * target + (1 - decay) * anchor.

    Buffers do not change: as in the release, the target's BatchNorm has statistics of its own.

    Args:
        target: Updated in place.
        anchor: Network with the same parameters.
        decay: In [0, 1].
        skipped: Scalar on the device; with 1 nothing changes, with 0 everything does. The host does not wait to know.

    Source: arXiv:2204.07141, section 3; github.com/facebookresearch/msn, src/msn_train.py.
    """
    pairs = [
        (weight.detach(), own.detach()) for weight, own in zip(target.parameters(), anchor.parameters(), strict=True)
    ]
    share = (1.0 - decay) * (1.0 - skipped)
    for sharded in (False, True):
        part = [pair for pair in pairs if is_sharded(pair[0]) == sharded]
        if part:
            torch._foreach_lerp_([weight for weight, _ in part], [own for _, own in part], [share] * len(part))


@torch.no_grad()
def count_prototypes_in_use(targets: Tensor) -> int:
    """Count the prototypes that are the largest of some row of (n, k) targets."""
    return len(set(targets.argmax(dim=1).tolist()))


@torch.no_grad()
def mean_entropy(targets: Tensor) -> float:
    """Compute the mean entropy of the rows of (n, k) targets, in nats."""
    return float(torch.special.entr(targets.double()).sum(dim=1).mean())
