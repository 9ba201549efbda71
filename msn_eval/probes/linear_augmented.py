"""Linear layers on features of augmented images: the reference's linear evaluation, one step at a time."""

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

from msn_eval.config.recipes import AugmentedRecipe, Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.distributed.group import Group, all_reduce_tensors
from msn_eval.errors import NumericalError, StoreError
from msn_eval.features.augmented import AugmentedImages, Chunk, iterate_augmented_features
from msn_eval.probes.base import FittedProbe, Probe, ProbeConfig, TrainsOn
from msn_eval.probes.training_state import StateFiles, read_shared_state, write_state
from msn_eval.process import StopRequest, watch_stop_signals

_log = logging.getLogger(__name__)
MOMENTUM = 0.9
_FIRST_WEIGHT_STD = 0.01
_SAVE_SECONDS = 60.0  # the most work that a kill can lose


@dataclass(frozen=True, kw_only=True)
class LinearAugmented(AugmentedRecipe, Probe):
    """LayerNorm with learned affine, L2 norm and linear layer with bias, on features of random crops and flips.

    The encoder is frozen. The optimiser is SGD with Nesterov momentum and a cosine without warm-up. Every learning rate is
    a protocol of its own; they share each image's pass through the encoder, and nothing else.

    Version 2 takes the steps of the released code: its momentum contains the learning rate, and each epoch ends with its last
    full batch. Version 1 had torch's SGD and a smaller batch at the end of each epoch.

    Source: arXiv:2204.07141, appendix A.3; github.com/facebookresearch/msn, linear_eval.py and src/sgd.py.
    """

    name: ClassVar[str] = "linear-augmented"
    version: ClassVar[int] = 2
    trains_on: ClassVar[TrainsOn] = "augmented features"
    has_probabilities: ClassVar[bool] = True

    @property
    def taps(self) -> tuple[str, ...]:
        return ("cls",)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates, each once."""
        return tuple(dict.fromkeys(self.lr))

    def configs(self, n: int) -> tuple[Params, ...]:
        """Return the protocol that each learning rate is."""
        shared = {name: getattr(self, name) for name in ("weight_decay", "epochs", "batch_size", "crop_share", "seed")}
        return tuple({"lr": rate, **shared} for rate in self.rates)

    def divide_epoch(self, n: int) -> tuple[int, int]:
        """Return the images of a step and the steps of an epoch for n labelled images.

        As in the released code, images after the last full batch are left out; the next epoch has another order. Where that code
        would take no step, because a batch is larger than n, every step is on all n images.
        """
        batch = min(self.batch_size, n)
        return batch, n // batch


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[LinearAugmented]:
    """Yield the probe with the recipe of the options."""
    yield LinearAugmented(**vars(config.linear_augmented))


class AugmentedHead(nn.Module):
    """What is trained: from features (b, d) to scores (b, n_classes)."""

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
    """Heads between two steps: all that a resumed training needs. Everything random follows from the step.

    Attributes:
        step: Number of steps taken.
        heads: By learning rate; heads that diverged are removed.
        optimizers: By learning rate, likewise.
        losses: By learning rate, cross-entropy summed over the images of the current epoch.
        last_losses: Its mean over the previous epoch, NaN in the first.
        diverged_at: By learning rate, the steps at which heads were removed.
    """

    step: int
    heads: dict[float, AugmentedHead]
    optimizers: dict[float, torch.optim.SGD]
    losses: dict[float, float]
    last_losses: dict[float, float]
    diverged_at: dict[float, int] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.load reads it with weights_only; `write_state` adds the step."""
        values: dict[str, dict[float, Any]] = {
            "heads": {rate: head.state_dict() for rate, head in self.heads.items()},
            "optimizers": {rate: optimizer.state_dict() for rate, optimizer in self.optimizers.items()},
            "losses": self.losses,
            "last_losses": self.last_losses,
            "diverged_at": self.diverged_at,
        }
        return {name: {repr(rate): value for rate, value in by_rate.items()} for name, by_rate in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. A training that has just started is expected."""
        self.step = state["step"]
        self.losses, self.last_losses, self.diverged_at = (
            {float(rate): value for rate, value in state[name].items()}
            for name in ("losses", "last_losses", "diverged_at")
        )
        for rate in self.diverged_at:
            del self.heads[rate], self.optimizers[rate]
        for rate, head in self.heads.items():
            head.load_state_dict(state["heads"][repr(rate)])
            self.optimizers[rate].load_state_dict(state["optimizers"][repr(rate)])


def start_training(probe: LinearAugmented, dim: int, n_classes: int, device: torch.device) -> Training:
    """Make one head per learning rate, all with the same weights, and their optimisers."""
    heads = {rate: AugmentedHead(dim, n_classes, seed=probe.seed).to(device) for rate in probe.rates}
    return Training(
        step=0,
        heads=heads,
        optimizers={rate: _build_optimizer(head, probe.weight_decay) for rate, head in heads.items()},
        losses=dict.fromkeys(heads, 0.0),
        last_losses=dict.fromkeys(heads, math.nan),
    )


def _build_optimizer(head: AugmentedHead, weight_decay: float) -> torch.optim.SGD:
    """Build SGD whose gradients `take_step` multiplies by the learning rate, so that the momentum contains it."""
    others = [*head.norm.parameters(), head.linear.bias]
    groups = [{"params": [head.linear.weight], "decay": weight_decay}, {"params": others, "decay": 0.0}]
    return torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, nesterov=True)


def take_step(
    training: Training,
    chunks: Iterator[Chunk],
    *,
    images: int,
    rate_factor: float,
    group: Group,
    stop: StopRequest,
) -> bool:
    """Take one step on a batch that comes in chunks. How the batch is cut does not change the step.

    Args:
        training: The heads; changed in place.
        chunks: This rank's share of the batch.
        images: Number of images in the batch, all ranks together.
        rate_factor: Factor of every learning rate at this step.
        group: Ranks that share the batch.
        stop: Checked between two chunks. If one rank is asked to stop, no rank takes the step.

    Returns:
        Whether the step was taken.

    Raises:
        NumericalError: Features are not finite.
    """
    rates = tuple(training.heads)
    weights = {rate: list(training.heads[rate].parameters()) for rate in rates}
    for rate in rates:
        for weight in weights[rate]:
            weight.grad = torch.zeros_like(weight)
    # Summed over ranks with the gradients: the loss of each head, and the number of chunks that are not finite.
    sums, checks = torch.zeros(len(rates) + 1, device=weights[rates[0]][0].device), []
    for features, labels, check in chunks:
        if stop.number is not None:
            break
        checks.append(check)
        sums[-1] += ~features.isfinite().all()
        for index, rate in enumerate(rates):
            loss = functional.cross_entropy(training.heads[rate](features), labels, reduction="sum")
            (loss / images).backward()  # type: ignore[no-untyped-call]
            sums[index] += loss.detach()
    stops = torch.tensor(float(stop.number is not None))  # of the host, which does not wait for the device
    all_reduce_tensors(group, [stops])
    if stops:
        return False
    gradients = [weight.grad for rate in rates for weight in weights[rate] if weight.grad is not None]
    all_reduce_tensors(group, [*gradients, sums])
    for rate in rates:
        optimizer, current_rate = training.optimizers[rate], rate * rate_factor
        for parameters in optimizer.param_groups:
            parameters["weight_decay"] = current_rate * parameters["decay"]
        for weight in weights[rate]:
            assert weight.grad is not None
            weight.grad.mul_(current_rate)
        optimizer.step()
    finite = [torch.stack([weight.isfinite().all() for weight in weights[rate]]).all() for rate in rates]
    values = torch.cat([sums, torch.stack(finite).to(sums.dtype)]).tolist()  # the only wait for the device in a step
    losses, bad, are_finite = values[: len(rates)], values[len(rates)], values[len(rates) + 1 :]
    if bad:  # on all ranks
        for check in checks:
            check()
        raise NumericalError("features of another rank's augmented images are not finite")
    for rate, loss, is_finite in zip(rates, losses, are_finite, strict=True):
        training.losses[rate] += loss
        if not is_finite:
            _log.warning("linear-augmented: learning rate %g diverged at step %d and is left out", rate, training.step)
            training.diverged_at[rate] = training.step
            del training.heads[rate], training.optimizers[rate]
    training.step += 1
    return True


def fit_augmented(
    probe: LinearAugmented, images: AugmentedImages, *, group: Group, files: StateFiles | None
) -> FittedProbe:
    """Train a head for every learning rate on the labelled images. Every rank calls it, and all get the heads.

    A head that diverges becomes a failure of the fitted probe.

    Args:
        probe: The recipe.
        images: The labelled images.
        group: Ranks that share each batch.
        files: Where the state of the training is kept, to resume from after a stop; None keeps none.

    Raises:
        NumericalError: The images are of a single class, features are not finite, or every head diverges.
        StoreError: The disk refuses states for an epoch and at its end again.
    """
    present, labels = torch.unique(images.labels, return_inverse=True)
    if len(present) < 2:
        raise NumericalError("linear-augmented on a single class", hint="Label images of at least two classes.")
    device = images.encoder.device
    training = start_training(probe, images.dim, len(present), device)
    with watch_stop_signals() as stop:
        if (state := read_shared_state(files, group)) is not None:
            training.load_state_dict(state)
            if group.rank == 0:
                _log.info("linear-augmented: resumes after step %d", training.step)
        _train(probe, images, labels, training, group=group, files=files, stop=stop)
    if stop.number is not None:  # the signal is raised again at the end of the block, unless it is ignored
        raise KeyboardInterrupt
    params = dict(zip(probe.rates, probe.configs(len(labels)), strict=True))

    def score(values: Tensor) -> Iterator[Tensor]:
        for head in training.heads.values():
            with torch.no_grad():
                own = head(values.to(device)).double()
            scores = own.new_full((len(values), images.n_classes), -torch.inf)
            scores[:, present.to(device)] = own
            yield scores

    return FittedProbe(
        settings=tuple(
            ProbeConfig(
                params=params[rate], solver="sgd", objective=training.last_losses[rate], iterations=training.step
            )
            for rate in training.heads
        ),
        scores=score,
        failures=tuple((params[rate], _make_error(rate, step)) for rate, step in training.diverged_at.items()),
    )


def _make_error(rate: float, step: int) -> NumericalError:
    return NumericalError(
        f"linear-augmented: the layer diverged at learning rate {rate:g}, step {step}", hint="Use a smaller one."
    )


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
    batch_size, steps_per_epoch = probe.divide_epoch(n)
    if group.rank == 0 and batch_size < probe.batch_size:
        _log.info(
            "linear-augmented: every step is on all %s images, fewer than a batch of %s", f"{n:,}", probe.batch_size
        )
    steps = probe.epochs * steps_per_epoch
    saver = _StateSaver(files=files if group.rank == 0 else None, saved_at=time.monotonic())
    for epoch in range(training.step // steps_per_epoch, probe.epochs):
        order = draw_order(n, seed=probe.seed, epoch=epoch)
        batches = torch.split(order, batch_size)[training.step % steps_per_epoch : steps_per_epoch]
        chunks_of = iterate_augmented_features(
            images, labels, batches, seed=probe.seed, epoch=epoch, share=probe.crop_share, group=group
        )
        for chunks in chunks_of:
            cosine = (1 + math.cos(math.pi * training.step / steps)) / 2
            if not take_step(training, chunks, images=batch_size, rate_factor=cosine, group=group, stop=stop):
                saver.save(training)
                stop.number = stop.number if stop.number is not None else signal.SIGTERM  # that of a different rank
                return
            if not training.heads:
                raise next(_make_error(rate, step) for rate, step in training.diverged_at.items())
            if training.step % steps_per_epoch == 0:
                training.last_losses = {
                    rate: loss / (steps_per_epoch * batch_size) for rate, loss in training.losses.items()
                }
                training.losses = dict.fromkeys(training.losses, 0.0)
            saver.save_if_due(training)
        saver.finish_epoch(training)


@dataclass(kw_only=True)
class _StateSaver:
    """Writes states at intervals. If the disk refuses, it warns and tries again, until the epoch ends."""

    files: StateFiles | None
    saved_at: float
    refused: bool = False

    def save(self, training: Training) -> None:
        if self.files is not None:
            write_state(self.files, training.state_dict(), step=training.step)
            self.saved_at, self.refused = time.monotonic(), False

    def save_if_due(self, training: Training) -> None:
        if self.files is None or time.monotonic() - self.saved_at < _SAVE_SECONDS:
            return
        try:
            self.save(training)
        except StoreError as error:
            self.saved_at, self.refused = time.monotonic(), True
            _log.warning("%s\nTraining continues and tries again; at the end of the epoch it stops.", error)

    def finish_epoch(self, training: Training) -> None:
        if self.refused:
            self.save(training)


def draw_order(n: int, *, seed: int, epoch: int) -> Tensor:
    """Return the numbers of all n images in the order of one epoch, a pure function of seed and epoch."""
    digest = hashlib.sha256(b"order\t%d\t%d" % (seed, epoch)).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))
