"""Fine-tuning: encoder and head are trained together, from images.

It leaves the pipeline after the encoder and rejoins it with scores. A step is a pure function of the weights before it and of
(seed, step): which images it takes, how they are changed and mixed, which residual branches are dropped. So the number of
ranks and of workers, the micro-batch and an interruption change no more than rounding.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.distributed.group import ALONE, Group, all_reduce_tensors, barrier, split_across_ranks
from msn_eval.errors import NumericalError, ResourceError, StoreError, format_count
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.features.encoder import Precision, exact_float32
from msn_eval.probes.finetune import Finetune
from msn_eval.probes.finetune.data import (
    Augmentation,
    Mixing,
    Order,
    draw_paths,
    load_training_images,
    make_order,
)
from msn_eval.probes.finetune.model import FinetuneModel, build_optimizer
from msn_eval.probes.finetune.predict import LabelledImages, RunOptions, compute_logits, init_head
from msn_eval.probes.training_state import StateFiles, read_shared_state, write_state
from msn_eval.process import StopRequest, watch_stop_signals

_log = logging.getLogger(__name__)
_SHOWN = 5
Progress = Callable[[int, int], None]  # images done, images in all


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

    @property
    def mean_loss(self) -> float:
        """Mean loss of the current epoch's steps."""
        total, count = self.loss
        return total / max(1, count)


def finetune(
    probe: Finetune,
    model: FinetuneModel,
    labelled: LabelledImages,
    *,
    precision: Precision,
    options: RunOptions,
    files: StateFiles | None = None,
    group: Group = ALONE,
    on_progress: Progress | None = None,
) -> Training:
    """Train a model in place, from the state of an earlier attempt if there is one.

    SIGTERM and Ctrl-C take effect between two steps, after a state is written.

    Args:
        probe: The recipe and the seed.
        model: The model.
        labelled: The labelled images.
        precision: fp32, or bf16 by autocast around float32 weights.
        options: Options that change no number.
        files: Where states are kept; None writes none.
        group: Ranks that share each batch; several must have joined a process group.
        on_progress: Called with images done and images in total.

    Returns:
        The training after its last step.

    Raises:
        NumericalError: The loss, the gradient or a weight is not finite.
        DataError: Images cannot be used.
        StoreError: The disk refuses states for an epoch and at its end again.
        ResourceError: Memory is too small for two images.
    """
    order, recipe = make_order(probe.recipe, len(labelled.labels), seed=probe.seed), probe.recipe
    optimizer = build_optimizer(model, recipe)
    training = Training(
        probe=probe,
        labelled=labelled,
        order=order,
        precision=precision,
        group=group,
        options=options,
        files=files,
        model=model,
        optimizer=optimizer,
        schedule=_build_schedule(recipe, order.steps, optimizer),
        micro_batch=max(2, options.micro_batch),
    )
    _resume(training)
    if training.step == 0 and recipe.head_lambda:
        init_head(model, labelled, l2=recipe.head_lambda, precision=precision, options=options, group=group)
    with exact_float32(), watch_stop_signals() as stop:
        for pixels in _load_batches(training):
            if take_step(training, pixels, stop):
                _save(training, is_last=True)
                barrier(group, "state")
                if stop.number is None:  # a different rank was asked, and ends now
                    barrier(group, "stop")
                    raise KeyboardInterrupt
                break
            if on_progress is not None:
                on_progress(training.step * order.batch, order.steps * order.batch)
            _save_if_due(training)
    return training


def _build_schedule(recipe: FinetuneRecipe, steps: int, optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
    warmup = min(steps - 1, round(recipe.warmup_epochs * steps / recipe.epochs))
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        lr_min=recipe.smallest_rate,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _resume(training: Training) -> None:
    """Continue from the newest state, if there is one."""
    state = read_shared_state(training.files, training.group)
    if state is None:
        return
    with torch.no_grad():
        for name, weight in training.model.trained.items():
            weight.copy_(state["network"][name])
    training.optimizer.load_state_dict(state["optimizer"])
    training.step, training.loss = state["step"], state["loss"]
    _log.info("fine-tuning resumes after step %d of %d", training.step, training.order.steps)


def _load_batches(training: Training) -> Iterator[Tensor]:
    """Yield this rank's pixels of every step that is left."""
    order, rows, encoder = training.order, own_rows(training.order, training.group), training.model.encoder
    if not rows:  # more ranks than pairs of images
        yield from (torch.empty(0) for _ in range(training.step, order.steps))
        return
    yield from load_training_images(
        training.labelled.images,
        training.labelled.hashes,
        Augmentation(recipe=training.probe.recipe, transform=encoder.transform, seed=training.probe.seed),
        (order.items(step, rows) for step in range(training.step, order.steps)),
        workers=training.options.workers,
        pinned=encoder.device.type == "cuda",
    )


def _save_if_due(training: Training) -> None:
    options, is_last = training.options, training.step == training.order.steps
    ends_epoch = training.step % training.order.steps_per_epoch == 0
    waited = time.monotonic() - training.saved_at
    if is_last or waited >= (options.save_seconds if ends_epoch else options.epoch_seconds):
        _save(training, is_last=is_last)


def _save(training: Training, *, is_last: bool) -> None:
    """Write a state if it is finite. If the disk refuses, training continues, to the end of the next epoch at most.

    Args:
        training: The training.
        is_last: No step follows, whose loss would show weights that are not finite.
    """
    training.saved_at = time.monotonic()
    files = training.files if training.group.rank == 0 else None
    if files is None and not is_last:
        return
    network = {name: weight.detach().cpu() for name, weight in training.model.trained.items()}
    bad = [name for name, weight in network.items() if not bool(weight.isfinite().all())]
    if bad and is_last:
        weights = format_count(len(bad), "weight is", "weights are")
        raise NumericalError(
            f"{weights} not finite after step {training.step} ({', '.join(bad[:_SHOWN])})",
            hint="Use a smaller finetune.learning_rate.",
        )
    if bad or files is None:
        return
    state = {"network": network, "optimizer": training.optimizer.state_dict(), "loss": training.loss}
    try:
        write_state(files, state, step=training.step)
        training.refused_step = None
    except StoreError as error:
        if training.refused_step is None:
            training.refused_step = training.step
        if is_last or training.step > training.refused_step + training.order.steps_per_epoch:
            raise
        _log.error("training continues without a state after step %d: %s", training.step, error)


def own_rows(order: Order, group: Group) -> range:
    """Return the rows of each batch that a rank takes: complete pairs, except for a last odd row."""
    return split_across_ranks(order.batch, group, block=2)


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
    sums = torch.stack([loss, loss.new_full((), float(stop.number is not None))])
    all_reduce_tensors(training.group, [*gradients, sums])
    norm = torch.nn.utils.get_total_norm(gradients)
    total, stops, length = torch.cat([sums, norm[None]]).tolist()  # the only wait for the device in a step
    if not (math.isfinite(total) and math.isfinite(length)):
        raise _make_error(training, total, length)
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
            pixels[own].to(device, model.head.weight.dtype, copy=True, non_blocking=True),
            labels[own].to(device, non_blocking=True),
            step,
        )
        own_draws = draws[rows.start + own.start : rows.start + own.stop].to(device, non_blocking=True)
        with _set_path_draws(model, own_draws):
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
