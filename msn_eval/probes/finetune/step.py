"""Fine-tuning step: it changes the weights by one batch, on any number of ranks, in micro-batches that fit into memory."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from msn_eval.distributed.group import Group, share, sum_over_ranks
from msn_eval.errors import NumericalError, ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.features.encoder import Precision
from msn_eval.probes.finetune import Finetune
from msn_eval.probes.finetune.data import Mixing, Order, draw_paths
from msn_eval.probes.finetune.model import FinetuneModel
from msn_eval.probes.finetune.predict import LabelledImages, RunOptions, compute_logits
from msn_eval.probes.training_state import StateFiles
from msn_eval.process import StopRequest

_log = logging.getLogger(__name__)
_SHOWN = 5


@dataclass(kw_only=True)
class Training:
    """A fine-tuning between two steps.

    Attributes:
        probe, labelled, order, precision, group, options, files: As passed to `finetune`; they do not change.
        model, optimizer, schedule: What is trained, and how.
        micro_batch: Images at once on this rank; halved on out-of-memory.
        step: Number of steps taken.
        loss: Sum of the losses of the current epoch's steps, and their number.
        saved_at: When a state was written last, or tried.
        refused_step: Step at which the disk first refused a state, until one is written.
    """

    probe: Finetune
    labelled: LabelledImages
    order: Order
    precision: Precision
    group: Group
    options: RunOptions
    files: StateFiles | None
    model: FinetuneModel
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    micro_batch: int
    step: int = 0
    loss: tuple[float, int] = (0.0, 0)
    saved_at: float = field(default_factory=time.monotonic)
    refused_step: int | None = None


def own_rows(order: Order, group: Group) -> range:
    """Return the rows of each batch that a rank takes: complete pairs, except for a last odd row."""
    return share(order.batch, group, block=2)


def take_step(training: Training, pixels: Tensor, stop: StopRequest) -> bool:
    """Change the weights by one step.

    Args:
        training: The training; changed in place.
        pixels: This rank's rows of the batch, (b, 3, S, S) float32, normalised.
        stop: Whether this rank is asked to stop.

    Returns:
        Whether some rank is asked to stop.

    Raises:
        NumericalError: The loss or the gradient is not finite.
        ResourceError: Memory is too small for two images.
    """
    training.schedule.step_update(training.step)
    loss = _compute_gradients(training, pixels)
    weights = list(training.model.trained.values())
    for weight in weights:
        if weight.grad is None:  # this rank has no images in this step
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    sums = torch.stack([loss, loss.new_tensor(float(stop.number is not None))])
    sum_over_ranks(training.group, [*gradients, sums])
    norm = torch.nn.utils.get_total_norm(gradients)
    total, stops = sums.tolist()
    if not (math.isfinite(total) and bool(norm.isfinite())):
        raise _make_error(training, total, float(norm))
    if training.probe.recipe.clip:
        torch.nn.utils.clip_grads_with_norm_(weights, training.probe.recipe.clip, norm)
    training.optimizer.step()
    if training.step % training.order.steps_per_epoch == 0:
        training.loss = 0.0, 0
    training.loss = training.loss[0] + total, training.loss[1] + 1
    training.step += 1
    return bool(stops)


def _compute_gradients(training: Training, pixels: Tensor) -> Tensor:
    """Add the gradients of this rank's rows to the weights, and return its share of the mean loss.

    On out-of-memory the micro-batch is halved, and the step starts again from zero gradients.
    """
    while True:
        training.optimizer.zero_grad(set_to_none=True)
        try:
            return _accumulate(training, pixels)
        except OUT_OF_MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Outside of the except block: there the frames of the failed attempt would keep their tensors alive.
        device = training.model.encoder.device
        micro_batch = min(training.micro_batch, len(pixels))
        if micro_batch <= 2:
            raise ResourceError(
                f"memory of {device} is too small to train on two images at once: {reason}",
                hint="Train fewer blocks (finetune.blocks), or use --precision bf16 or another --device.",
            )
        training.micro_batch = max(2, micro_batch // 4 * 2)  # even, so that pairs stay together
        _log.warning("out of memory on %s; continuing with %d images at once", device, training.micro_batch)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _accumulate(training: Training, pixels: Tensor) -> Tensor:
    probe, order, model, step = training.probe, training.order, training.model, training.step
    device = model.encoder.device
    rows = own_rows(order, training.group)
    mix = Mixing(recipe=probe.recipe, n_classes=model.head.out_features, seed=probe.seed)
    draws = draw_paths(step, batch=order.batch, paths=len(model.paths), seed=probe.seed)
    numbers = [number for _, number in order.items(step, rows)]
    labels = training.labelled.labels[torch.tensor(numbers, dtype=torch.int64)]
    total = torch.zeros((), device=device)
    cross_entropy = SoftTargetCrossEntropy()
    for first in range(0, len(rows), training.micro_batch):
        own = slice(first, min(first + training.micro_batch, len(rows)))
        images, targets = mix(
            pixels[own].to(device, model.head.weight.dtype, copy=True, non_blocking=True), labels[own].to(device), step
        )
        with _set_path_draws(model, draws[rows.start + own.start : rows.start + own.stop].to(device)):
            logits = compute_logits(model, images, training.precision)
            loss = cross_entropy(logits, targets) * (len(images) / order.batch)
            loss.backward()
        total += loss.detach()
    return total


@contextmanager
def _set_path_draws(model: FinetuneModel, draws: Tensor) -> Iterator[None]:
    for column, path in enumerate(model.paths):
        path.draws = draws[:, column]
    try:
        yield
    finally:
        for path in model.paths:
            path.draws = None


def _make_error(training: Training, loss: float, norm: float) -> NumericalError:
    order = training.order
    items = order.items(training.step, range(order.batch))
    names = ", ".join(training.labelled.images.ids[number] for _, number in items[:_SHOWN])
    problem = f"the norm of the gradient is {norm:g}" if math.isfinite(loss) else f"the loss is {loss:g}"
    hint = "Use a smaller finetune.learning_rate or a longer warm-up"
    return NumericalError(
        f"fine-tuning: {problem} at step {training.step + 1} of {order.steps} (images {names}, …)",
        hint=f"{hint}, or --precision fp32." if training.precision != "fp32" else f"{hint}.",
    )
