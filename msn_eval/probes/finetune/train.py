"""Finetune: encoder and head trained together, from images.

It leaves the corridor after the encoder and rejoins it with scores. A step is a pure function of the weights before it and of
(seed, step): which images it sees, how they are changed and mixed, which residual branches are left out. So neither the
number of ranks, nor that of workers, nor how a batch is cut, nor a stop in between changes more than rounding.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from msn_eval.config.recipes import Finetune
from msn_eval.distributed.group import ALONE, Group, barrier, broadcast_from_rank0
from msn_eval.errors import NumericalError, StoreError
from msn_eval.features.encoder import Precision, exact_float32
from msn_eval.probes.finetune.data import Augmentation, Order, epoch_order, load_training_images
from msn_eval.probes.finetune.model import FinetuneModel, build_optimizer
from msn_eval.probes.finetune.predict import Labelled, Pace, start_head
from msn_eval.probes.finetune.step import Run, Setup, own_rows, take_step
from msn_eval.probes.training_state import StateFiles, read_state, write_state
from msn_eval.process import watch_stop_signals

_log = logging.getLogger(__name__)
_SHOWN = 5
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """How a fine-tuning ended.

    loss: mean over the last epoch's steps of what was minimised
    """

    steps: int
    loss: float
    part: int


def finetune(
    probe: Finetune,
    trainee: FinetuneModel,
    labelled: Labelled,
    *,
    precision: Precision,
    pace: Pace,
    states: StateFiles | None = None,
    group: Group = ALONE,
    on_progress: Progress | None = None,
) -> FinetuneResult:
    """Train a trainee in place, from the state that an earlier attempt left, if it left one.

    precision: fp32, or bf16 by autocast around float32 weights
    states:    where they are kept; None: nothing is written
    group:     ranks that share each batch; a process group must be joined where there are several
    Raises NumericalError naming images where the loss or the gradient is not finite; DataError for images that cannot be
    used; StoreError where the disk refused states for an epoch and at its end again; ResourceError where memory is too
    small for two images. SIGTERM and Ctrl-C are heeded between two steps, with a state written.
    """
    order = epoch_order(probe.recipe, len(labelled.labels), seed=probe.seed)
    setup = Setup(
        probe=probe, labelled=labelled, order=order, precision=precision, group=group, pace=pace, states=states
    )
    optimizer = build_optimizer(trainee, probe.recipe)
    run = Run(trainee=trainee, optimizer=optimizer, schedule=_schedule(setup, optimizer), part=max(2, pace.part))
    _resume(setup, run)
    if run.step == 0 and probe.recipe.head_lambda:
        start_head(trainee, labelled, strength=probe.recipe.head_lambda, precision=precision, pace=pace, group=group)
    with ExitStack() as opened:
        opened.enter_context(exact_float32())
        stop = opened.enter_context(watch_stop_signals())
        for pixels in _batches(setup, run):
            if take_step(setup, run, pixels, stop):
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
    return FinetuneResult(steps=run.step, loss=total / max(1, count), part=run.part)


def _schedule(setup: Setup, optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
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


def _resume(setup: Setup, run: Run) -> None:
    if setup.states is None:
        return
    # Ranks on other hosts may not see the first one's folder; what it reads is everyone's.
    state = read_state(setup.states) if setup.group.rank == 0 else None
    if not broadcast_from_rank0(setup.group, "state", lambda: "" if state is None else str(state["step"])):
        return
    state = broadcast_from_rank0(setup.group, "state", lambda: state or {})
    with torch.no_grad():
        for name, one in run.trainee.trained.items():
            one.copy_(state["network"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.loss = state["step"], state["loss"]
    _log.info("fine-tuning goes on after step %d of %d", run.step, setup.order.steps)


def _batches(setup: Setup, run: Run) -> Iterator[Tensor]:
    """Give this rank's pixels of every step that is left."""
    order, rows = setup.order, own_rows(setup)
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


def _save_if_due(setup: Setup, run: Run) -> None:
    last = run.step == setup.order.steps
    waited = time.monotonic() - run.saved_at
    at_epoch_end = run.step % setup.steps_an_epoch == 0
    if last or waited >= (setup.pace.save_seconds if at_epoch_end else setup.pace.epoch_seconds):
        _save(setup, run, last=last)


def _save(setup: Setup, run: Run, *, last: bool) -> None:
    """Write a state, if it is finite. A disk that refuses is told, and training goes on: to the end of the next epoch at most.

    last: no step follows, in which every rank would meet what is not finite
    """
    run.saved_at = time.monotonic()
    writes = setup.states is not None and setup.group.rank == 0
    if not (writes or last):
        return
    network = {name: one.detach().cpu() for name, one in run.trainee.trained.items()}
    bad = [name for name, one in network.items() if not bool(one.isfinite().all())]
    if bad and last:
        raise NumericalError(
            f"{len(bad)} weights are not finite after step {run.step} ({', '.join(bad[:_SHOWN])})",
            hint="Use a smaller finetune.learning_rate.",
        )
    if bad or setup.states is None or not writes:
        return
    state = {"network": network, "optimizer": run.optimizer.state_dict(), "loss": run.loss}
    try:
        write_state(setup.states, state, step=run.step)
        run.refused_step = None
    except StoreError as error:
        run.refused_step = run.step if run.refused_step is None else run.refused_step
        if last or run.step > run.refused_step + setup.steps_an_epoch:
            raise
        _log.error("training goes on without a state after step %d: %s", run.step, error)
