"""Finetune: encoder and head trained together, from images.

It leaves the corridor after the encoder and rejoins it with scores. A step is a pure function of the weights before it and of
(seed, step): which images it sees, how they are changed and mixed, which residual branches are left out. So neither the
number of ranks, nor that of workers, nor how a batch is cut, nor a stop in between changes more than rounding.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from msn_eval.distributed import ALONE, Group, barrier, decided, share
from msn_eval.encoder import Precision, exact_float32, normalised
from msn_eval.errors import NumericalError, ResourceError, StoreError
from msn_eval.file_hashes import unreadable
from msn_eval.finetune_recipe import Finetune
from msn_eval.images import ImageSet
from msn_eval.pixel_loader import PixelList, load_pixels
from msn_eval.process_group import rows_of_all_ranks, sum_over_ranks
from msn_eval.protocols.finetune_state import FinetuneState, StateFiles, read_state, write_state
from msn_eval.protocols.trainee import Trainee, build_optimizer
from msn_eval.protocols.training_images import (
    Augmentation,
    Mixing,
    Order,
    load_training_images,
    order_of,
    path_draws,
)
from msn_eval.stop import Stop, stop_heard

_log = logging.getLogger(__name__)
_SHOWN = 5
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast and how safely a fine-tuning runs; it changes no number.

    part:         images at once on a rank, even; the batch is accumulated over parts; halved where memory is short
    workers:      processes that decode
    save_seconds: between two states, at the ends of epochs; and within an epoch where that takes `epoch_seconds`
    """

    part: int
    workers: int
    save_seconds: float = 60.0
    epoch_seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The labelled images of a draw. labels: (n,) int64, those to be learnt; hashes: SHA-256 of each image by id."""

    images: ImageSet
    labels: Tensor
    hashes: Mapping[str, str]


@dataclass(kw_only=True)
class _Run:
    """A fine-tuning under way: what changes from step to step."""

    trainee: Trainee
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    part: int
    step: int = 0
    loss: tuple[float, int] = (0.0, 0)
    saved_at: float = field(default_factory=time.monotonic)
    refused_step: int | None = None  # at which the disk first refused a state, until one was written


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What a fine-tuning has from its first step to its last."""

    probe: Finetune
    labelled: Labelled
    order: Order
    precision: Precision
    group: Group
    pace: Pace
    states: StateFiles | None

    @property
    def steps_an_epoch(self) -> int:
        return max(1, -(-self.labelled.labels.numel() // self.order.batch))


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How a fine-tuning ended.

    loss: mean over the last epoch's steps of what was minimised
    """

    steps: int
    loss: float
    part: int


def finetune(
    probe: Finetune,
    trainee: Trainee,
    labelled: Labelled,
    *,
    precision: Precision,
    pace: Pace,
    states: StateFiles | None = None,
    group: Group = ALONE,
    on_progress: Progress | None = None,
) -> Tuned:
    """Train a trainee in place, from the state that an earlier attempt left, if it left one.

    precision: fp32, or bf16 by autocast around float32 weights
    states:    where they are kept; None: nothing is written
    group:     ranks that share each batch; a process group must be joined where there are several
    Raises NumericalError naming images where the loss or the gradient is not finite; DataError for images that cannot be
    used; StoreError where the disk refused states for an epoch and at its end again; ResourceError where memory is too
    small for two images. SIGTERM and Ctrl-C are heeded between two steps, with a state written.
    """
    order = order_of(probe.recipe, len(labelled.labels), seed=probe.seed)
    setup = _Setup(
        probe=probe, labelled=labelled, order=order, precision=precision, group=group, pace=pace, states=states
    )
    optimizer = build_optimizer(trainee, probe.recipe)
    run = _Run(trainee=trainee, optimizer=optimizer, schedule=_schedule(setup, optimizer), part=max(2, pace.part))
    _resume(setup, run)
    with ExitStack() as opened:
        opened.enter_context(exact_float32())
        stop = opened.enter_context(stop_heard())
        for pixels in _batches(setup, run):
            if _take_step(setup, run, pixels, stop):
                _save(setup, run, last=True)
                barrier(group, "state")
                if stop.number is None:  # another rank was told, and ends now
                    barrier(group, "stop")
                    raise KeyboardInterrupt
                break
            if on_progress is not None:
                on_progress(run.step * order.batch, order.steps * order.batch)
            _save_if_due(setup, run)
    total, count = run.loss
    return Tuned(steps=run.step, loss=total / max(1, count), part=run.part)


def _schedule(setup: _Setup, optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
    recipe, steps = setup.probe.recipe, setup.order.steps
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


def _resume(setup: _Setup, run: _Run) -> None:
    if setup.states is None:
        return
    # Ranks on other hosts may not see the first one's folder; what it reads is everyone's.
    state = read_state(setup.states) if setup.group.rank == 0 else None
    found = decided(setup.group, "state", lambda: "" if state is None else str(state.step))
    if not found:
        return
    if setup.group.world > 1:
        from torch import distributed

        told = [state]
        distributed.broadcast_object_list(told, src=0)
        state = told[0]
    assert state is not None
    with torch.no_grad():
        for name, one in run.trainee.trained.items():
            one.copy_(state.network[name])
    run.optimizer.load_state_dict(dict(state.optimizer))
    run.step, run.loss = state.step, state.loss
    _log.info("fine-tuning goes on after step %d of %d", run.step, setup.order.steps)


def _batches(setup: _Setup, run: _Run) -> Iterator[Tensor]:
    """Give this rank's pixels of every step that is left."""
    order, rows = setup.order, _own_rows(setup)
    cuda = run.trainee.encoder.device.type == "cuda"
    if not rows:  # more ranks than pairs of images
        yield from (torch.empty(0) for _ in range(run.step, order.steps))
        return
    yield from load_training_images(
        setup.labelled.images,
        setup.labelled.hashes,
        Augmentation(recipe=setup.probe.recipe, transform=run.trainee.encoder.transform, seed=setup.probe.seed),
        _Steps(order, rows, first=run.step),
        workers=setup.pace.workers,
        pinned=cuda,
    )


@dataclass(frozen=True)
class _Steps:
    """The items of each step that is left, made when they are asked for."""

    order: Order
    rows: range
    first: int

    def __len__(self) -> int:
        return self.order.steps - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.order.items(step, self.rows) for step in range(self.first, self.order.steps))


def _own_rows(setup: _Setup) -> range:
    return share(setup.order.batch, setup.group, block=2)


def _take_step(setup: _Setup, run: _Run, pixels: Tensor, stop: Stop) -> bool:
    """Change the weights by one step; tell whether some rank was asked to stop."""
    run.schedule.step_update(run.step)
    loss = _gradients(setup, run, pixels)
    parameters = list(run.trainee.trained.values())
    for one in parameters:
        if one.grad is None:  # this rank has no images in this step
            one.grad = torch.zeros_like(one)
    told = torch.stack([loss, loss.new_tensor(float(stop.number is not None))])
    sum_over_ranks(setup.group, [*(one.grad for one in parameters if one.grad is not None), told])
    norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    loss_value, stops = (float(one) for one in told.tolist())
    length = float(norm)
    if not (torch.isfinite(told).all() and torch.isfinite(norm)):
        raise _not_finite(setup, run, loss_value, length)
    if setup.probe.recipe.clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, setup.probe.recipe.clip, norm)
    run.optimizer.step()
    if run.step % setup.steps_an_epoch == 0:
        run.loss = 0.0, 0
    run.loss = run.loss[0] + loss_value, run.loss[1] + 1
    run.step += 1
    return stops > 0


def _gradients(setup: _Setup, run: _Run, pixels: Tensor) -> Tensor:
    """Put the gradients of this rank's share of a step into the weights; give its share of the mean loss.

    Where memory is short, in smaller parts; what a part that failed has added is taken back first.
    """
    while True:
        run.optimizer.zero_grad(set_to_none=True)
        try:
            return _accumulated(setup, run, pixels)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(
                error
            ):
                raise
            shortage = str(error).partition("\n")[0]
        # Outside of the except block: there the failed attempt's frames, and their tensors with them, would live on.
        device = run.trainee.encoder.device
        run.part = min(run.part, len(pixels))
        if run.part <= 2:
            raise ResourceError(
                f"memory of {device} is too small to train on two images at once: {shortage}",
                remedy="Train fewer blocks (finetune.blocks), or use --precision bf16 or another --device.",
            )
        run.part = max(2, run.part // 2 - run.part // 2 % 2)
        _log.warning("out of memory on %s; going on with %d images at once", device, run.part)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _accumulated(setup: _Setup, run: _Run, pixels: Tensor) -> Tensor:
    probe, order, trainee = setup.probe, setup.order, run.trainee
    device = trainee.encoder.device
    rows = _own_rows(setup)
    mix = Mixing(recipe=probe.recipe, n_classes=trainee.head.out_features, seed=probe.seed)
    draws = path_draws(run.step, batch=order.batch, paths=len(trainee.paths), seed=probe.seed)
    labels = setup.labelled.labels[
        torch.tensor([number for _, number in order.items(run.step, rows)], dtype=torch.int64)
    ]
    total = torch.zeros((), device=device)
    loss_of = SoftTargetCrossEntropy()
    for first in range(0, len(rows), run.part):
        some = slice(first, min(first + run.part, len(rows)))
        images, targets = mix(pixels[some].to(device, copy=True, non_blocking=True), labels[some].to(device), run.step)
        with _paths_drawn(trainee, draws[rows.start + some.start : rows.start + some.stop].to(device)):
            logits = _logits(trainee, images, setup.precision)
            loss = loss_of(logits, targets) * (len(images) / order.batch)
            loss.backward()
        total += loss.detach()
    return total


@contextmanager
def _paths_drawn(trainee: Trainee, draws: Tensor) -> Iterator[None]:
    for column, path in enumerate(trainee.paths):
        path.draws = draws[:, column]
    try:
        yield
    finally:
        for path in trainee.paths:
            path.draws = None


def _logits(trainee: Trainee, images: Tensor, precision: Precision) -> Tensor:
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision != "fp32"):
        logits: Tensor = trainee.network(images)
    return logits.float()


def _not_finite(setup: _Setup, run: _Run, loss: float, length: float) -> NumericalError:
    items = setup.order.items(run.step, range(setup.order.batch))
    names = ", ".join(setup.labelled.images.ids[number] for _, number in items[:_SHOWN])
    what = f"the loss is {loss:g}" if loss != loss or abs(loss) == float("inf") else f"the gradient is {length:g} long"
    remedy = "Use a smaller finetune.learning_rate or a longer warm-up"
    return NumericalError(
        f"fine-tuning: {what} at step {run.step + 1} of {setup.order.steps} (images {names}, …)",
        remedy=f"{remedy}, or --precision fp32." if setup.precision != "fp32" else f"{remedy}.",
    )


def _save_if_due(setup: _Setup, run: _Run) -> None:
    last = run.step == setup.order.steps
    waited = time.monotonic() - run.saved_at
    at_epoch_end = run.step % setup.steps_an_epoch == 0
    if last or waited >= (setup.pace.save_seconds if at_epoch_end else setup.pace.epoch_seconds):
        _save(setup, run, last=last)


def _save(setup: _Setup, run: _Run, *, last: bool) -> None:
    """Write a state. A disk that refuses is told, and training goes on: to the end of the next epoch at most."""
    run.saved_at = time.monotonic()
    if setup.states is None or setup.group.rank != 0:
        return
    network = {name: one.detach().cpu() for name, one in run.trainee.trained.items()}
    state = FinetuneState(step=run.step, network=network, optimizer=run.optimizer.state_dict(), loss=run.loss)
    try:
        write_state(setup.states, state)
        run.refused_step = None
    except StoreError as error:
        run.refused_step = run.step if run.refused_step is None else run.refused_step
        if last or run.step > run.refused_step + setup.steps_an_epoch:
            raise
        _log.error("training goes on without a state after step %d: %s", run.step, error)


def score_images(
    trainee: Trainee,
    images: ImageSet,
    hashes: Mapping[str, str],
    *,
    decoder: str,
    precision: Precision,
    pace: Pace,
    group: Group = ALONE,
    on_progress: Progress | None = None,
) -> Tensor:
    """Give the logits of images under the evaluation transform, (m, n_classes) float64, on the CPU, in their order.

    Raises DataError listing every image that cannot be used.
    """
    rows = share(len(images), group, block=pace.part)
    pixels_of = PixelList(
        source=images.source,
        image_ids=images.ids[rows.start : rows.stop],
        transform=trainee.encoder.transform,
        hashes=hashes,
        decoder=decoder,
    )
    found: list[Tensor] = [torch.empty(0, trainee.head.out_features)]
    failures: list[str] = []
    with torch.inference_mode(), exact_float32():
        for batch in load_pixels(pixels_of, batch_size=pace.part, workers=pace.workers):
            failures += [f"{images.source.place(image_id)}: {reason}" for image_id, reason in batch.failures]
            if not failures:
                assert isinstance(batch.pixels, Tensor)
                pixels = normalised(batch.pixels.to(trainee.encoder.device), trainee.encoder)
                found.append(_logits(trainee, pixels, precision).cpu())
            if on_progress is not None:
                on_progress(sum(map(len, found)), len(rows))
    if failures:
        raise unreadable(failures)
    return rows_of_all_ranks(group, torch.cat(found)).double()
