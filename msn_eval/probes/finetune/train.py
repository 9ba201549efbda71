"""Fine-tuning: encoder and head are trained together, from images.

It leaves the pipeline after the encoder and rejoins it with scores. A step is a pure function of the weights before it and of
(seed, step): which images it takes, how they are changed and mixed, which residual branches are dropped. So the number of
ranks and of workers, the micro-batch and an interruption change no more than rounding.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.distributed.group import ALONE, Group, barrier, broadcast_from_first, broadcast_from_rank0
from msn_eval.errors import NumericalError, StoreError
from msn_eval.features.encoder import Precision, exact_float32
from msn_eval.probes.finetune import Finetune
from msn_eval.probes.finetune.data import Augmentation, Item, Order, load_training_images, make_order
from msn_eval.probes.finetune.model import FinetuneModel, build_optimizer
from msn_eval.probes.finetune.predict import LabelledImages, RunOptions, init_head
from msn_eval.probes.finetune.step import Training, own_rows, take_step
from msn_eval.probes.training_state import StateFiles, read_state, write_state
from msn_eval.process import watch_stop_signals

_log = logging.getLogger(__name__)
_SHOWN = 5
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """The end of a fine-tuning.

    Attributes:
        steps: Number of steps.
        loss: Mean over the steps of the last epoch of what was minimised.
        micro_batch: Images at once on this rank at the end.
    """

    steps: int
    loss: float
    micro_batch: int


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
) -> FinetuneResult:
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
    total, count = training.loss
    return FinetuneResult(steps=training.step, loss=total / max(1, count), micro_batch=training.micro_batch)


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
    """Continue from the newest state, if there is one. Rank 0 reads it: others may not see its folder."""
    group, files = training.group, training.files
    state = read_state(files) if files is not None and group.rank == 0 else None
    if not broadcast_from_rank0(group, "state", lambda: "" if state is None else str(state["step"])):
        return
    state = broadcast_from_first(group, state)
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
        _Batches(order, rows, first=training.step),
        workers=training.options.workers,
        pinned=encoder.device.type == "cuda",
    )


@dataclass(frozen=True)
class _Batches:
    """The items of each step that is left, made when the loader asks for them."""

    order: Order
    rows: range
    first: int

    def __len__(self) -> int:
        return self.order.steps - self.first

    def __iter__(self) -> Iterator[list[Item]]:
        return (self.order.items(step, self.rows) for step in range(self.first, self.order.steps))


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
        raise NumericalError(
            f"{len(bad)} weights are not finite after step {training.step} ({', '.join(bad[:_SHOWN])})",
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
