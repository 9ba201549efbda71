"""The corridor: checkpoint -> encoder -> features -> protocol -> result."""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.hashing import content_sha256
from msn_eval.data.images import ImageSet
from msn_eval.data.subsets import union_of
from msn_eval.distributed.group import ALONE, Group, broadcast_from_rank0, check_equal_across_ranks
from msn_eval.errors import NumericalError, UsageError
from msn_eval.evaluation.canary import judge_canary, random_labels, refuse_leaks
from msn_eval.evaluation.measurement import Cost, Measurement, id_of, known_result, taps_of
from msn_eval.evaluation.plan import Plan, Task, cache_folder, make_plan
from msn_eval.features.augmented import AugmentedImages
from msn_eval.features.encoder import Encoder, build_encoder, unchanged
from msn_eval.features.extraction import Extraction, Features, Loading, automatic_batch_size, extract_features
from msn_eval.features.patch_drop import PatchDrop, check_drop
from msn_eval.files.atomic import prepare_folder
from msn_eval.probes import Finetune, FittedProbe, fit
from msn_eval.probes.base import describe_collapse, rank_labels
from msn_eval.probes.distributed import WorkerGroup, serve, shutdown
from msn_eval.probes.linear import Linear
from msn_eval.probes.linear_augmented import LinearAugmented, fit_augmented
from msn_eval.probes.training_state import StateFiles, remove_states
from msn_eval.results.record import Predictions, Result, write_result
from msn_eval.version import __version__

_log = logging.getLogger(__name__)
_NOTHING = Extraction(
    features={}, read=0, reused=0, seconds=0.0, decode_seconds=0.0, encode_seconds=0.0, batch_size=1 << 30
)
Progress = Callable[[str, int, int], None]  # what is being done, images done, images in all


_Outcome = tuple[Result, Predictions | None]


def evaluate(
    checkpoints: Sequence[str],
    *,
    data: str,
    subsets: Sequence[str] = ("low-shot",),
    probes: Sequence[str] = ("logistic",),
    out: str | Path = "runs",
    **options: object,
) -> list[Result]:
    """Evaluate checkpoints and give their results, those found in `out` included.

    options: the other fields of Request, such as device="cpu", limit=10, k=[10]
    Raises the children of MsnEvalError; results finished before are kept in `out`. With canary=True nothing is written,
    and NumericalError is raised where random labels are predicted better than by chance.
    """
    from msn_eval.config.yaml_config import read_config

    given = {
        "checkpoint": list(checkpoints),
        "data": str(data),
        "subset": list(subsets),
        "probe": list(probes),
        "out": str(out),
    }
    plan = make_plan(read_config(EvaluationConfig, given=given | options))
    found = (result for name in plan.request.checkpoint for result in evaluate_checkpoint(plan, name))
    results = list({result.id: result for result in found}.values())
    if plan.request.canary:
        refuse_leaks(judge_canary(results))
    return results


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A checkpoint ready to be evaluated under a plan.

    taps:    where this encoder is tapped for each tap that a probe names
    known:   results that the plan's folder already holds
    pending: what is left to measure
    """

    encoder: Encoder
    taps: Mapping[str, str]
    known: tuple[Result, ...]
    pending: tuple[Task, ...]

    @property
    def frozen(self) -> tuple[Task, ...]:
        """Give what is left to measure on features, which all of it shares."""
        return tuple(task for task in self.pending if not isinstance(task.probe, Finetune))

    @property
    def tuned(self) -> tuple[Task, ...]:
        """Give what is left to fine-tune, each from images."""
        return tuple(task for task in self.pending if isinstance(task.probe, Finetune))

    @property
    def pending_taps(self) -> tuple[str, ...]:
        return self.taps_of(self.frozen)

    def taps_of(self, tasks: Iterable[Task]) -> tuple[str, ...]:
        """Give where the encoder is tapped for some tasks, each tap once."""
        return tuple({self.taps[name]: None for task in tasks for name in task.taps})


def prepare(plan: Plan, name: str) -> Preparation:
    """Read one checkpoint and see what is left to measure; failed results are tried again.

    Raises CheckpointError, StoreError, or UsageError for patches to be dropped from what has none.
    """
    request = plan.request
    checkpoint = read_checkpoint(
        name,
        arch=request.arch,
        key=request.checkpoint_key,
        allow_missing=tuple(request.allow_missing),
        seed=request.seed,
    )
    encoder = build_encoder(
        checkpoint,
        device=plan.device,
        precision=plan.precision,
        image_pixels=request.image_pixels,
        compiled=request.compile,
    )
    if (drop := drop_of(request)) is not None:
        check_drop(encoder, drop)
    return _look_for_results(plan, encoder)


def _look_for_results(plan: Plan, encoder: Encoder) -> Preparation:
    """See what is left to measure of one encoder, as the plan's folder is now."""
    request = plan.request
    found = [
        (task, None if request.canary else known_result(Path(request.out), encoder, task, request))
        for task in plan.tasks
    ]
    return Preparation(
        encoder=encoder,
        taps={name: tap for task in plan.tasks for name, tap in taps_of(encoder, task, request).items()},
        known=tuple(result for _, result in found if result is not None),
        pending=tuple(task for task, result in found if result is None),
    )


def evaluate_checkpoint(
    plan: Plan,
    name: str,
    *,
    prepared: Preparation | None = None,
    group: Group = ALONE,
    on_progress: Progress | None = None,
) -> Iterator[Result]:
    """Evaluate one checkpoint under every task of a plan, yielding each result as soon as it is known and written.

    prepared: what `prepare` gave for it, where that was asked before
    group:    ranks that share the extraction; the first alone fits, writes and yields
    Results that the plan's folder already holds are yielded and not computed again; failed ones are tried again.
    Those of a canary are never written, nor looked for.
    Raises CheckpointError, DataError, ResourceError, StoreError or DistributedError; NumericalError becomes a failed result.
    """
    # Another name for the same weights may have been evaluated since they were prepared.
    ready = _look_for_results(plan, prepared.encoder) if prepared is not None else prepare(plan, name)
    encoder, out = ready.encoder, Path(plan.request.out)
    check_equal_across_ranks(group, encoder.checkpoint.name, _shared_facts(plan, encoder))
    if group.rank == 0:
        if not plan.request.canary:
            prepare_folder(out, option="--out")
        _refuse_unsaved(plan, ready)
        yield from ready.known
    # The first rank's look into the result folder is everyone's: it may write there while others still read.
    places = [str(place) for place, task in enumerate(plan.tasks) if task in ready.pending]
    pending = [
        plan.tasks[int(place)] for place in broadcast_from_rank0(group, "pending", lambda: " ".join(places)).split()
    ]
    if not pending:
        _log.info("%s: all %d results are in %s, nothing computed", encoder.checkpoint.name, len(plan.tasks), out)
        return
    for result, predictions in _measure(plan, replace(ready, pending=tuple(pending)), group, on_progress):
        if group.rank == 0:
            if not plan.request.canary:
                write_result(out, result, predictions)
            yield result


def _refuse_unsaved(plan: Plan, ready: Preparation) -> None:
    """Raise UsageError where a network is to be saved that an earlier run has measured and not kept."""
    if plan.request.save is None:
        return
    from msn_eval.checkpoints.hf_export import saved_result
    from msn_eval.evaluation.finetune import saved_folder

    pending = set(map(id, ready.pending))
    for task in plan.tasks:
        if isinstance(task.probe, Finetune) and id(task) not in pending:
            folder, result_id = saved_folder(plan, ready.encoder, task), id_of(ready.encoder, task)
            if saved_result(folder) != result_id:
                raise UsageError(
                    f"--save: {result_id} is measured already in {plan.request.out}, and its network was not kept",
                    where=str(folder),
                    hint="Train it again with another --out.",
                )


def _shared_facts(plan: Plan, encoder: Encoder) -> dict[str, str]:
    """Give what all ranks must have in common for their features to belong together."""
    checkpoint = encoder.checkpoint
    return {
        "package": __version__,
        "torch": torch.__version__,
        "weights": checkpoint.weights_sha256,
        "architecture": encoder.arch,
        "precision": encoder.precision,
        "device": encoder.device.type,
        "validation images": plan.val_sha256,
        "labelled images": content_sha256(tuple(plan.train_hashes), plan.train_hashes),
        "tasks": " ".join(f"{task.protocol_id}@{task.subset.draw}" for task in plan.tasks),
    }


def _measure(plan: Plan, ready: Preparation, group: Group, on_progress: Progress | None) -> Iterator[_Outcome]:
    """Measure what is left: on features first, then whatever changes the encoder."""
    if ready.frozen:
        yield from _measure_frozen(plan, ready, group, on_progress)
    for task in ready.tuned:
        yield from _measure_tuned(plan, ready.encoder, task, group, on_progress)


def _measure_tuned(
    plan: Plan, encoder: Encoder, task: Task, group: Group, on_progress: Progress | None
) -> Iterator[_Outcome]:
    """Fine-tune for one task, all ranks together, and yield on the first."""
    from msn_eval.evaluation.finetune import (  # timm's parts for training, which no other probe needs
        finetune_task,
        states_of,
    )

    started = time.perf_counter()
    result_id = id_of(encoder, task)
    named = _named(on_progress, f"{encoder.checkpoint.name}: fine-tuning on {task.subset.name}@{task.subset.draw}")
    try:
        done = finetune_task(plan, encoder, task, result_id=result_id, group=group, on_progress=named)
    except NumericalError as error:
        if group.rank == 0:
            yield Measurement(plan, encoder, task, Cost(0.0, automatic_batch_size(encoder))).failed(error), None
        return
    if group.rank != 0:
        return
    measurement = Measurement(plan, encoder, task, Cost(0.0, done.part))
    seconds = time.perf_counter() - started
    yield measurement.done(done.setting, done.predictions, done.dim, seconds), done.predictions
    remove_states(states_of(plan, encoder, task, result_id))


def _measure_frozen(plan: Plan, ready: Preparation, group: Group, on_progress: Progress | None) -> Iterator[_Outcome]:
    """Extract the features that the pending tasks need, each image once, and fit and score probe by probe."""
    encoder = ready.encoder
    started = time.perf_counter()
    try:
        with unchanged(encoder):
            pool, test = _both_splits(plan, ready, group, on_progress)
    except NumericalError as error:
        cost = Cost(time.perf_counter() - started, plan.request.batch_images or automatic_batch_size(encoder))
        yield from ((Measurement(plan, encoder, task, cost).failed(error), None) for task in ready.frozen)
        return
    team = WorkerGroup(group=group, device=plan.device) if group.world > 1 else None
    cost = _cost(pool, test, time.perf_counter() - started)
    if group.rank == 0:
        yield from _on_features(plan, ready, pool, test, cost, team)
        if team is not None:  # where this rank failed, the others hear of that instead
            shutdown(team)
    elif team is not None:
        serve(team)
    for measurements, (tap,) in _grouped(plan, ready, cost, augmented=True):
        yield from _on_augmented(measurements, tap, test.features.get(tap), group)


def _on_features(
    plan: Plan, ready: Preparation, pool: Extraction, test: Extraction, cost: Cost, team: WorkerGroup | None
) -> Iterator[_Outcome]:
    """Fit and score every probe that takes cached features."""
    encoder = ready.encoder
    _log.info(
        "%s: features of %d images in %.1f s, %d of them from the cache",
        encoder.checkpoint.name, pool.read + test.read + pool.reused + test.reused, cost.seconds, pool.reused + test.reused,
    )  # fmt: skip
    degenerate = {tap: _told_of_collapse(encoder, tap, pool, test) for tap in test.features}
    for measurements, taps in _grouped(plan, ready, cost, augmented=False):
        known = "; ".join(words for tap in taps if (words := degenerate[tap])) or None
        told = [replace(measurement, degenerate=known) for measurement in measurements]
        yield from _probe(told, [(pool.features[tap], test.features[tap]) for tap in taps], team)


def _told_of_collapse(encoder: Encoder, tap: str, pool: Extraction, test: Extraction) -> str | None:
    """Warn of degenerate features at a tap, and give the words for the record; None where there is nothing to tell."""
    found = []
    for part, split in (("labelled", pool), ("validation", test)):
        if tap in split.features and (told := describe_collapse(split.features[tap].values)):
            _log.warning("%s: tap %s, %s images: %s", encoder.checkpoint.name, tap, part, told)
            found.append(f"{part} images: {told}")
    return "; ".join(found) or None


def _grouped(
    plan: Plan, ready: Preparation, cost: Cost, *, augmented: bool
) -> Iterator[tuple[list[Measurement], tuple[str, ...]]]:
    """Give what each probe has to measure on each draw, and where the encoder is tapped for it."""
    for (_, probe), tasks in groupby(ready.frozen, key=lambda task: (id(task.subset), task.probe)):
        if isinstance(probe, LinearAugmented) == augmented:
            measurements = [Measurement(plan, ready.encoder, task, cost) for task in tasks]
            yield measurements, ready.taps_of([measurements[0].task])


def _cost(pool: Extraction, test: Extraction, seconds: float) -> Cost:
    batch_size = min(pool.batch_size, test.batch_size)
    if not pool.read + test.read:
        return Cost(seconds, batch_size)
    return Cost(
        seconds,
        batch_size,
        images_per_second=round((pool.read + test.read) / (pool.seconds + test.seconds), 2),
        decode_share=round((pool.decode_seconds + test.decode_seconds) / (pool.seconds + test.seconds), 4),
        encode_share=round((pool.encode_seconds + test.encode_seconds) / (pool.seconds + test.seconds), 4),
    )


def _both_splits(
    plan: Plan, ready: Preparation, group: Group, on_progress: Progress | None
) -> tuple[Extraction, Extraction]:
    """Give the features of the labelled images, the union of all draws, and of the validation images."""
    request = plan.request
    labelled_taps = ready.taps_of(_cached(ready.frozen))
    loading = loading_of(request)
    with _shared_cache(plan, group) as cache:
        some_at_a_time = cache is not None and all(isinstance(task.probe, Linear) for task in _cached(ready.pending))
        pool, test = (
            extract_features(
                ready.encoder,
                images,
                taps=taps,
                hashes=hashes,
                loading=replace(loading, beyond_memory=some_at_a_time) if hashes is plan.train_hashes else loading,
                drop=drop,
                cache=cache,
                group=group,
                on_progress=_named(on_progress, f"{ready.encoder.checkpoint.name}: {part}"),
            )
            if taps
            else _NOTHING
            for part, images, taps, hashes, drop in (
                ("labelled images", pending_pool(plan, ready), labelled_taps, plan.train_hashes, drop_of(request)),
                ("validation images", plan.val, ready.pending_taps, plan.val_hashes, None),
            )
        )
    return pool, test


def pending_pool(plan: Plan, ready: Preparation) -> ImageSet:
    """Give the labelled images whose features the pending tasks need, the union of their draws."""
    return union_of(list({id(task.subset): task.subset for task in _cached(ready.frozen)}.values()), plan.train)


def _cached(tasks: Sequence[Task]) -> Iterator[Task]:
    """Give the tasks that take the labelled images' features from the cache."""
    return (task for task in tasks if not isinstance(task.probe, LinearAugmented))


def loading_of(request: EvaluationConfig) -> Loading:
    """Give how a request wants images to come to the encoder."""
    return Loading(decoder=request.decoder, batch_size=request.batch_images, workers=request.worker_count)


def drop_of(request: EvaluationConfig) -> PatchDrop | None:
    """Give what is left out of the labelled images; validation images are always seen whole."""
    return PatchDrop(share=request.patch_drop, seed=request.seed) if request.patch_drop else None


@contextlib.contextmanager
def _shared_cache(plan: Plan, group: Group) -> Iterator[Path | None]:
    """Give the cache folder; with --no-cache none, or, where ranks must hand rows to each other, one for this while."""
    if not plan.request.no_cache:
        yield cache_folder(plan.request)
    elif group.world == 1:
        yield None
    else:
        folder = Path(plan.request.out) / broadcast_from_rank0(group, "folder", _temporary_name)
        try:
            yield folder
        finally:
            if group.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)


def _temporary_name() -> str:
    """Give a name by which a later run knows what a killed one has left."""
    return f".features.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _named(on_progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(what, done, total)


def _probe(
    measurements: Sequence[Measurement], splits: Sequence[tuple[Features, Features]], team: WorkerGroup | None
) -> Iterator[_Outcome]:
    """Fit one probe to one draw and score its pending settings.

    splits: the labelled and the validation images' features, at each tap that the probe is given
    """
    first = measurements[0]
    probe, drawn = first.task.probe, first.task.subset.image_ids
    assert not isinstance(probe, LinearAugmented | Finetune)
    pairs = [_labels_of(first, pool.only(drawn), test) for pool, test in splits]
    labelled, *elsewhere = (pool for pool, _ in pairs)
    make = partial(fit, probe, labelled, first.plan.device, team=team, elsewhere=elsewhere)
    yield from _scored(measurements, make, [test for _, test in pairs])


def _on_augmented(
    measurements: Sequence[Measurement], tap: str, test: Features | None, group: Group
) -> Iterator[_Outcome]:
    """Train layers on augmented images of one draw, all ranks together, and score the pending ones on the first."""
    first = measurements[0]
    plan, encoder, probe = first.plan, first.encoder, first.task.probe
    assert isinstance(probe, LinearAugmented)
    drawn = plan.train.only(first.task.subset.image_ids)
    nothing = _unseen(plan.val.only([]), tap)
    labelled, scored = _labels_of(first, _unseen(drawn, tap), nothing if test is None else test)
    images = AugmentedImages(
        images=drawn,
        labels=labelled.labels,
        hashes=plan.train_hashes,
        encoder=encoder,
        tap=tap,
        loading=loading_of(plan.request),
    )
    files = None
    if not plan.request.canary:
        shared = _shared_facts(plan, encoder) | {"tap": tap, "transform": str(encoder.transform)}
        files = StateFiles(
            out=Path(plan.request.out), facts=shared | {"probe": str(probe), "draw": first.task.split_sha256}
        )

    def make() -> FittedProbe:
        with unchanged(encoder):
            return fit_augmented(probe, images, group=group, files=files)

    if group.rank != 0:
        with contextlib.suppress(NumericalError):  # which the first rank meets as well, and records
            make()
        return
    yield from _scored(measurements, make, [scored])  # each result is written before the next is asked for
    if files is not None:
        remove_states(files)


def _unseen(images: ImageSet, tap: str) -> Features:
    """Give images with their labels where their features are not wanted."""
    return Features(
        values=torch.empty(len(images), 0),
        labels=torch.tensor(images.labels, dtype=torch.int64),
        image_ids=images.ids,
        n_classes=len(images.classes),
        tap=tap,
    )


def _labels_of(measurement: Measurement, labelled: Features, test: Features) -> tuple[Features, Features]:
    """Give both splits with their own labels, or for a canary with random ones."""
    plan = measurement.plan
    if not plan.request.canary:
        return labelled, test
    return random_labels(
        labelled, test, seed=plan.request.seed, train_hashes=plan.train_hashes, val_hashes=plan.val_hashes
    )


def _scored(
    measurements: Sequence[Measurement], make: Callable[[], FittedProbe], offered: Sequence[Features]
) -> Iterator[_Outcome]:
    """Fit, and score the settings that are pending.

    offered: the validation images' features, at each tap that the probe was given
    """
    open_ones = {str(one.task.params): one for one in measurements}
    started = time.perf_counter()
    try:
        fitted = make()
        fit_seconds = time.perf_counter() - started
        (test,) = (features for features in offered if fitted.tap in (None, features.tap))
        scored = time.perf_counter()
        for setting, scores in zip(fitted.settings, fitted.scores(test.values), strict=True):
            params = str(dict(setting.params))
            if params not in open_ones:  # finished by an earlier run
                continue
            prediction, rank = rank_labels(scores, test.labels)
            seconds = fit_seconds + time.perf_counter() - scored
            predictions = Predictions(
                image=np.array([os.fsencode(image_id) for image_id in test.image_ids]),
                label=test.labels.numpy(),
                prediction=prediction.numpy(),
                rank_of_label=rank.numpy(),
            )
            yield open_ones.pop(params).done(setting, predictions, test.values.shape[1], seconds), predictions
            scored = time.perf_counter()
        for params_of, reason in fitted.failures:
            if str(dict(params_of)) in open_ones:
                yield open_ones.pop(str(dict(params_of))).failed(reason), None
    except NumericalError as error:
        yield from ((measurement.failed(error), None) for measurement in open_ones.values())
