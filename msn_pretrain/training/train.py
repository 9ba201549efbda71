"""Train: the loop, top to bottom."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageSet
from msn_eval.distributed.collective import any_of, average_gradients, check_replicas
from msn_eval.distributed.group import Group as Ranks
from msn_eval.distributed.group import all_gather_object, broadcast_from_rank0, check_equal_across_ranks
from msn_eval.errors import NumericalError, StoreError
from msn_eval.process import StopRequest, watch_stop_signals
from msn_pretrain.config.recipe import architecture_of
from msn_pretrain.config.schedule import StepSettings, settings_at
from msn_pretrain.data.sampler import Order, seed_at
from msn_pretrain.data.view_loader import ViewBatch, ViewList, load_views, normalised
from msn_pretrain.methods.msn import Step
from msn_pretrain.training import online_probe as probe
from msn_pretrain.training.gradients import compute_gradients, norm_of
from msn_pretrain.training.journal import (
    Journal,
    Watched,
    after_line,
    after_rollback,
    after_step,
    dump_batch,
    may_roll_back,
    open_journal,
    raised,
)
from msn_pretrain.training.optimizer import set_for_step
from msn_pretrain.training.run import (
    Learner,
    Recipe,
    autocast_of,
    build_learner,
    config_sha256,
    data_sha256,
    evaluated_encoder,
    locked,
    makes_views_on_device,
    open_run,
    resume,
    roll_back,
    shared_facts,
    training_images,
    view_kinds,
)
from msn_pretrain.training.snapshot import Snapshot, generator_states, seed_generators, write_snapshot
from msn_pretrain.training.watchdog import Watchdog, watching

_log = logging.getLogger(__name__)
_MASKS, _RANKS = 1, 2  # what a seed is for
_RETRY_SECONDS = 60.0  # after the disk refused a snapshot
_MOST_SNAPSHOT_SHARE = 0.1  # of the time, for those at the ends of epochs


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a run trains with, from its first step to its last."""

    recipe: Recipe
    ranks: Ranks
    run: Path
    images: ImageSet
    order: Order
    steps: int
    learner: Learner
    journal: Journal
    dog: Watchdog


@dataclass(kw_only=True)
class _Progress:
    """Where a run stands: what changes from step to step besides the learner."""

    step: int
    watched: Watched
    saved_at: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0
    refused_at: float | None = None  # when the disk first refused a snapshot, until one was written
    refused_step: int = 0


def train(recipe: Recipe, ranks: Ranks, *, allowed: Sequence[str] = (), quiet: bool = False) -> int:
    """Train a recipe in its folder from where that stands, to its end; give 0, or 75 or 130 where it was told to stop.

    allowed: keys of the recipe that may differ from those that the folder was trained with
    Raises the children of MsnEvalError; the last snapshot is kept.
    """
    run = Path(recipe.run.dir)
    with ExitStack() as opened:
        images = broadcast_from_rank0(ranks, "images", lambda: training_images(recipe))
        order = Order(
            n_images=len(images),
            batch_size=recipe.optimization.batch_size,
            seed=recipe.run.seed,
            rank=ranks.rank,
            world=ranks.world,
        )
        learner = build_learner(recipe, ranks.device)
        check_equal_across_ranks(ranks, "the run", shared_facts(recipe, images, learner))
        run.mkdir(parents=True, exist_ok=True)
        broadcast_from_rank0(ranks, "lock", lambda: opened.enter_context(locked(run)))
        folder = broadcast_from_rank0(ranks, "folder", lambda: open_run(recipe, images, allowed=allowed))
        seed_generators(seed_at(_RANKS, ranks.rank, seed=recipe.run.seed))
        snapshot = resume(learner, folder, ranks)
        progress = _Progress(step=0, watched=Watched())
        if snapshot is not None:
            progress = _Progress(step=snapshot.step, watched=Watched(**snapshot.watched))
        steps = recipe.optimization.epochs * order.steps_an_epoch
        journal = open_journal(run, first=ranks.first, step=progress.step, steps=steps, quiet=quiet)
        session = Session(
            recipe=recipe,
            ranks=ranks,
            run=run,
            images=images,
            order=order,
            steps=steps,
            learner=learner,
            journal=opened.enter_context(journal),
            dog=opened.enter_context(watching()),
        )
        with watch_stop_signals() as stop:  # until here there is nothing to save, and being told to stop ends at once
            return _go_through(session, progress, stop)


def _go_through(session: Session, progress: _Progress, stop: StopRequest) -> int:
    """Do the steps that are left."""
    recipe, ranks, an_epoch = session.recipe, session.ranks, session.order.steps_an_epoch
    if progress.step and progress.step % an_epoch == 0:
        _probe(session, progress)  # a kill may have come between the snapshot and this
    wanted = ViewList(
        images=session.images,
        kinds=view_kinds(recipe),
        seed=recipe.run.seed,
        batched=makes_views_on_device(recipe, ranks.device),
        device=ranks.device,
    )
    ended = time.monotonic()
    workers = recipe.data.workers
    for batch in load_views(wanted, session.order, first_step=progress.step, steps=session.steps, workers=workers):
        waited = time.monotonic() - ended
        settings = settings_at(recipe, step=progress.step, steps_per_epoch=an_epoch)
        step, norms, finite = compute(session, batch, settings)
        stopping, unsound, due = any_of(ranks, stop.requested, not finite, ranks.first and _is_due(session, progress))
        if unsound:
            _leave_out(session, batch, norms | {"total": float(step.total.detach())})
        else:
            session.learner.optimizer.step()
            session.learner.model.after_update(settings)
        progress.step += 1
        progress.watched = after_step(progress.watched, finite=not unsound)
        if progress.step % recipe.run.log_every == 0 or progress.step == session.steps:
            facts = _facts(progress, an_epoch, step, settings) | norms
            progress.watched = after_line(progress.watched, facts)
            session.journal.write(facts | _timing(session, waited=waited, seconds=time.monotonic() - ended))
        _show(session, progress, step, seconds=time.monotonic() - ended)
        session.dog.step_done()
        rolled_back = _heed_alarms(session, progress)
        saving = stopping or due or rolled_back or progress.step == session.steps
        compare_every = recipe.run.compare_every
        if saving or (compare_every and progress.step % compare_every == 0):
            check_replicas(ranks, session.learner.model.state_dict(), step=progress.step)
        if saving:
            _save(session, progress, last=stopping or progress.step == session.steps)
        if progress.step % an_epoch == 0:
            _probe(session, progress)
        if stopping:
            return max(all_gather_object(ranks, "exit code", stop.accept()))
        ended = time.monotonic()
    return 0


def compute(session: Session, batch: ViewBatch, settings: StepSettings) -> tuple[Step, dict[str, float], bool]:
    """Compute a step's loss and gradients, averaged and clipped; give it, the norms, and whether all is finite."""
    recipe, ranks, model, optimizer = session.recipe, session.ranks, session.learner.model, session.learner.optimizer
    set_for_step(optimizer, settings)
    optimizer.zero_grad(set_to_none=True)
    images = len(batch.batch.images)
    views = [
        view for kind in batch.views for view in torch.split(normalised(kind, IMAGENET_MEAN, IMAGENET_STD), images)
    ]
    generator = torch.Generator().manual_seed(seed_at(_MASKS, batch.batch.step, seed=recipe.run.seed))
    kept = model.draw_kept(generator, images=images * ranks.world)
    step = compute_gradients(
        model,
        views,
        None if kept is None else _own_rows(kept, ranks, images).to(ranks.device),
        sharpening=settings.sharpening,
        micro_batch=recipe.run.micro_batch,
        autocast=autocast_of(recipe, ranks.device),
    )
    parameters = [one for one in model.parameters() if one.requires_grad]
    average_gradients(ranks, parameters)
    clipped = [one for one in model.clipped_parameters() if one.requires_grad]
    limited = {id(one) for one in clipped}
    norm, rest = norm_of(clipped), norm_of([one for one in parameters if id(one) not in limited])
    if recipe.optimization.clip:
        torch.nn.utils.clip_grads_with_norm_(clipped, recipe.optimization.clip, norm)
    finite = bool(torch.stack([step.total.detach(), norm, rest.to(norm.device)]).isfinite().all())
    return step, {"gradient_norm": float(norm), "prototype_gradient_norm": float(rest)}, finite


def _own_rows(kept: Tensor, ranks: Ranks, images: int) -> Tensor:
    """Give this rank's rows of each view, of patches that were drawn for the global batch."""
    if kept.dim() == 1 or ranks.world == 1:
        return kept
    by_view = kept.view(-1, images * ranks.world, kept.shape[1])
    return by_view[:, ranks.rank * images : (ranks.rank + 1) * images].reshape(-1, kept.shape[1])


def _facts(progress: _Progress, an_epoch: int, step: Step, settings: StepSettings) -> dict[str, Any]:
    """Give what a line of the journal says of a step; every rank must ask."""
    return {
        "step": progress.step,
        "epoch": (progress.step - 1) // an_epoch,
        **{("loss" if name == "total" else name): float(value) for name, value in step.parts.items()},
        **step.statistics(),
        **asdict(settings),
    }


def _timing(session: Session, *, waited: float, seconds: float) -> dict[str, float]:
    return {
        "time": time.time(),
        "step_seconds": seconds,
        "wait_seconds": waited,
        "images_per_second": session.order.batch_size / seconds,
        "memory_bytes": memory_bytes(session.ranks.device),
    }


def memory_bytes(device: torch.device) -> int:
    """Give the most memory that was in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _show(session: Session, progress: _Progress, step: Step, *, seconds: float) -> None:
    if session.journal.show is not None:
        session.journal.progress(
            step=progress.step,
            images_per_second=session.order.batch_size / seconds,
            loss=float(step.total.detach()),
            memory_bytes=memory_bytes(session.ranks.device),
        )


def _leave_out(session: Session, batch: ViewBatch, facts: Mapping[str, float]) -> None:
    """Change no weights by a step that is not finite, and write down what it saw."""
    ids = [session.images.ids[number] for number in batch.batch.images.tolist()]
    dump_batch(session.run, step=batch.batch.step, rank=session.ranks.rank, image_ids=ids, facts=facts)
    _log.warning("step %d was left out: its loss or gradient is not finite", batch.batch.step + 1)


def _heed_alarms(session: Session, progress: _Progress) -> bool:
    """Stop, warn, or go back to the last snapshot, as the recipe says; tell whether it went back."""
    alarm = raised(progress.watched)
    if alarm is None:
        return False
    on_alarm = session.recipe.watch.on_alarm
    if on_alarm == "rollback" and may_roll_back(progress.watched):
        return _roll_back(session, progress, alarm)
    if on_alarm != "warn":
        raise alarm
    _log.warning("step %d: %s", progress.step, alarm.what)
    return False


def _roll_back(session: Session, progress: _Progress, alarm: NumericalError) -> bool:
    """Take the weights and the optimiser of the newest snapshot; steps, rates and images go on behind those that were bad."""
    step = roll_back(session.learner, session.run, session.ranks)
    if step is None:
        raise alarm
    progress.watched = after_rollback(progress.watched)
    _log.warning("step %d: %s; going on with the weights of step %d", progress.step, alarm.what, step)
    return True


def _is_due(session: Session, progress: _Progress) -> bool:
    """Tell whether the step at hand ends with a snapshot: by the clock, and at the ends of epochs that are not too short."""
    now, step = time.monotonic(), progress.step + 1
    if progress.refused_at is not None and now - progress.refused_at < _RETRY_SECONDS:
        return False
    if now - progress.saved_at >= 60 * session.recipe.run.snapshot_minutes:
        return True
    epoch, left = divmod(step, session.order.steps_an_epoch)
    if left:
        return False
    keep_every = session.recipe.run.keep_every
    wanted = probe.is_due(session.recipe, epoch) or (bool(keep_every) and epoch % keep_every == 0)
    return wanted or now - progress.saved_at >= progress.save_seconds / _MOST_SNAPSHOT_SHARE


def _save(session: Session, progress: _Progress, *, last: bool) -> None:
    """Write a snapshot. A disk that refuses is told, and training goes on: to the end of the next epoch at most."""
    with session.dog.paused():
        started = time.monotonic()
        states = all_gather_object(session.ranks, "generators", generator_states(session.ranks.device))
        written = broadcast_from_rank0(
            session.ranks, "snapshot", lambda: _is_written(session, progress, states, last=last)
        )
        progress.saved_at = time.monotonic()
        progress.save_seconds = progress.saved_at - started
        if written:
            progress.refused_at = None
        elif progress.refused_at is None:
            progress.refused_at, progress.refused_step = progress.saved_at, progress.step
        else:
            progress.refused_at = progress.saved_at


def _is_written(session: Session, progress: _Progress, states: Sequence[Mapping[str, Any]], *, last: bool) -> bool:
    recipe, learner, an_epoch = session.recipe, session.learner, session.order.steps_an_epoch
    model, optimizer = learner.state()
    snapshot = Snapshot(
        step=progress.step,
        epoch=progress.step // an_epoch,
        model=model,
        optimizer=optimizer,
        rng=tuple(states),
        watched=asdict(progress.watched),
    )
    facts = {
        "method": recipe.method,
        "architecture": architecture_of(recipe.encoder),
        "steps_an_epoch": an_epoch,
        "epoch_end": progress.step % an_epoch == 0,
        "config_sha256": config_sha256(recipe),
        "data_sha256": data_sha256(session.images),
    }
    try:
        session.journal.sync()
        write_snapshot(
            session.run,
            snapshot,
            evaluated_encoder(learner, recipe),
            facts=facts,
            keep_every=recipe.run.keep_every,
        )
    except StoreError as error:
        if last or (progress.refused_at is not None and progress.step >= progress.refused_step + an_epoch):
            raise
        _log.error("training goes on without a snapshot of step %d: %s", progress.step, error)
        return False
    except NumericalError:
        if last or recipe.watch.on_alarm == "stop":
            raise
        _log.error("the state after step %d is not finite: no snapshot", progress.step)
        return False
    return True


def _probe(session: Session, progress: _Progress) -> None:
    """Measure the encoder where that is due and its snapshot stands; the other ranks wait."""
    epoch = progress.step // session.order.steps_an_epoch
    if not probe.is_due(session.recipe, epoch):
        return
    with session.dog.paused():
        text = broadcast_from_rank0(
            session.ranks,
            "probe",
            lambda: probe.describe(probe.measure(session.run, session.recipe, session.ranks.device)),
        )
    if session.ranks.first:
        _log.info("epoch %d: %s", epoch, text)
