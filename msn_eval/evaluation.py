"""The corridor: checkpoint -> encoder -> features -> protocol -> result."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import numpy as np

from msn_eval.atomic_file import prepare_folder
from msn_eval.checkpoint import Checkpoint, read_checkpoint
from msn_eval.encoder import Encoder, build_encoder, resolve_tap, unchanged
from msn_eval.environment import describe_environment
from msn_eval.errors import NumericalError, StoreError
from msn_eval.features import Features, automatic_batch_size, extract_features
from msn_eval.images import decoder_version
from msn_eval.metrics import measure
from msn_eval.plan import Plan, Task, make_plan
from msn_eval.protocols import Setting, fit
from msn_eval.ranking import rank_labels
from msn_eval.request import Request
from msn_eval.result import (
    CheckpointFacts,
    DataFacts,
    FeatureFacts,
    Predictions,
    ProbeFacts,
    Result,
    SplitFacts,
    Status,
    TimingFacts,
    TransformFacts,
    read_result,
    result_id,
    write_result,
)
from msn_eval.subset import union_of

_log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what is being done, images done, images in all


@dataclass(frozen=True)
class _Measurement:
    """One task about to become a result."""

    plan: Plan
    encoder: Encoder
    task: Task
    batch_size: int
    extract_seconds: float

    def done(self, setting: Setting, predictions: Predictions, dim: int, probe_seconds: float) -> Result:
        status: Status = "not_converged" if setting.converged is False else "ok"
        result = self._result(setting, dim, probe_seconds)
        return replace(
            result,
            status=status,
            error=None,
            metrics=measure(predictions.rank_of_label),
            predictions=f"{result.id}.npz",
        )

    def failed(self, error: NumericalError) -> Result:
        return replace(self._result(Setting(params=self.task.params), None, 0.0), error=str(error))

    def _result(self, setting: Setting, dim: int | None, probe_seconds: float) -> Result:
        plan, task, encoder = self.plan, self.task, self.encoder
        return Result(
            id=_result_id(encoder, task),
            status="failed",
            error=None,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            protocol_id=task.protocol_id,
            protocol=task.protocol,
            checkpoint=_checkpoint_facts(encoder.checkpoint),
            data=DataFacts(
                name=plan.data_name,
                sha256=plan.val_sha256,
                class_map_sha256=plan.classes_sha256,
                classes=len(plan.val.classes),
                val_images=len(plan.val),
                skipped=len(plan.skipped(task.subset)),
            ),
            split=SplitFacts(
                subset=task.subset.name,
                draw=task.subset.draw,
                images=len(task.subset),
                sha256=task.split_sha256,
            ),
            features=_feature_facts(encoder, _tap(encoder, task, plan.request), dim),
            probe=ProbeFacts(
                name=task.probe.name,
                version=task.probe.version,
                params=dict(setting.params),
                solver=setting.solver,
                converged=setting.converged,
                certificate=setting.certificate,
                objective=setting.objective,
                iterations=setting.iterations,
            ),
            metrics=None,
            timing_s=TimingFacts(
                extract=round(self.extract_seconds, 4),
                probe=round(probe_seconds, 4),
                total=round(self.extract_seconds + probe_seconds, 4),
            ),
            environment=describe_environment(plan.device, batch_size=self.batch_size, seed=plan.request.seed),
            predictions=None,
        )


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
    Raises the children of MsnEvalError; results finished before are kept in `out`.
    """
    from msn_eval.config import read_config

    given = {
        "checkpoint": list(checkpoints),
        "data": str(data),
        "subset": list(subsets),
        "probe": list(probes),
        "out": str(out),
    }
    plan = make_plan(read_config(Request, given=given | options))
    found = (result for name in plan.request.checkpoint for result in evaluate_checkpoint(plan, name))
    return list({result.id: result for result in found}.values())


def evaluate_checkpoint(plan: Plan, name: str, *, on_progress: Progress | None = None) -> Iterator[Result]:
    """Evaluate one checkpoint under every task of a plan, yielding each result as soon as it is known and written.

    Results that the plan's folder already holds are yielded and not computed again; failed ones are tried again.
    Raises CheckpointError, DataError, ResourceError or StoreError; NumericalError becomes a failed result.
    """
    request = plan.request
    checkpoint = read_checkpoint(
        name,
        arch=request.arch,
        key=request.checkpoint_key,
        allow_missing=tuple(request.allow_missing),
        seed=request.seed,
    )
    encoder = build_encoder(checkpoint, device=plan.device, precision=plan.precision, image_pixels=request.image_pixels)
    taps = {task.probe.tap: _tap(encoder, task, request) for task in plan.tasks}
    out = Path(request.out)
    prepare_folder(out, option="--out")
    pending: list[Task] = []
    for task in plan.tasks:
        known = _known_result(out, encoder, task, request)
        if known is None:
            pending.append(task)
        else:
            yield known
    if not pending:
        _log.info("%s: all %d results are in %s, nothing computed", checkpoint.name, len(plan.tasks), out)
        return
    for result, predictions in _measure(plan, encoder, taps, pending, on_progress):
        write_result(out, result, predictions)
        yield result


def _measure(
    plan: Plan, encoder: Encoder, taps: Mapping[str, str], pending: Sequence[Task], on_progress: Progress | None
) -> Iterator[_Outcome]:
    """Extract the features that the pending tasks need, each image once, and fit and score probe by probe."""
    batch_size = plan.request.batch_images or automatic_batch_size(encoder)
    started = time.perf_counter()

    def measurement(task: Task) -> _Measurement:
        return _Measurement(plan, encoder, task, batch_size, extract_seconds)

    try:
        with unchanged(encoder):
            pool, test = _both_splits(plan, encoder, taps, pending, batch_size, on_progress)
    except NumericalError as error:
        extract_seconds = time.perf_counter() - started
        yield from ((measurement(task).failed(error), None) for task in pending)
        return
    extract_seconds = time.perf_counter() - started
    images_read = len(next(iter(pool.values())).labels) + len(plan.val)
    _log.info("%s: features of %d images in %.1f s", encoder.checkpoint.name, images_read, extract_seconds)
    for _, tasks in groupby(pending, key=lambda task: (id(task.subset), task.probe)):
        measurements = [measurement(task) for task in tasks]
        tap = taps[measurements[0].task.probe.tap]
        yield from _probe(measurements, pool[tap], test[tap])


def _both_splits(
    plan: Plan,
    encoder: Encoder,
    taps: Mapping[str, str],
    pending: Sequence[Task],
    batch_size: int,
    on_progress: Progress | None,
) -> tuple[dict[str, Features], dict[str, Features]]:
    """Give the features of the labelled images, the union of all draws, and of the validation images, by tap."""
    subsets = list({id(task.subset): task.subset for task in pending}.values())
    pool, test = (
        extract_features(
            encoder,
            images,
            taps=tuple({taps[task.probe.tap]: None for task in pending}),
            hashes=hashes,
            batch_size=batch_size,
            workers=plan.request.worker_count,
            on_progress=_images_done(on_progress, f"{encoder.checkpoint.name}: {part}", len(images)),
        )
        for part, images, hashes in (
            ("labelled images", union_of(subsets, plan.train), plan.train_hashes),
            ("validation images", plan.val, plan.val_hashes),
        )
    )
    return pool, test


def _tap(encoder: Encoder, task: Task, request: Request) -> str:
    return resolve_tap(encoder, request.tap or task.probe.tap, by_hand=request.tap is not None)


def _images_done(on_progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    if on_progress is None:
        return None
    done = 0

    def add(images: int) -> None:
        nonlocal done
        done += images
        on_progress(what, done, total)

    return add


def _probe(measurements: Sequence[_Measurement], pool: Features, test: Features) -> Iterator[_Outcome]:
    """Fit one probe to one draw and score its pending settings."""
    first = measurements[0]
    open_ones = {str(one.task.params): one for one in measurements}
    started = time.perf_counter()
    try:
        fitted = fit(first.task.probe, pool.only(first.task.subset.image_ids), first.plan.device)
        fit_seconds = time.perf_counter() - started
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
            yield open_ones.pop(params).done(setting, predictions, pool.values.shape[1], seconds), predictions
            scored = time.perf_counter()
    except NumericalError as error:
        yield from ((measurement.failed(error), None) for measurement in open_ones.values())


def _result_id(encoder: Encoder, task: Task) -> str:
    return result_id(
        weights_sha256=encoder.checkpoint.weights_sha256,
        key=encoder.checkpoint.key,
        protocol_id=task.protocol_id,
        draw=task.subset.draw,
    )


def _known_result(out: Path, encoder: Encoder, task: Task, request: Request) -> Result | None:
    """Give the finished result of a task from an earlier run, or None.

    Raises StoreError where the folder holds a result of the same id that was made with other labelled images, or by
    another network or transform from the same weights: the id leaves these out, and they must not pass for each other.
    """
    path = out / f"{_result_id(encoder, task)}.json"
    if not path.exists():
        return None
    known = read_result(path)
    if known.status == "failed":
        return None
    if known.split.sha256 != task.split_sha256:
        raise StoreError(
            f"holds a result of {known.split.subset}@{known.split.draw} with other labelled images than the data set gives now",
            where=str(path),
            remedy="The training images changed since: use another --out folder, or restore them.",
        )
    facts = _feature_facts(encoder, _tap(encoder, task, request), known.features.dim)
    # The versions of a decoder and bf16 against fp16 may differ between comparable results.
    same = replace(known.features, decoder=facts.decoder, precision=facts.precision)
    if same != facts or known.checkpoint.arch != encoder.arch:
        raise StoreError(
            f"holds a result of the same weights read as {known.checkpoint.arch} with {known.features.transform}; "
            f"now they are read as {encoder.arch} with {facts.transform}",
            where=str(path),
            remedy="Use another --out folder for this reading.",
        )
    if request.solver not in ("auto", known.probe.solver) and known.probe.name == "logistic":
        _log.warning(
            "%s was solved by %s before and is kept; use another --out for %s", path, known.probe.solver, request.solver
        )
    return known


def _feature_facts(encoder: Encoder, tap: str, dim: int | None) -> FeatureFacts:
    transform = encoder.transform
    return FeatureFacts(
        tap=tap,
        dim=dim,
        precision=encoder.precision,
        decoder=decoder_version("pillow"),
        transform=TransformFacts(**vars(transform)),
    )


def _checkpoint_facts(checkpoint: Checkpoint) -> CheckpointFacts:
    return CheckpointFacts(
        name=checkpoint.name,
        path=checkpoint.path,
        sha256=checkpoint.sha256,
        weights_sha256=checkpoint.weights_sha256,
        format=checkpoint.format,
        key=checkpoint.key,
        arch=checkpoint.arch,
        params=checkpoint.params,
        matched=checkpoint.matched,
        epoch=checkpoint.epoch,
    )
