"""Trajectory: a pre-training run, scored as it goes: its journal, and its snapshots measured as any other checkpoint.

run folder -> snapshots -> records and looks in RUN/eval -> trajectory -> plot and page
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

from msn_eval.checkpoints.run_folder import (
    CONFIG,
    ENCODER,
    EVAL,
    METRICS,
    SnapshotFiles,
    is_run_folder,
    read_manifest,
    read_metrics,
    snapshot_folders,
)
from msn_eval.errors import CheckpointError, NumericalError, UsageError
from msn_eval.evaluation.evaluate import Preparation, evaluate_checkpoint, loading_of, prepare
from msn_eval.evaluation.plan import Plan
from msn_eval.features.encoder import precision_class, resolve_tap
from msn_eval.features.extraction import extract_features
from msn_eval.files.atomic import prepare_folder, remove
from msn_eval.monitor.alarms import Alarm, Line, find_alarms, is_not_finite
from msn_eval.monitor.snapshot_features import (
    Place,
    Seen,
    SnapshotFeatures,
    look_at,
    newest_of_each_step,
    read_snapshot_features,
    write_snapshot_features,
)
from msn_eval.results.folder import ResultScan, scan_results
from msn_eval.results.record import Result

_log = logging.getLogger(__name__)
_TAP = "cls-norm"
_SHOWN = 3
_MOST = 1e300
_FIRST_SHARE = 0.05  # of the epochs: how long a loss may stay where every run begins


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run's configuration says that a watcher must know; None for what it does not say.

    data, subset: what the run itself probes with
    prototypes:   k, None where the method has none
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
    """One snapshot as it was measured. look: None where only its scores are known; results: of its draws and probes."""

    step: int
    epoch: int
    look: SnapshotFeatures | None
    results: tuple[Result, ...]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A run from its first step to where it stands.

    lines:          of the journal, by step
    steps_an_epoch: None where no snapshot has told it
    notices:        what a reader must know besides alarms
    """

    facts: RunInfo
    steps_an_epoch: int | None
    lines: tuple[Line, ...]
    points: tuple[Point, ...]
    alarms: tuple[Alarm, ...]
    notices: tuple[str, ...]

    @property
    def step(self) -> int:
        """Give the last step that is known of."""
        return max(
            [int(line["step"] or 0) for line in self.lines[-1:]] + [point.step for point in self.points[-1:]] + [0]
        )

    @property
    def steps(self) -> int | None:
        """Give how many steps the run is to have."""
        known = self.facts.epochs is not None and self.steps_an_epoch is not None
        return (self.facts.epochs or 0) * (self.steps_an_epoch or 0) if known else None


def read_facts(run: Path) -> RunInfo:
    """Read what a run's folder says of it. Raises CheckpointError where it is none."""
    if not run.is_dir():
        raise CheckpointError("no such folder", where=str(run), hint="Give the run.dir of an msn-pretrain run.")
    if not is_run_folder(run):
        raise CheckpointError(
            f"is no folder that msn-pretrain trains in: it holds no {CONFIG} beside a folder of checkpoints",
            where=str(run),
            hint="Give the run.dir of a run; other checkpoints are measured by msn-eval --checkpoint.",
        )
    import yaml

    try:
        content: Any = yaml.safe_load((run / CONFIG).read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot be read: {' '.join(str(error).split())}", where=str(run / CONFIG), hint="Restore it."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError("is no configuration of a run", where=str(run / CONFIG), hint="Restore it.")
    return _facts(run, content)


def _facts(run: Path, content: Mapping[object, Any]) -> RunInfo:
    def value(section: str, key: str) -> Any:
        part = content.get(section)
        return part.get(key) if isinstance(part, dict) else None

    def whole(section: str, key: str) -> int | None:
        found = value(section, key)
        return found if type(found) is int and found > 0 else None

    texts = (value("watch", "probe_data"), value("data", "root"))
    subset, warmup = value("watch", "subset"), value("optimization", "warmup")
    return RunInfo(
        name=run.resolve().name,
        method=str(content.get("method", "")),
        data=next((one for one in texts if isinstance(one, str) and one), None),
        subset=subset if isinstance(subset, str) and subset else None,
        epochs=whole("optimization", "epochs"),
        warmup_epochs=float(warmup) if isinstance(warmup, int | float) and math.isfinite(warmup) else 0.0,
        prototypes=whole("criterion", "prototypes"),
    )


def signs_of_life(run: Path) -> tuple[object, ...]:
    """Give something that differs whenever a run has written of itself: its journal and its whole snapshots."""
    try:
        journal = (run / METRICS).stat()
        size: tuple[object, ...] = (journal.st_size, journal.st_mtime_ns)
    except OSError:
        size = ()
    return (*size, *(found.files[ENCODER] for found in _finished(run)))


def unscored(plan: Plan, run: Path, trajectory: Trajectory, passed_over: Collection[str]) -> list[SnapshotFiles]:
    """Give the finished snapshots that lack a look or a record, the oldest first: they are the next to be removed.

    passed_over: SHA-256 of encoders not to be tried again
    """
    wanted = {(task.protocol_id, task.subset.draw) for task in plan.tasks}
    whole = {
        point.look.sha256
        for point in trajectory.points
        if point.look is not None and wanted <= {(one.protocol_id, one.split.draw) for one in point.results}
    }
    return [one for one in _finished(run)[::-1] if one.files[ENCODER] not in whole | set(passed_over)]


def _finished(run: Path) -> list[SnapshotFiles]:
    """Give the snapshots with a manifest, the newest first; one without is being written, or removed."""
    found = []
    for folder in snapshot_folders(run):
        try:
            found.append(read_manifest(folder))
        except (OSError, ValueError) as error:
            _log.debug("%s: %s", folder.name, error)
    return found


def score(plan: Plan, run: Path, snapshot: SnapshotFiles) -> Point | None:
    """Measure a snapshot by every task of a plan, look at its features, and keep both in the run's `eval` folder; give None
    where it was removed or written anew meanwhile.

    Records that are there already are taken as they are. Features are kept only while this runs: those of thousands of
    snapshots are needed once each.
    Raises CheckpointError where a snapshot that stays cannot be read, and what evaluation raises.
    """
    try:
        ready = prepare(plan, str(snapshot.encoder))
    except CheckpointError:
        if not _stands(snapshot):
            return None
        raise
    if ready.encoder.checkpoint.sha256 != snapshot.files[ENCODER]:
        if not _stands(snapshot):
            return None
        raise CheckpointError(
            "is not the file that its manifest describes",
            where=str(snapshot.encoder),
            hint="It is passed over; the next snapshot is measured.",
        )
    folder = run / EVAL
    named = replace(ready.encoder.checkpoint, name=f"{run.resolve().name} step {snapshot.step}", epoch=snapshot.epoch)
    ready = replace(ready, encoder=replace(ready.encoder, checkpoint=named))
    prepare_folder(folder, option="RUN_DIR")
    features = folder / f".features.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    kept = replace(plan, request=replace(plan.request, cache=str(features)))
    try:
        results = tuple(evaluate_checkpoint(kept, str(snapshot.encoder), prepared=ready))
        look = _look(kept, ready, snapshot, features)
    finally:
        remove(features)
    write_snapshot_features(folder, look)
    return Point(step=snapshot.step, epoch=snapshot.epoch, look=look, results=results)


def _stands(snapshot: SnapshotFiles) -> bool:
    """Tell whether a snapshot is still the one that was listed."""
    try:
        return read_manifest(snapshot.folder) == snapshot
    except (OSError, ValueError):
        return False


def _look(plan: Plan, ready: Preparation, snapshot: SnapshotFiles, cache: Path) -> SnapshotFeatures:
    encoder = ready.encoder
    tap = resolve_tap(encoder, _TAP, by_hand=False)
    place = Place(
        step=snapshot.step,
        epoch=snapshot.epoch,
        created=str(snapshot.facts.get("created", "")),
        sha256=snapshot.files[ENCODER],
        weights_sha256=encoder.checkpoint.weights_sha256,
        seen=_seen(plan),
    )
    try:
        values = extract_features(
            encoder, plan.val, taps=[tap], hashes=plan.val_hashes, loading=loading_of(plan.request), cache=cache
        ).features[tap]
    except NumericalError as error:
        images = len(plan.val)
        return SnapshotFeatures(
            **vars(place), images=images, feature_rank=None, feature_spread=None, problem=error.what
        )
    return look_at(values, place)


def _seen(plan: Plan) -> Seen:
    return Seen(data_sha256=plan.val_sha256, tap=_TAP, precision=precision_class(plan.precision))


def read_trajectory(run: Path, facts: RunInfo, plan: Plan) -> Trajectory:
    """Read a run as it stands: its journal, and what was measured of it on the plan's validation images."""
    lines = tuple(_numbers(line) for line in _journal(run))
    snapshots = _finished(run)
    an_epoch = next(
        (one for one in (found.facts.get("steps_an_epoch") for found in snapshots) if type(one) is int), None
    )
    last = max([int(line["step"] or 0) for line in lines[-1:]] + [one.step for one in snapshots[:1]], default=math.inf)
    looks, faults = read_snapshot_features(run / EVAL)
    scan = _records(run)
    faults += [f"{Path(fault.where).name}: {fault.what}" for fault in scan.faults]
    known = newest_of_each_step(looks, _seen(plan))
    results = [one for one in scan.results if one.data.sha256 == plan.val_sha256]
    unplaced = {result.checkpoint.weights_sha256 for result in results} - {look.weights_sha256 for look in looks}
    points = [point for point in _points(known, results, unplaced, an_epoch) if point.step <= last]
    return Trajectory(
        facts=facts,
        steps_an_epoch=an_epoch,
        lines=lines,
        points=tuple(points),
        alarms=find_alarms(
            lines,
            [point.look for point in points if point.look is not None],
            prototypes=facts.prototypes,
            first_epochs=max(facts.warmup_epochs, 1.0, _FIRST_SHARE * (facts.epochs or 0)),
        ),
        notices=tuple(_notices(lines, faults)),
    )


def _journal(run: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run / METRICS)
    except FileNotFoundError:
        return []


def _numbers(line: Mapping[str, Any]) -> Line:
    """Give the numbers of a line; what is none, or is not finite, is None."""
    return {
        str(name): float(value) if type(value) in (int, float) and abs(value) < _MOST else None
        for name, value in line.items()
    }


def _records(run: Path) -> ResultScan:
    try:
        return scan_results([run / EVAL])
    except UsageError:  # none yet
        return ResultScan(results=(), paths=(), faults=())


def _points(
    looks: Mapping[int, SnapshotFeatures], results: Sequence[Result], unplaced: Collection[str], an_epoch: int | None
) -> list[Point]:
    """Put records beside the looks at the same weights, and those of the run's own probes at the ends of their epochs.

    unplaced: weights of which only the epoch is known
    """
    by_weights: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_weights[result.checkpoint.weights_sha256].append(result)
    found = {
        step: Point(step=step, epoch=look.epoch, look=look, results=tuple(by_weights.get(look.weights_sha256, ())))
        for step, look in looks.items()
    }
    for weights in sorted(unplaced):
        group = by_weights[weights]
        epoch = group[0].checkpoint.epoch
        if epoch is not None and an_epoch is not None:
            step = epoch * an_epoch
            found.setdefault(step, Point(step=step, epoch=epoch, look=None, results=tuple(group)))
    return [found[step] for step in sorted(found)]


def _notices(lines: Sequence[Line], faults: Sequence[str]) -> Iterator[str]:
    if bad := [f"{line['step'] or 0:,.0f}" for line in lines if is_not_finite(line)]:
        more = ", …" if len(bad) > _SHOWN else ""
        yield (
            f"Loss or gradient was not finite at {len(bad)} logged step{'' if len(bad) == 1 else 's'} "
            f"({', '.join(bad[:_SHOWN])}{more}); such steps change no weights."
        )
    if faults:
        more = "; …" if len(faults) > _SHOWN else ""
        yield f"Left out, because they cannot be read: {len(faults)} files ({'; '.join(faults[:_SHOWN])}{more})."
