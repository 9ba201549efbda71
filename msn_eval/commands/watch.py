"""`msn-eval watch RUN_DIR`: scores of a pre-training run while it trains, with a curve and alarms."""

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import CheckpointError, NumericalError, StoreError, UsageError, format_count, one_line

if TYPE_CHECKING:
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.evaluation.plan import Plan
    from msn_eval.monitor.trajectory import Point, RunInfo, Trajectory

_log = logging.getLogger(__name__)
_PROBES = "ridge,knn,ncm"
# By SHA-256 of the encoder, or folder if the manifest is damaged: step, and why it could not be scored, None if it was.
Attempts = dict[str, tuple[int, CheckpointError | None]]
_MOST_DRAWING_TIME = 0.05  # as a fraction of the time, while only the journal grows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", metavar="RUN_DIR", help="run.dir of an msn-pretrain run; records go to its eval folder")
    parser.add_argument("--data", metavar="X", help="default the run's own: watch.probe_data, else data.root")
    parser.add_argument("--subset", metavar="A,B", help="labelled images; default the run's watch.subset, else 5imgs")
    parser.add_argument("--probe", metavar="A,B", default=_PROBES, help=f"default {_PROBES}")
    parser.add_argument("--k", metavar="A,B", help="knn: neighbours that vote; default 10,20,100,200")
    parser.add_argument("--limit", metavar="N", help="at most N validation images per class")
    parser.add_argument(
        "--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:N; training may need the GPU"
    )
    parser.add_argument("--workers", metavar="N", default="auto", help="decoding processes, or auto")
    parser.add_argument("--once", action="store_true", help="score the existing snapshots and end")
    for name, unit, text in (
        ("--every", "SECONDS", "interval between checks for new snapshots"),
        ("--patience", "MINUTES", "end when the run has written nothing for this time"),
    ):
        parser.add_argument(name, metavar=unit, type=float, default=30.0, help=f"{text}; default 30")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Score a run until it ends, and print a line per snapshot; return 0.

    Raises:
        NumericalError: There was an alarm.
        CheckpointError: A snapshot could not be scored, or there is none.
    """
    from msn_eval.checkpoints.run_folder import EVAL
    from msn_eval.evaluation.plan import make_plan
    from msn_eval.files.atomic import prepare_folder
    from msn_eval.monitor.trajectory import read_run_info

    for name in ("every", "patience"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UsageError(f"--{name} {getattr(options, name)}: out of range", hint="Pass a number above 0.")
    folder = Path(options.run)
    run_info = read_run_info(folder)
    prepare_folder(folder / EVAL, option="RUN_DIR")
    plan = make_plan(_read_config(options, run_info))
    attempts: Attempts = {}
    warned: set[str] = set()
    points: tuple[Point, ...] | None = None
    next_drawing = 0.0
    for trajectory in _follow_run(folder, run_info, plan, attempts, options):
        for alarm in trajectory.alarms:
            if alarm.is_active and alarm.what not in warned:
                warned.add(alarm.what)
                _log.warning("ALARM %s: %s", folder, alarm)
        for notice in trajectory.notices:
            if notice not in warned:
                warned.add(notice)
                _log.warning("%s: %s", folder, notice)
        started = time.monotonic()
        if not options.once and (points != trajectory.points or started > next_drawing):
            _write_curves(folder, trajectory)
            next_drawing = time.monotonic() + (time.monotonic() - started) / _MOST_DRAWING_TIME
        points = trajectory.points
    for path in _write_curves(folder, trajectory):
        print(path)
    _raise_problems(folder, trajectory, [error for _, error in attempts.values() if error is not None])
    return 0


def _read_config(options: argparse.Namespace, run_info: "RunInfo") -> "EvaluationConfig":
    """Return the evaluation of each snapshot: the options, with the run's own data and subset as defaults."""
    from msn_eval.checkpoints.run_folder import EVAL
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.config.yaml_config import read_config

    given = {
        "checkpoint": [options.run],
        "data": options.data or run_info.data,
        "subset": options.subset or run_info.subset or "5imgs",
        "out": str(Path(options.run) / EVAL),
    }
    names = ("probe", "device", "workers", "limit", "k")
    given |= {name: value for name in names if (value := getattr(options, name)) is not None}
    return read_config(EvaluationConfig, given=given)


def _follow_run(
    folder: Path,
    run_info: "RunInfo",
    plan: "Plan",
    attempts: "Attempts",
    options: argparse.Namespace,
) -> "Iterator[Trajectory]":
    """Yield the run with all its snapshots scored, at first and whenever it has changed, until it ends.

    Args:
        folder: Of the run.
        run_info: Its configuration.
        plan: What is measured of every snapshot.
        attempts: Receives what was tried.
        options: Of the command.
    """
    from msn_eval.monitor.trajectory import fingerprint_run

    fingerprint: object = None
    while True:
        if (current := fingerprint_run(folder)) != fingerprint:
            fingerprint = current
            trajectory = _score_snapshots(folder, run_info, plan, attempts)
            yield trajectory
            changed = time.monotonic()  # after scoring and drawing, whose time does not count as silence
        if options.once or _has_ended(trajectory, attempts):
            return
        if time.monotonic() - changed > 60 * options.patience:
            _log.warning("%s: nothing new was written for %g minutes", folder, options.patience)
            return
        time.sleep(options.every)


def _score_snapshots(folder: Path, run_info: "RunInfo", plan: "Plan", attempts: "Attempts") -> "Trajectory":
    """Score the snapshots with missing scores, print a line for each, and return the run with them."""
    from msn_eval.checkpoints.run_folder import ENCODER
    from msn_eval.monitor.trajectory import find_damaged, list_unscored, read_trajectory, score_snapshot

    for name, (step, error) in find_damaged(folder).items():
        if name not in attempts:
            attempts[name] = step, error
            _log.error("%s", error)
    trajectory = read_trajectory(folder, run_info, plan)
    snapshots = list_unscored(plan, folder, trajectory, attempts)
    for snapshot in snapshots:
        try:
            point = score_snapshot(plan, folder, snapshot)
        except CheckpointError as error:
            attempts[snapshot.files[ENCODER]] = snapshot.step, error
            _log.error("%s", error)
            continue
        if point is None:
            _log.info("%s was removed while it was read", snapshot.folder.name)
        else:
            attempts[snapshot.files[ENCODER]] = snapshot.step, None
            print(one_line(_describe_point(point)), flush=True)
    return read_trajectory(folder, run_info, plan) if snapshots else trajectory


def _describe_point(point: "Point") -> str:
    from msn_eval.reports.text_tables import format_accuracy
    from msn_eval.results.table import make_table

    table, features = make_table(point.results), point.features
    cells = [(column, table.cells[row, column]) for column in table.columns for row in table.rows]
    reasons = {column.reason for column in table.columns}
    shared = f" on {reasons.pop()}" if len(reasons) == 1 else ""
    names = [column.settings if shared else column.curve for column, _ in cells]
    texts = [
        f"{name}, {column.subset} {format_accuracy(cell)}" for name, (column, cell) in zip(names, cells, strict=True)
    ]
    if features is not None and features.feature_rank is not None:
        texts.append(f"rank {features.feature_rank:.3g}, spread {features.feature_spread:.2g}")
    return f"step {point.step:,}, epoch {point.epoch}{shared}: {'; '.join(texts)}"


def _has_ended(trajectory: "Trajectory", attempts: "Attempts") -> bool:
    """Whether the snapshot after the last step of the run is scored, or cannot be."""
    scored = [point.step for point in trajectory.points if point.features is not None]
    tried = [step for step, _ in attempts.values()]
    return trajectory.steps is not None and max([*scored, *tried], default=0) >= trajectory.steps


def _write_curves(folder: Path, trajectory: "Trajectory") -> list[Path]:
    """Write page and plot and return their paths; there is no plot without numbers."""
    from msn_eval.checkpoints.run_folder import EVAL
    from msn_eval.files.atomic import write_atomically
    from msn_eval.reports.html import trajectory as trajectory_report

    panels = trajectory_report.draw_panels(trajectory)
    page, plot = (folder / EVAL / f"trajectory.{suffix}" for suffix in ("html", "png"))
    write_atomically(page, trajectory_report.render_page(trajectory, panels).encode())
    if not panels:
        return [page]
    write_atomically(plot, trajectory_report.render_plot(trajectory, panels))
    return [page, plot]


def _raise_problems(folder: Path, trajectory: "Trajectory", failures: "Sequence[CheckpointError]") -> None:
    where = str(folder)
    if trajectory.alarms:
        lines = "".join(f"\n  {alarm}" for alarm in trajectory.alarms)
        hint = "Look at the curves; continue from an earlier snapshot with a changed recipe."
        kept = "Records and curves are in its eval folder."
        raise NumericalError(
            f"{format_count(len(trajectory.alarms), 'alarm')}{lines}", where=where, hint=hint, kept=kept
        )
    if trajectory.faults:
        lines = "".join(f"\n  {fault}" for fault in trajectory.faults)
        hint = "Restore these files of its eval folder, or move them away: their snapshots are gone."
        raise StoreError(
            f"left out {format_count(len(trajectory.faults), 'damaged file')}{lines}", where=where, hint=hint
        )
    if len(failures) == 1:
        raise failures[0]
    if failures:
        hint = "Their errors are printed above; all other snapshots are scored."
        raise CheckpointError(f"{format_count(len(failures), 'snapshot')} could not be scored", where=where, hint=hint)
    if not trajectory.points:
        hint = "Wait for the end of an epoch, which writes one; without --once, watch waits for it."
        raise CheckpointError("has no finished snapshot yet", where=where, hint=hint)
