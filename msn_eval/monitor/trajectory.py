"""Trajectory: a pre-training run with its journal and its snapshots, measured like any other checkpoint.

run folder -> snapshots -> records and feature statistics in RUN/eval -> trajectory -> plot and page
"""

import logging
import math
import os
import secrets
import socket
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msn_eval.checkpoints import run_folder
from msn_eval.checkpoints.run_folder import SnapshotFiles
from msn_eval.errors import CheckpointError, NumericalError, UsageError, format_count
from msn_eval.evaluation.evaluate import Preparation, evaluate_checkpoint, make_loading, prepare
from msn_eval.evaluation.plan import Plan
from msn_eval.features.encoder import precision_class, resolve_tap
from msn_eval.features.extraction import extract_features
from msn_eval.files.atomic import prepare_folder, remove
from msn_eval.monitor import snapshot_features
from msn_eval.monitor.alarms import Alarm, JournalLine, find_alarms, is_not_finite
from msn_eval.monitor.snapshot_features import ExtractionSettings, SnapshotFeatures
from msn_eval.results.folder import ResultScan, scan_results
from msn_eval.results.record import Result

_log = logging.getLogger(__name__)
_TAP = "cls-norm"
_MOST_LISTED = 3
_LARGEST_NUMBER = 1e300
_FIRST_EPOCHS = 0.05  # of all epochs: how long a loss may stay where every run begins


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run's configuration says; None for what it does not say.

    Attributes:
        name: Of the run folder.
        method: Pre-training method.
        data: Data set that the run itself probes with.
        subset: Subset that the run itself probes with.
        epochs: Of the complete run.
        warmup_epochs: Of the learning rate.
        prototypes: k, None if the method has none.
    """

    name: str
    method: str
    data: str | None
    subset: str | None
    epochs: int | None
    warmup_epochs: float
    prototypes: int | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured snapshot.

    Attributes:
        step: Finished steps.
        epoch: Finished epochs.
        features: Statistics of its features, None if only its scores are known.
        results: Records of its draws and probes.
    """

    step: int
    epoch: int
    features: SnapshotFeatures | None
    results: tuple[Result, ...]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A run up to its newest step.

    Attributes:
        run: Its configuration.
        steps_per_epoch: None if no snapshot has it.
        lines: Of the journal, by step.
        points: Measured snapshots, by step.
        alarms: Past and present ones.
        notices: What else a reader must know.
        faults: Names of records and statistics that cannot be used, each with the reason.
    """

    run: RunInfo
    steps_per_epoch: int | None
    lines: tuple[JournalLine, ...]
    points: tuple[Point, ...]
    alarms: tuple[Alarm, ...]
    notices: tuple[str, ...]
    faults: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The last known step."""
        logged = [int(line["step"] or 0) for line in self.lines[-1:]]
        return max([*logged, *(point.step for point in self.points[-1:])], default=0)

    @property
    def steps(self) -> int | None:
        """Steps of the complete run."""
        if self.run.epochs is None or self.steps_per_epoch is None:
            return None
        return self.run.epochs * self.steps_per_epoch


def read_run_info(folder: Path) -> RunInfo:
    """Read the configuration in a run folder. Raises CheckpointError if it is not one."""
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=str(folder), hint="Pass the run.dir of an msn-pretrain run.")
    if not run_folder.is_run_folder(folder):
        what = f"is not a run folder of msn-pretrain: it has no {run_folder.CONFIG} beside a folder of checkpoints"
        hint = "Pass the run.dir of a run; evaluate other checkpoints with msn-eval --checkpoint."
        raise CheckpointError(what, where=str(folder), hint=hint)
    import yaml

    def value(section: str, key: str) -> Any:
        return (content.get(section) or {}).get(key)

    try:
        content = yaml.safe_load((folder / run_folder.CONFIG).read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it is not a mapping")
        return RunInfo(
            name=folder.resolve().name,
            method=str(content.get("method", "")),
            data=value("watch", "probe_data") or value("data", "root"),
            subset=value("watch", "subset"),
            epochs=value("optimization", "epochs"),
            warmup_epochs=float(value("optimization", "warmup") or 0.0),
            prototypes=value("criterion", "prototypes"),
        )
    except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        what = f"cannot be read as the configuration of a run: {' '.join(str(error).split())}"
        raise CheckpointError(what, where=str(folder / run_folder.CONFIG), hint="Restore it.") from error


def fingerprint_run(folder: Path) -> tuple[object, ...]:
    """Return a value that changes whenever the run writes to its journal or finishes a snapshot."""
    journal = folder / run_folder.METRICS
    status = journal.stat() if journal.exists() else None
    encoders = (snapshot.files[run_folder.ENCODER] for snapshot in _list_finished(folder))
    return status and (status.st_size, status.st_mtime_ns), *encoders


def list_unscored(plan: Plan, folder: Path, trajectory: Trajectory, skipped: Collection[str]) -> list[SnapshotFiles]:
    """Return the finished snapshots without statistics or with missing records, the oldest first: they are removed next.

    Args:
        plan: What is measured of every snapshot.
        folder: Of the run.
        trajectory: What is measured already.
        skipped: SHA-256 of encoders that are not to be tried again.
    """
    wanted = {(task.protocol_id, task.subset.draw) for task in plan.tasks}
    done = set(skipped)
    for point in trajectory.points:
        measured = {(result.protocol_id, result.split.draw) for result in point.results}
        if point.features is not None and wanted <= measured:
            done.add(point.features.sha256)
    return [snapshot for snapshot in reversed(_list_finished(folder)) if snapshot.files[run_folder.ENCODER] not in done]


def find_damaged(folder: Path) -> dict[str, tuple[int, CheckpointError]]:
    """Return step and error of the snapshots with a damaged manifest, by folder. A manifest is complete when it appears."""
    damaged = {}
    for snapshot in run_folder.snapshot_folders(folder):
        try:
            run_folder.read_manifest(snapshot)
        except ValueError as error:
            reason = CheckpointError(
                str(error), where=str(snapshot), hint="It is skipped; the other snapshots are scored."
            )
            damaged[snapshot.name] = int(snapshot.name.partition("-")[2]), reason
        except OSError:
            continue  # it is being written, or removed
    return damaged


def _list_finished(folder: Path) -> list[SnapshotFiles]:
    """Return the snapshots with a manifest, the newest first; one without is being written, or removed."""
    manifests = map(_read_manifest, run_folder.snapshot_folders(folder))
    return [snapshot for snapshot in manifests if snapshot is not None]


def _read_manifest(folder: Path) -> SnapshotFiles | None:
    try:
        return run_folder.read_manifest(folder)
    except (OSError, ValueError) as error:
        _log.debug("%s: %s", folder.name, error)
        return None


def score_snapshot(plan: Plan, folder: Path, snapshot: SnapshotFiles) -> Point | None:
    """Measure a snapshot by every task of a plan and write records and feature statistics to the run's `eval` folder.

    Existing records are used as they are. Features are kept only meanwhile: each of thousands of snapshots is needed once.

    Returns:
        None if the snapshot was removed or rewritten meanwhile.

    Raises:
        CheckpointError: The snapshot cannot be read. Evaluation raises its own errors.
    """
    try:
        prepared = prepare(plan, str(snapshot.encoder))
        checkpoint = prepared.encoder.checkpoint
        if checkpoint.sha256 != snapshot.files[run_folder.ENCODER]:
            hint = "It is skipped; the next snapshot is measured."
            raise CheckpointError("is not the file that its manifest describes", where=str(snapshot.encoder), hint=hint)
    except CheckpointError:
        if _read_manifest(snapshot.folder) == snapshot:
            raise
        return None
    checkpoint = replace(checkpoint, name=f"{folder.resolve().name} step {snapshot.step}", epoch=snapshot.epoch)
    prepared = replace(prepared, encoder=replace(prepared.encoder, checkpoint=checkpoint))
    prepare_folder(folder / run_folder.EVAL, option="RUN_DIR")
    cache = folder / run_folder.EVAL / f".features.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    cached_plan = replace(plan, config=replace(plan.config, cache=str(cache)))
    try:
        results = tuple(evaluate_checkpoint(cached_plan, str(snapshot.encoder), prepared=prepared))
        features = _measure_snapshot(cached_plan, prepared, snapshot, cache)
    finally:
        remove(cache)
    snapshot_features.write_snapshot_features(folder / run_folder.EVAL, features)
    return Point(step=snapshot.step, epoch=snapshot.epoch, features=features, results=results)


def _measure_snapshot(plan: Plan, prepared: Preparation, snapshot: SnapshotFiles, cache: Path) -> SnapshotFeatures:
    encoder = prepared.encoder
    tap = resolve_tap(encoder, _TAP, by_hand=False)
    rank: float | None
    spread: float | None
    alpha: float | None
    loading = make_loading(plan.config)
    try:
        extracted = extract_features(
            encoder, plan.val, taps=[tap], hashes=plan.val_hashes, loading=loading, cache=cache
        )
        rank, spread, problem, alpha = snapshot_features.measure_features(extracted.features[tap].values)
    except NumericalError as error:
        rank, spread, problem, alpha = None, None, error.what, None
    return SnapshotFeatures(
        step=snapshot.step,
        epoch=snapshot.epoch,
        created=str(snapshot.facts.get("created", "")),
        sha256=snapshot.files[run_folder.ENCODER],
        weights_sha256=encoder.checkpoint.weights_sha256,
        seen=_extraction_settings(plan),
        images=len(plan.val),
        feature_rank=rank,
        feature_spread=spread,
        problem=problem,
        feature_alpha=alpha,
    )


def _extraction_settings(plan: Plan) -> ExtractionSettings:
    return ExtractionSettings(data_sha256=plan.val_sha256, tap=_TAP, precision=precision_class(plan.precision))


def read_trajectory(folder: Path, run: RunInfo, plan: Plan) -> Trajectory:
    """Read a run as it is now: its journal, and what was measured of it on the plan's validation images."""
    journal = folder / run_folder.METRICS
    metrics, damaged = run_folder.read_metrics(journal) if journal.exists() else ([], [])
    lines = tuple(map(_to_numbers, metrics))
    snapshots = _list_finished(folder)
    stated = (snapshot.facts["steps_an_epoch"] for snapshot in snapshots if "steps_an_epoch" in snapshot.facts)
    steps_per_epoch = next(stated, None)
    known_steps = [*(int(line["step"] or 0) for line in lines[-1:]), *(snapshot.step for snapshot in snapshots[:1])]
    last_step = max(known_steps, default=math.inf)
    features, faults = snapshot_features.read_snapshot_features(folder / run_folder.EVAL)
    try:
        scan = scan_results([folder / run_folder.EVAL])
    except UsageError:  # none yet
        scan = ResultScan(results=(), paths=(), faults=())
    faults += [f"{Path(fault.where).name}: {fault.what}" for fault in scan.faults]
    results = [result for result in scan.results if result.data.sha256 == plan.val_sha256]
    # The run may have been set back to an earlier snapshot.
    points = _make_points(features, results, _extraction_settings(plan), steps_per_epoch)
    points = [point for point in points if point.step <= last_step]
    measured = [point.features for point in points if point.features is not None]
    first_epochs = max(run.warmup_epochs, 1.0, _FIRST_EPOCHS * (run.epochs or 0))
    return Trajectory(
        run=run,
        steps_per_epoch=steps_per_epoch,
        lines=lines,
        points=tuple(points),
        alarms=find_alarms(lines, measured, prototypes=run.prototypes, first_epochs=first_epochs),
        notices=tuple(_describe_problems(lines, faults, journal, damaged)),
        faults=tuple(faults),
    )


def _to_numbers(line: Mapping[str, Any]) -> JournalLine:
    """Return the numbers of a line; None for what is not a finite number."""
    return {
        str(name): float(value) if type(value) in (int, float) and abs(value) < _LARGEST_NUMBER else None
        for name, value in line.items()
    }


def _make_points(
    features: Sequence[SnapshotFeatures],
    results: Sequence[Result],
    settings: ExtractionSettings,
    steps_per_epoch: int | None,
) -> list[Point]:
    """Return statistics and records of the same weights as points, by step.

    Records of the run's own probes have no statistics; they are placed at the end of their epoch.
    """
    by_weights: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_weights[result.checkpoint.weights_sha256].append(result)
    points = {}
    for step, snapshot in snapshot_features.select_newest(features, settings).items():
        records = tuple(by_weights[snapshot.weights_sha256])
        points[step] = Point(step=step, epoch=snapshot.epoch, features=snapshot, results=records)
    for weights in sorted(by_weights.keys() - {snapshot.weights_sha256 for snapshot in features}):
        epoch = by_weights[weights][0].checkpoint.epoch
        if epoch is not None and steps_per_epoch is not None:
            step = epoch * steps_per_epoch
            points.setdefault(step, Point(step=step, epoch=epoch, features=None, results=tuple(by_weights[weights])))
    return [points[step] for step in sorted(points)]


def _describe_problems(
    lines: Sequence[JournalLine], faults: Sequence[str], journal: Path, damaged: Sequence[int]
) -> Iterator[str]:
    if steps := [f"{line['step'] or 0:,.0f}" for line in lines if is_not_finite(line)]:
        more = ", …" if len(steps) > _MOST_LISTED else ""
        count = f"{format_count(len(steps), 'logged step')} ({', '.join(steps[:_MOST_LISTED])}{more})"
        yield f"Loss or gradient was not finite at {count}; such steps do not change the weights."
    if damaged:
        yield f"{run_folder.describe_damage(journal, damaged)}."
    if faults:
        more = "; …" if len(faults) > _MOST_LISTED else ""
        yield f"Left out: {format_count(len(faults), 'file')} that cannot be read ({'; '.join(faults[:_MOST_LISTED])}{more})."
