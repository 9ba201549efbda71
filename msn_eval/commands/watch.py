"""`msn-eval watch RUN_DIR`: a pre-training run, scored as it goes: a curve, and alarms."""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import CheckpointError, NumericalError, UsageError, printable

if TYPE_CHECKING:
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.evaluation.plan import Plan
    from msn_eval.monitor.trajectory import Point, RunInfo, Trajectory

_log = logging.getLogger(__name__)
_PROBES = "ridge,knn,ncm"
_NAME = "trajectory"
_MOST_DRAWING_SHARE = 0.05  # of the time, while nothing but the journal grows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", metavar="RUN_DIR", help="run.dir of an msn-pretrain run; records go to its eval folder")
    parser.add_argument("--data", metavar="X", help="default the run's own: watch.probe_data, else data.root")
    parser.add_argument("--subset", metavar="A,B", help="labelled images; default the run's watch.subset, else 5imgs")
    parser.add_argument("--probe", metavar="A,B", default=_PROBES, help=f"default {_PROBES}")
    parser.add_argument("--k", metavar="A,B", help="knn: neighbours that vote; default 10,20,100,200")
    parser.add_argument("--limit", metavar="N", help="at most N validation images a class")
    parser.add_argument(
        "--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:N; training may need the GPU"
    )
    parser.add_argument("--workers", metavar="N", default="auto", help="decoding processes, or auto")
    parser.add_argument("--once", action="store_true", help="score what is there and end")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=30.0, help="between two looks; default 30")
    parser.add_argument(
        "--patience",
        metavar="MINUTES",
        type=float,
        default=30.0,
        help="end when the run wrote nothing for so long; default 30",
    )


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Follow a run until it ends, and print a line for each snapshot; give 0.

    Raises NumericalError where an alarm was raised, CheckpointError where no snapshot, or not every one, could be scored.
    """
    from msn_eval.checkpoints.run_folder import EVAL
    from msn_eval.evaluation.plan import make_plan
    from msn_eval.files.atomic import prepare_folder
    from msn_eval.monitor.trajectory import read_facts

    for name in ("every", "patience"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UsageError(f"--{name} {getattr(options, name)}: out of range", hint="Give a number above 0.")
    folder = Path(options.run)
    facts = read_facts(folder)
    prepare_folder(folder / EVAL, option="RUN_DIR")
    plan = make_plan(_request(options, facts))
    refused: dict[str, CheckpointError] = {}
    trajectory = _follow(folder, facts, plan, refused, options)
    for path in _draw(folder, trajectory):
        print(path)
    _judge(folder, trajectory, list(refused.values()))
    return 0


def _request(options: argparse.Namespace, facts: "RunInfo") -> "EvaluationConfig":
    """Give the evaluation that each snapshot goes through: the options, where they leave it open what the run says."""
    from msn_eval.checkpoints.run_folder import EVAL
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.config.yaml_config import read_config

    given = {
        "checkpoint": [options.run],
        "data": options.data or facts.data,
        "subset": options.subset or facts.subset or "5imgs",
        "out": str(Path(options.run) / EVAL),
        **{name: getattr(options, name) for name in ("probe", "device", "workers")},
        **({} if options.limit is None else {"limit": options.limit}),
        **({} if options.k is None else {"k": options.k}),
    }
    return read_config(EvaluationConfig, given=given)


def _follow(
    folder: Path, facts: "RunInfo", plan: "Plan", refused: "dict[str, CheckpointError]", options: argparse.Namespace
) -> "Trajectory":
    """Score what is there and what comes, and redraw; give the run as it stood at the end.

    refused: takes up what could not be scored, by the SHA-256 of the file
    """
    from msn_eval.monitor.trajectory import signs_of_life

    tried: set[str] = set()
    told: set[str] = set()
    signs: object = None
    changed = drawn = time.monotonic()
    cost = 0.0
    trajectory: Trajectory | None = None
    while True:
        now = signs_of_life(folder)
        if trajectory is None or now != signs:
            signs = now
            before, trajectory = trajectory, _go_through(folder, facts, plan, tried, refused)
            for alarm in trajectory.alarms:
                if alarm.on and alarm.what not in told:
                    told.add(alarm.what)
                    _log.warning("ALARM %s: %s", folder, alarm)
            scored = before is None or before.points != trajectory.points
            if not options.once and (scored or time.monotonic() - drawn > cost / _MOST_DRAWING_SHARE):
                started = time.monotonic()
                _draw(folder, trajectory)
                drawn = time.monotonic()
                cost = drawn - started
            changed = time.monotonic()  # what took long here is no silence of the run's
        if options.once or _has_ended(trajectory):
            return trajectory
        if time.monotonic() - changed > 60 * options.patience:
            _log.warning("%s: nothing new was written for %g minutes", folder, options.patience)
            return trajectory
        time.sleep(options.every)


def _go_through(
    folder: Path, facts: "RunInfo", plan: "Plan", tried: set[str], refused: "dict[str, CheckpointError]"
) -> "Trajectory":
    """Score the snapshots that lack something, print a line for each, and give the run as it stands then."""
    from msn_eval.checkpoints.run_folder import ENCODER
    from msn_eval.monitor.trajectory import read_trajectory, score, unscored

    before = read_trajectory(folder, facts, plan)
    lacking = unscored(plan, folder, before, tried)
    for snapshot in lacking:
        sha256 = snapshot.files[ENCODER]
        try:
            point = score(plan, folder, snapshot)
        except CheckpointError as error:
            refused[sha256] = error
            tried.add(sha256)
            _log.error("%s", error)
            continue
        if point is None:
            _log.info("%s was removed while it was read", snapshot.folder.name)
            continue
        tried.add(sha256)
        print(printable(_line(point)), flush=True)
    return read_trajectory(folder, facts, plan) if lacking else before


def _line(point: "Point") -> str:
    """Say what was measured of a snapshot."""
    from msn_eval.reports.text_tables import FAILED
    from msn_eval.results.table import make_table

    table = make_table(point.results)
    parts = []
    for (_, column), cell in sorted(table.cells.items(), key=lambda one: table.columns.index(one[0][1])):
        spread = "" if cell.std is None else f" ± {100 * cell.std:.1f}"
        number = FAILED if cell.mean is None else f"{100 * cell.mean:.1f}{spread}"
        parts.append(f"{column.group}, {column.subset} {number}")
    look = point.look
    if look is not None and look.feature_rank is not None:
        parts.append(f"rank {look.feature_rank:.3g}, spread {look.feature_spread:.2g}")
    return f"step {point.step:,}, epoch {point.epoch}: {'; '.join(parts)}"


def _has_ended(trajectory: "Trajectory") -> bool:
    """Tell whether the snapshot after the last step of the run has been scored."""
    looked_at = [point.step for point in trajectory.points if point.look is not None]
    return trajectory.steps is not None and max(looked_at, default=0) >= trajectory.steps


def _draw(folder: Path, trajectory: "Trajectory") -> list[Path]:
    """Write page and plot, each whole, and give their paths; there is no plot of no numbers."""
    from msn_eval.checkpoints.run_folder import EVAL
    from msn_eval.files.atomic import write_atomically
    from msn_eval.reports.html import trajectory as trajectory_report

    sheet = trajectory_report.sheet_of(trajectory)
    page, plot = (folder / EVAL / f"{_NAME}.{suffix}" for suffix in ("html", "png"))
    write_atomically(page, trajectory_report.render_page(sheet).encode())
    if not sheet.panels:
        return [page]
    write_atomically(plot, trajectory_report.render_plot(sheet))
    return [page, plot]


def _judge(folder: Path, trajectory: "Trajectory", refused: "Sequence[CheckpointError]") -> None:
    """Raise what the run's state comes to, if it is not well."""
    if trajectory.alarms:
        count = len(trajectory.alarms)
        lines = "".join(f"\n  {alarm}" for alarm in trajectory.alarms)
        raise NumericalError(
            f"{count} alarm{'' if count == 1 else 's'}{lines}",
            where=str(folder),
            hint="Look at the curves; go back to a snapshot from before, with another recipe.",
            kept="Records and curves are in its eval folder.",
        )
    if refused:
        raise CheckpointError(
            f"{len(refused)} snapshots could not be scored" if len(refused) > 1 else refused[0].what,
            where=str(folder) if len(refused) > 1 else refused[0].where,
            hint="Each was told above; the others are scored.",
        )
    if not trajectory.points:
        raise CheckpointError(
            "holds no finished snapshot yet",
            where=str(folder),
            hint="Train on: each epoch ends with one. Without --once they are waited for.",
        )
