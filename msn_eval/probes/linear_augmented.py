"""Linear layers on the features of augmented images: the reference's linear evaluation, a step at a time."""

import hashlib
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from msn_eval.config.recipes import AugmentedRecipe
from msn_eval.distributed.group import Group, broadcast_from_rank0, joined, sum_over_ranks
from msn_eval.errors import NumericalError, StoreError
from msn_eval.features.augmented import AugmentedImages, features_from
from msn_eval.probes.base import FittedProbe, ProbeConfig
from msn_eval.probes.training_state import StateFiles, read_state, write_state
from msn_eval.process import StopRequest, watch_stop_signals

_log = logging.getLogger(__name__)
MOMENTUM = 0.9
_FIRST_WEIGHT_STD = 0.01
_SAVE_SECONDS = 60.0  # what a kill can cost


@dataclass(frozen=True, kw_only=True)
class LinearAugmented(AugmentedRecipe):
    """LayerNorm with learned affine, L2 norm, linear layer with bias, on the frozen encoder's features of random crops and
    flips; SGD with Nesterov momentum, cosine, no warm-up.

    Every learning rate is a protocol of its own; they share each image's pass through the encoder, and nothing else.
    Source: arXiv:2204.07141, appendix A.3, and its released linear evaluation.
    """

    name: ClassVar[str] = "linear-augmented"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls"


def augmented_settings(probe: LinearAugmented) -> tuple[dict[str, int | float], ...]:
    """Give the protocol that each learning rate is."""
    shared = {name: getattr(probe, name) for name in ("weight_decay", "epochs", "batch_size", "crop_share", "seed")}
    return tuple({"lr": rate, **shared} for rate in dict.fromkeys(probe.lr))


class AugmentedHead(nn.Module):
    """What is trained: features (b, d) to scores (b, n_classes)."""

    def __init__(self, dim: int, n_classes: int, *, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear: nn.Linear = nn.utils.skip_init(nn.Linear, dim, n_classes)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.linear.weight.normal_(0.0, _FIRST_WEIGHT_STD, generator=torch.Generator().manual_seed(seed))
            self.linear.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.linear(functional.normalize(self.norm(features), dim=1))
        return scores


@dataclass(kw_only=True)
class Training:
    """Heads between two steps: all that a resumption needs; everything random follows from the step.

    heads, optimizers: by learning rate; those that diverged are taken out
    losses:            by learning rate, cross-entropy summed over the images of the epoch under way
    last_losses:       its mean over the epoch before, NaN in the first
    diverged_at:       steps at which layers were taken out
    """

    step: int
    heads: dict[float, AugmentedHead]
    optimizers: dict[float, torch.optim.SGD]
    losses: dict[float, float]
    last_losses: dict[float, float]
    diverged_at: dict[float, int] = field(default_factory=dict)

    def as_state(self) -> dict[str, Any]:
        """Give what torch.load takes with weights_only."""
        return {
            "heads": {repr(rate): head.state_dict() for rate, head in self.heads.items()},
            "optimizers": {repr(rate): one.state_dict() for rate, one in self.optimizers.items()},
            "losses": {repr(rate): loss for rate, loss in self.losses.items()},
            "last_losses": {repr(rate): loss for rate, loss in self.last_losses.items()},
            "diverged_at": {repr(rate): step for rate, step in self.diverged_at.items()},
        }


def start_training(probe: LinearAugmented, dim: int, n_classes: int, device: torch.device) -> Training:
    """Give heads that are all alike, and their optimisers."""
    rates = tuple(dict.fromkeys(probe.lr))
    heads = {rate: AugmentedHead(dim, n_classes, seed=probe.seed).to(device) for rate in rates}
    return Training(
        step=0,
        heads=heads,
        optimizers={rate: _optimizer(head, rate, probe.weight_decay) for rate, head in heads.items()},
        losses=dict.fromkeys(rates, 0.0),
        last_losses=dict.fromkeys(rates, math.nan),
    )


def _optimizer(head: AugmentedHead, rate: float, weight_decay: float) -> torch.optim.SGD:
    others = [*head.norm.parameters(), head.linear.bias]
    groups = [{"params": [head.linear.weight], "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)


def restore_training(training: Training, state: Mapping[str, Any]) -> None:
    """Put a training where a state was taken."""
    training.step = int(state["step"])
    training.diverged_at = {float(rate): int(step) for rate, step in state["diverged_at"].items()}
    for rate in training.diverged_at:
        del training.heads[rate], training.optimizers[rate]
    for rate, head in training.heads.items():
        head.load_state_dict(state["heads"][repr(rate)])
        training.optimizers[rate].load_state_dict(state["optimizers"][repr(rate)])
    training.losses = {float(rate): loss for rate, loss in state["losses"].items()}
    training.last_losses = {float(rate): loss for rate, loss in state["last_losses"].items()}


def take_step(
    training: Training,
    parts: Iterator[tuple[Tensor, Tensor]],
    *,
    images: int,
    share: float,
    group: Group,
    stop: StopRequest,
) -> bool:
    """Take one step on a batch that comes in parts, this rank's share of it; the same step however it is cut.

    parts:  features (b, d) float32 and labels (b,)
    images: of the whole batch, all ranks together
    share:  of each first learning rate that holds now
    stop:   heard between two parts; a rank that was asked to stop has no rank take the step
    returns: whether it was taken
    """
    rates = tuple(training.heads)
    weights = {rate: list(training.heads[rate].parameters()) for rate in rates}
    for rate in rates:
        for one in weights[rate]:
            one.grad = torch.zeros_like(one)
    sums = torch.zeros(len(rates) + 2, device=weights[rates[0]][0].device)
    fault = None
    try:
        for features, labels in parts:
            if stop.number is not None:
                break
            for place, rate in enumerate(rates):
                loss = functional.cross_entropy(training.heads[rate](features), labels, reduction="sum")
                (loss / images).backward()  # type: ignore[no-untyped-call]
                sums[place] += loss.detach()
    except NumericalError as error:  # all ranks must come to the sum, and then know
        fault = error
    sums[-2], sums[-1] = float(fault is not None), float(stop.number is not None)
    gradients = [one.grad for rate in rates for one in weights[rate] if one.grad is not None]
    sum_over_ranks(group, [*gradients, sums])
    if sums[-2] > 0:
        raise fault or NumericalError("features of another rank's augmented images are not finite")
    if sums[-1] > 0:
        return False
    for place, rate in enumerate(rates):
        training.losses[rate] += float(sums[place])
        optimizer = training.optimizers[rate]
        for settings in optimizer.param_groups:
            settings["lr"] = rate * share
        optimizer.step()
        if not all(bool(one.isfinite().all()) for one in weights[rate]):
            _log.warning("linear-augmented: learning rate %g diverged at step %d and is left out", rate, training.step)
            training.diverged_at[rate] = training.step
            del training.heads[rate], training.optimizers[rate]
    training.step += 1
    return True


def fit_augmented(
    probe: LinearAugmented, images: AugmentedImages, *, group: Group, files: StateFiles | None
) -> FittedProbe:
    """Train a head for every learning rate on the labelled images. Every rank calls it, and all have the heads.

    files: where the state is kept that a stopped training goes on from; None keeps none
    A head that diverges gives no setting but a failure. Raises NumericalError for images of a single class and for features
    that are not finite, StoreError where the disk refuses for a whole epoch.
    """
    present, labels = torch.unique(images.labels, return_inverse=True)
    if len(present) < 2:
        raise NumericalError("linear-augmented on a single class", hint="Label images of at least two classes.")
    device = images.encoder.device
    training = start_training(probe, images.dim, len(present), device)
    with joined(group, device), watch_stop_signals() as stop:
        _resume(training, files, group)
        _train(probe, images, labels, training, group=group, files=files, stop=stop)
    if stop.number is not None:  # which was raised again behind the block, unless nobody listens
        raise KeyboardInterrupt
    params = {float(one["lr"]): one for one in augmented_settings(probe)}
    kept = tuple(training.heads)
    settings = tuple(
        ProbeConfig(
            params=params[rate],
            solver="sgd",
            objective=training.last_losses[rate],
            iterations=training.step,
        )
        for rate in kept
    )

    def scores(values: Tensor) -> Iterator[Tensor]:
        for rate in kept:
            with torch.no_grad():
                own = training.heads[rate](values.to(device)).double()
            whole = own.new_full((len(values), images.n_classes), -torch.inf)
            whole[:, present.to(device)] = own
            yield whole

    return FittedProbe(
        settings=settings,
        scores=scores,
        failures=tuple((params[rate], _divergence(rate, step)) for rate, step in training.diverged_at.items()),
    )


def _divergence(rate: float, step: int) -> NumericalError:
    return NumericalError(
        f"linear-augmented: the layer diverged at learning rate {rate:g}, step {step}", hint="Use a smaller one."
    )


def _resume(training: Training, files: StateFiles | None, group: Group) -> None:
    """Go on from the newest state of the first rank, where there is one."""
    state = read_state(files) if files is not None and group.rank == 0 else None
    step = int(broadcast_from_rank0(group, "training step", lambda: str(state["step"] if state is not None else 0)))
    if step == 0:
        return
    whole: dict[str, Any] = broadcast_from_rank0(group, "state", lambda: state or {})
    restore_training(training, whole)
    if group.rank == 0:
        _log.info("linear-augmented: goes on behind step %d", step)


def _train(
    probe: LinearAugmented,
    images: AugmentedImages,
    labels: Tensor,
    training: Training,
    *,
    group: Group,
    files: StateFiles | None,
    stop: StopRequest,
) -> None:
    n = len(labels)
    steps_an_epoch = -(-n // probe.batch_size)
    steps = probe.epochs * steps_an_epoch
    keeper = _Keeper(files=files if group.rank == 0 else None, saved_at=time.monotonic())
    for epoch in range(training.step // steps_an_epoch, probe.epochs):
        order = draw_order(n, seed=probe.seed, epoch=epoch)
        batches = list(torch.split(order, probe.batch_size))[training.step % steps_an_epoch :]
        for parts, batch in zip(
            features_from(images, labels, batches, seed=probe.seed, epoch=epoch, share=probe.crop_share, group=group),
            batches,
            strict=True,
        ):
            share = (1 + math.cos(math.pi * training.step / steps)) / 2
            if not take_step(training, parts, images=len(batch), share=share, group=group, stop=stop):
                keeper.save(training)
                stop.number = stop.number if stop.number is not None else signal.SIGTERM  # another rank's
                return
            if not training.heads:
                raise next(_divergence(rate, step) for rate, step in training.diverged_at.items())
            if training.step % steps_an_epoch == 0:
                training.last_losses = {rate: loss / n for rate, loss in training.losses.items()}
                training.losses = dict.fromkeys(training.losses, 0.0)
            keeper.save_if_due(training)
        keeper.insist(training)


@dataclass(kw_only=True)
class _Keeper:
    """When states are written. A disk that refuses is told of and tried again, until the epoch ends."""

    files: StateFiles | None
    saved_at: float
    refused: bool = False

    def save(self, training: Training) -> None:
        if self.files is not None:
            write_state(self.files, training.as_state(), step=training.step)
            self.saved_at, self.refused = time.monotonic(), False

    def save_if_due(self, training: Training) -> None:
        if self.files is None or time.monotonic() - self.saved_at < _SAVE_SECONDS:
            return
        try:
            self.save(training)
        except StoreError as error:
            self.saved_at, self.refused = time.monotonic(), True
            _log.warning("%s\nTraining goes on and tries again; at the end of the epoch it stops.", error)

    def insist(self, training: Training) -> None:
        if self.refused:
            self.save(training)


def draw_order(n: int, *, seed: int, epoch: int) -> Tensor:
    """Give the places of all n images in the order of one epoch, a pure function of seed and epoch."""
    digest = hashlib.sha256(b"order\t%d\t%d" % (seed, epoch)).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))
