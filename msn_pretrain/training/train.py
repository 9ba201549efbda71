"""The training loop."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageSet
from msn_eval.distributed.collective import all_reduce_max, any_over_ranks, check_replicas
from msn_eval.distributed.group import Group as Group
from msn_eval.distributed.group import all_gather_object, broadcast_from_rank0, check_equal_across_ranks
from msn_eval.errors import NumericalError, StoreError
from msn_eval.features.collapse import is_collapsed
from msn_eval.features.transfer import start_download
from msn_eval.files.atomic import write_atomically
from msn_eval.process import StopRequest, watch_stop_signals
from msn_pretrain.config.recipe import architecture_of
from msn_pretrain.config.schedule import StepSettings, settings_at
from msn_pretrain.data.sampler import Batch, Order, seed_at
from msn_pretrain.data.view_loader import ViewBatch, ViewList, load_views, normalise
from msn_pretrain.methods.msn import Step, collapse_statistics
from msn_pretrain.training import online_probe
from msn_pretrain.training.determinism import deterministic_kernels
from msn_pretrain.training.gradients import clip_gradients, compute_gradients, gradient_norm, ignore_mark
from msn_pretrain.training.journal import (
    AlarmCounters,
    Journal,
    find_alarm,
    may_roll_back,
    open_journal,
)
from msn_pretrain.training.optimizer import set_for_step, update_weights
from msn_pretrain.training.run import (
    Learner,
    LearnerState,
    Recipe,
    autocast_of,
    build_learner,
    collect_shared_facts,
    config_sha256,
    data_sha256,
    evaluated_encoder,
    lock_run,
    makes_views_on_device,
    open_run,
    resume,
    roll_back,
    training_images,
    view_kinds,
)
from msn_pretrain.training.snapshot import Snapshot, generator_states, seed_generators, write_snapshot
from msn_pretrain.training.watchdog import EVALUATION_SECONDS, SAVE_SECONDS, Watchdog, watch_steps

_log = logging.getLogger(__name__)
_MASKS, _RANKS = 1, 2  # purposes of derived seeds
_RETRY_SECONDS = 60.0  # after a snapshot that could not be written
_MOST_SNAPSHOT_SHARE = 0.1  # of the time, for snapshots at the ends of epochs


@dataclass(frozen=True, kw_only=True)
class Session:
    """What stays the same from the first step of a run to the last.

    Attributes:
        mark: Called with the name of each part of a step as it begins: forward, backward, communication, optimiser.
    """

    recipe: Recipe
    ranks: Group
    run: Path
    images: ImageSet
    order: Order
    steps: int
    learner: Learner
    journal: Journal = field(default_factory=Journal)
    watchdog: Watchdog = field(default_factory=Watchdog)
    mark: Callable[[str], None] = ignore_mark


@dataclass(frozen=True, kw_only=True)
class _QueuedStep:
    """A step whose numbers are on their way to the host. On a GPU the next step is queued before they are read.

    Attributes:
        step: Finished steps, with this one.
        batch: Its images.
        settings: Its hyper-parameters.
        names: Of its numbers.
        copies: `numbers`; if the step has a line in the journal, also the rows of `Step.all_rows`.
        arrived: Complete once the copies are; None if they are already.
        seconds: Between the end of the step before and the end of this one.
        wait_seconds: Of them, until its views were there.
    """

    step: int
    batch: Batch
    settings: StepSettings
    names: Sequence[str]
    copies: Mapping[str, Tensor]
    arrived: torch.cuda.Event | None
    seconds: float
    wait_seconds: float


@dataclass(kw_only=True)
class _Progress:
    """What changes from step to step, apart from the learner."""

    step: int = 0
    alarms: AlarmCounters = field(default_factory=AlarmCounters)
    saved_at: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0
    refused_at: float | None = None  # time of the last snapshot that could not be written; None after one that was
    refused_step: int = 0


def train(recipe: Recipe, ranks: Group, *, allowed: Sequence[str] = (), quiet: bool = False) -> int:
    """Train a recipe in its folder, from the newest snapshot to the end.

    Args:
        recipe: The recipe; its `run.dir` is created or continued.
        ranks: This process among the ranks.
        allowed: Keys of the recipe whose values may differ from those of the folder.
        quiet: Show no progress bar.

    Returns:
        0, or 75 or 130 if a signal ended the run.

    Raises:
        MsnEvalError: Of any kind. The last snapshot is kept.
    """
    run = Path(recipe.run.dir)
    with ExitStack() as stack:
        stack.enter_context(deterministic_kernels(ranks.device))
        images = broadcast_from_rank0(ranks, "images", lambda: training_images(recipe))
        order = Order(
            n_images=len(images),
            batch_size=recipe.optimization.batch_size,
            seed=recipe.run.seed,
            rank=ranks.rank,
            world=ranks.world,
        )
        learner = build_learner(recipe, ranks.device)
        check_equal_across_ranks(ranks, "the run", collect_shared_facts(recipe, images, learner))
        broadcast_from_rank0(ranks, "lock", lambda: stack.enter_context(lock_run(run)))
        folder = broadcast_from_rank0(ranks, "folder", lambda: open_run(recipe, images, allowed=allowed))
        seed_generators(seed_at(_RANKS, ranks.rank, seed=recipe.run.seed))
        snapshot = resume(learner, folder, ranks)
        progress = _Progress()
        if snapshot is not None:
            progress = _Progress(step=snapshot.step, alarms=AlarmCounters(**snapshot.watched))
        steps = recipe.optimization.epochs * order.steps_per_epoch
        journal = open_journal(
            run, first=ranks.first, step=progress.step, steps=steps, quiet=quiet, epoch_steps=order.steps_per_epoch
        )
        session = Session(
            recipe=recipe,
            ranks=ranks,
            run=run,
            images=images,
            order=order,
            steps=steps,
            learner=learner,
            journal=stack.enter_context(journal),
            watchdog=stack.enter_context(watch_steps()),
        )
        with (
            watch_stop_signals() as stop
        ):  # before this there is nothing to save, and a signal ends the process at once
            return _train_loop(session, progress, stop)


def _train_loop(session: Session, progress: _Progress, stop: StopRequest) -> int:
    """Run the remaining steps and return the exit code."""
    recipe, ranks, steps_per_epoch = session.recipe, session.ranks, session.order.steps_per_epoch
    if progress.step and progress.step % steps_per_epoch == 0:
        _evaluate_if_due(session, progress)  # in case the run was killed between snapshot and probe
    queued: _QueuedStep | None = None
    ended = time.monotonic()
    for batch in load_session_views(session, progress.step):
        waited = time.monotonic() - ended
        settings = settings_at(recipe, step=progress.step, steps_per_epoch=steps_per_epoch)
        step, numbers = compute(session, batch, settings)
        stopping, due = any_over_ranks(ranks, stop.requested, ranks.first and _is_due(session, progress))
        numbers["skipped"] = update(session, numbers, settings)
        progress.step += 1
        saving = stopping or due or progress.step == session.steps
        is_logged = progress.step % recipe.run.log_every == 0 or progress.step == session.steps
        rows = step.all_rows() if is_logged else {}
        copies, arrived = start_download({"numbers": torch.stack(list(numbers.values())), **rows})
        if queued is not None:
            _finish_step(session, progress, queued)
        queued = _QueuedStep(
            step=progress.step,
            batch=batch.batch,
            settings=settings,
            names=tuple(numbers),
            copies=copies,
            arrived=arrived,
            seconds=time.monotonic() - ended,
            wait_seconds=waited,
        )
        # A snapshot holds the counters of its own step, and the step after one too many bad steps must not run.
        if arrived is None or saving or progress.alarms.bad_steps:
            saving = _finish_step(session, progress, queued) or saving
            queued = None
        session.watchdog.step_done()
        compare_every = recipe.run.compare_every
        if saving or (compare_every and progress.step % compare_every == 0):
            check_replicas(ranks, session.learner.model.state_dict(), step=progress.step)
        if saving:
            _save(session, progress, last=stopping or progress.step == session.steps)
        if progress.step % steps_per_epoch == 0:
            _evaluate_if_due(session, progress)
        if stopping:
            return max(all_gather_object(ranks, "exit code", stop.accept()))
        ended = time.monotonic()
    return 0


def load_session_views(session: Session, first_step: int) -> Iterator[ViewBatch]:
    """Yield the views of this rank's batches from `first_step` to the last step."""
    recipe, device = session.recipe, session.ranks.device
    view_list = ViewList(
        images=session.images,
        kinds=view_kinds(recipe),
        seed=recipe.run.seed,
        batched=makes_views_on_device(recipe, device),
        device=device,
    )
    return load_views(
        view_list,
        session.order,
        first_step=first_step,
        steps=session.steps,
        workers=recipe.data.workers,
        pinned=recipe.data.pin_memory,
    )


def compute(session: Session, batch: ViewBatch, settings: StepSettings) -> tuple[Step, dict[str, Tensor]]:
    """Compute loss and gradients of one step, averaged over ranks and clipped. The host waits for no GPU.

    Returns:
        The step, and its loss, parts of the loss and gradient norms by name, scalars on the device.
    """
    recipe, ranks, model, optimizer = session.recipe, session.ranks, session.learner.model, session.learner.optimizer
    session.mark("forward")
    set_for_step(optimizer, settings)
    optimizer.zero_grad(set_to_none=True)
    images = len(batch.batch.images)
    views = [view for kind in batch.views for view in torch.split(normalise(kind, IMAGENET_MEAN, IMAGENET_STD), images)]
    generator = torch.Generator().manual_seed(seed_at(_MASKS, batch.batch.step, seed=recipe.run.seed))
    kept = model.draw_kept(generator, images=images * ranks.world)
    if not recipe.run.micro_batch:
        session.learner.averager.start()
    step = compute_gradients(
        model,
        views,
        None if kept is None else _own_rows(kept, ranks, images).to(ranks.device, non_blocking=True),
        sharpening=settings.sharpening,
        micro_batch=recipe.run.micro_batch,
        autocast=autocast_of(recipe, ranks.device),
        mark=session.mark,
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    session.mark("communication")
    session.learner.averager.finish()
    session.mark("optimiser")
    clipped = [parameter for parameter in model.clipped_parameters() if parameter.requires_grad]
    clipped_ids = {id(parameter) for parameter in clipped}
    norm = gradient_norm(clipped)
    rest = gradient_norm([parameter for parameter in parameters if id(parameter) not in clipped_ids])
    if recipe.optimization.clip:
        clip_gradients(clipped, recipe.optimization.clip, norm)
    norms = {"gradient_norm": norm, "prototype_gradient_norm": rest.to(norm.device, non_blocking=True)}
    return step, {**step.parts, **norms}


def update(session: Session, numbers: Mapping[str, Tensor], settings: StepSettings) -> Tensor:
    """Update weights and moving average, unless a number of `compute` is not finite on some rank. The host waits for no GPU.

    Returns:
        1 if nothing was updated, else 0; a scalar on the device.
    """
    skipped = all_reduce_max((~torch.stack(list(numbers.values())).isfinite().all()).float())
    update_weights(session.learner.optimizer, skipped)
    session.learner.model.after_update(settings, skipped)
    return skipped


def _own_rows(kept: Tensor, ranks: Group, images: int) -> Tensor:
    """Return this rank's rows of each view from patches drawn for the global batch."""
    if kept.dim() == 1 or ranks.world == 1:
        return kept
    by_view = kept.view(-1, images * ranks.world, kept.shape[1])
    return by_view[:, ranks.rank * images : (ranks.rank + 1) * images].reshape(-1, kept.shape[1])


def _finish_step(session: Session, progress: _Progress, queued: _QueuedStep) -> bool:
    """Read the numbers of a step, write them, and handle alarms. Return whether the weights were rolled back."""
    if queued.arrived is not None:
        queued.arrived.synchronize()
    rows, alarms = dict(queued.copies), progress.alarms
    numbers = dict(zip(queued.names, rows.pop("numbers").tolist(), strict=True))
    skipped = bool(numbers.pop("skipped"))
    if skipped:
        _report_skipped_step(session, queued.batch, numbers)
    alarms.bad_steps = alarms.bad_steps + 1 if skipped else 0
    if rows:
        line = _describe_step(session, queued, numbers, rows)
        alarms.collapsed_lines = alarms.collapsed_lines + 1 if is_collapsed(line) else 0
        session.journal.write(line)
    if session.journal.is_due(queued.step):
        images_per_second, memory = session.order.batch_size / queued.seconds, memory_bytes(session.ranks.device)
        session.journal.show_progress(queued.step, images_per_second, loss=numbers["total"], memory_bytes=memory)
    return _handle_alarms(session, alarms, step=queued.step)


def _describe_step(
    session: Session, queued: _QueuedStep, numbers: Mapping[str, float], rows: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the journal line of a step."""
    named = {"loss" if name == "total" else name: value for name, value in numbers.items()}
    return {
        "step": queued.step,
        "epoch": queued.batch.epoch,
        **named,
        **collapse_statistics(rows),
        **asdict(queued.settings),
        "time": time.time(),
        "step_seconds": queued.seconds,
        "wait_seconds": queued.wait_seconds,
        "images_per_second": session.order.batch_size / queued.seconds,
        "memory_bytes": memory_bytes(session.ranks.device),
    }


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report_skipped_step(session: Session, batch: Batch, numbers: Mapping[str, float]) -> None:
    """Write the images of a step whose loss or gradient was not finite. It did not change the weights."""
    step, rank = batch.step, session.ranks.rank
    content = {
        "step": step,
        "rank": rank,
        "facts": {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()},
        "images": [session.images.ids[number] for number in batch.images.tolist()],
    }
    folder = session.run / "alarms"
    _log.warning("step %d is skipped: its loss or gradient is not finite", step + 1)
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"step-{step:08d}-rank-{rank}.json", (json.dumps(content, indent=1) + "\n").encode())
    except (OSError, StoreError) as error:
        _log.warning("the images of step %d are not written: %s", step + 1, error)


def _handle_alarms(session: Session, alarms: AlarmCounters, *, step: int) -> bool:
    """Stop, warn, or roll back to the last snapshot, as the recipe says. Return whether it rolled back."""
    on_alarm = session.recipe.watch.on_alarm
    alarm = find_alarm(alarms)
    if alarm is None:
        return False
    if on_alarm == "rollback" and may_roll_back(alarms):
        restored = roll_back(session.learner, session.run, session.ranks)
        if restored is None:
            raise alarm
        # Steps, schedules and images continue after the bad steps.
        alarms.bad_steps, alarms.rollbacks = 0, alarms.rollbacks + 1
        _log.warning("step %d: %s; continuing with the weights of step %d", step, alarm.what, restored)
        return True
    if on_alarm != "warn":
        raise alarm
    _log.warning("step %d: %s", step, alarm.what)
    return False


def _is_due(session: Session, progress: _Progress) -> bool:
    """Whether the current step ends with a snapshot: by the clock, and at the end of an epoch unless epochs are too short."""
    now, step = time.monotonic(), progress.step + 1
    if progress.refused_at is not None and now - progress.refused_at < _RETRY_SECONDS:
        return False
    if now - progress.saved_at >= 60 * session.recipe.run.snapshot_minutes:
        return True
    epoch, remainder = divmod(step, session.order.steps_per_epoch)
    if remainder:
        return False
    keep_every = session.recipe.run.keep_every
    needed = (
        progress.refused_at is not None
        or online_probe.is_due(session.recipe, session.images, epoch)
        or (bool(keep_every) and epoch % keep_every == 0)
    )
    return needed or now - progress.saved_at >= progress.save_seconds / _MOST_SNAPSHOT_SHARE


def _save(session: Session, progress: _Progress, *, last: bool) -> None:
    """Write a snapshot. If the disk refuses, training continues, at most to the end of the next epoch."""
    with session.watchdog.phase(SAVE_SECONDS):
        started = time.monotonic()
        states = all_gather_object(session.ranks, "generators", generator_states(session.ranks.device))
        state = session.learner.state(keep=session.ranks.first)
        write = partial(_try_to_write, session, progress, states, state, last=last)
        written = broadcast_from_rank0(session.ranks, "snapshot", write)
        progress.saved_at = time.monotonic()
        progress.save_seconds = progress.saved_at - started
        if not written and progress.refused_at is None:
            progress.refused_step = progress.step
        progress.refused_at = None if written else progress.saved_at


def _try_to_write(
    session: Session, progress: _Progress, states: Sequence[Mapping[str, Any]], state: LearnerState, *, last: bool
) -> bool:
    recipe, steps_per_epoch = session.recipe, session.order.steps_per_epoch
    snapshot = Snapshot(
        step=progress.step,
        epoch=progress.step // steps_per_epoch,
        model=state.model,
        optimizer=state.optimizer,
        rng=states,
        watched=asdict(progress.alarms),
    )
    facts = {
        "method": recipe.method,
        "architecture": architecture_of(recipe.encoder),
        "steps_an_epoch": steps_per_epoch,
        "epoch_end": progress.step % steps_per_epoch == 0,
        "config_sha256": config_sha256(recipe),
        "data_sha256": data_sha256(session.images),
    }
    try:
        session.journal.sync()
        encoder = evaluated_encoder(state, recipe)
        write_snapshot(session.run, snapshot, encoder, facts=facts, keep_every=recipe.run.keep_every)
    except StoreError as error:
        if last or (progress.refused_at is not None and progress.step >= progress.refused_step + steps_per_epoch):
            raise
        _log.error("training continues without a snapshot of step %d: %s", progress.step, error)
        return False
    except NumericalError:
        if last or recipe.watch.on_alarm == "stop":
            raise
        _log.error("no snapshot: the state after step %d is not finite", progress.step)
        return False
    return True


def _evaluate_if_due(session: Session, progress: _Progress) -> None:
    """Evaluate the newest snapshot on rank 0 if the recipe asks for it; the other ranks wait."""
    epoch = progress.step // session.order.steps_per_epoch
    if not online_probe.is_due(session.recipe, session.images, epoch):
        return
    with session.watchdog.phase(EVALUATION_SECONDS):
        evaluate = partial(online_probe.evaluate, session.run, session.recipe, session.ranks.device)
        text = broadcast_from_rank0(session.ranks, "probe", evaluate)
    if session.ranks.first:
        _log.info("epoch %d: %s", epoch, text)
