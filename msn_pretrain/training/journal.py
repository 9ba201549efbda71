"""Journal: what a run has measured of itself: one JSON line a logged step, the same for TensorBoard, and a line to watch."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from msn_eval.checkpoints.run_folder import METRICS, read_metrics
from msn_eval.errors import NumericalError, StoreError
from msn_eval.features.collapse import COLLAPSED_LINES
from msn_eval.features.collapse import is_collapsed as is_collapsed
from msn_eval.files.atomic import write_atomically

_log = logging.getLogger(__name__)
# What differs from run to run of the same numbers.
TIMING = ("time", "step_seconds", "wait_seconds", "images_per_second", "memory_bytes", "remaining_seconds")
_GIB = 2**30


@dataclass(kw_only=True)
class Journal:
    """An open journal of a run; of a rank that is not the first, one that writes nothing."""

    steps: int
    file: BinaryIO | None = None
    board: Any = None  # torch's SummaryWriter, which has no types
    show: Any = None
    started: float = field(default_factory=time.monotonic)
    first_step: int = 0
    write_problem: str | None = None

    def write(self, facts: Mapping[str, Any]) -> None:
        """Add a line for one step. A number that is not finite becomes null: a line is JSON. A full disk is told, once."""
        if self.file is None:
            return
        line = {name: None if _is_not_finite(value) else value for name, value in facts.items()}
        try:
            torn = "\n" if self.write_problem else ""
            self.file.write(f"{torn}{json.dumps(line, allow_nan=False)}\n".encode())
            self.write_problem = None
        except OSError as error:
            if self.write_problem is None:
                _log.warning("%s: cannot be written: %s; training goes on", METRICS, error.strerror)
            self.write_problem = error.strerror or str(error)
        for name, value in facts.items():
            if isinstance(value, float | int) and name not in ("step", "epoch", "time") and not _is_not_finite(value):
                self.board.add_scalar(name, value, facts["step"])

    def progress(self, *, step: int, images_per_second: float, loss: float, memory_bytes: int) -> None:
        """Move the line to watch."""
        if self.show is not None:
            self.show(step, f"loss {loss:.4f}  {images_per_second:,.0f} images/s  {memory_bytes / _GIB:.2f} GiB")

    def sync(self) -> None:
        """Have all lines on the disk: a snapshot must not be ahead of them. Raises StoreError where the disk refuses."""
        if self.file is None:
            return
        try:
            os.fsync(self.file.fileno())
            self.board.flush()
        except OSError as error:
            raise StoreError(
                f"cannot be written: {error.strerror}", where=METRICS, hint="Free space on that disk."
            ) from error


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@contextmanager
def open_journal(run: Path, *, first: bool, step: int, steps: int, quiet: bool = False) -> Iterator[Journal]:
    """Open the journal of a run that goes on after `step` steps, cutting off what was written of later ones.

    first: whether this is the first rank, which alone writes
    """
    if not first:
        yield Journal(steps=steps, first_step=step)
        return
    from torch.utils.tensorboard import SummaryWriter

    cut(run / METRICS, step=step)
    # Numbers of the steps that are done once more replace those that TensorBoard has of them.
    board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
    with (run / METRICS).open("ab", buffering=0) as file, _line_to_watch(step, steps, quiet=quiet) as show:
        try:
            yield Journal(steps=steps, first_step=step, file=cast(BinaryIO, file), board=board, show=show)
        finally:
            board.close()


def cut(path: Path, *, step: int) -> None:
    """Leave the lines of steps up to `step`, each once; torn ones go."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(f"{json.dumps(line)}\n".encode() for line in read_metrics(path) if line["step"] <= step)
    if kept != content:
        write_atomically(path, kept)


@contextmanager
def _line_to_watch(step: int, steps: int, *, quiet: bool) -> Iterator[Any]:
    """Give a function that moves a progress bar on a terminal's stderr, None where stderr is none."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("steps", total=steps, completed=step, facts="")
        yield lambda done, facts: bar.update(task, completed=done, facts=facts)


_MOST_BAD_STEPS = 3  # one after the other: single ones happen in half precision and are skipped
_MOST_ROLLBACKS = 3  # in a whole run: one that needs more has another fault than bad luck


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What alarms remember from step to step; part of a snapshot.

    bad_steps:       in a row whose loss or gradient was not finite
    collapsed_lines: of the journal in a row that looked collapsed
    rollbacks:       to an earlier snapshot, so far
    """

    bad_steps: int = 0
    collapsed_lines: int = 0
    rollbacks: int = 0


def after_step(watched: Watched, *, finite: bool) -> Watched:
    """Count a step."""
    return replace(watched, bad_steps=0 if finite else watched.bad_steps + 1)


def after_line(watched: Watched, statistics: Mapping[str, float]) -> Watched:
    """Count a line of the journal by its statistics (collapse.py)."""
    collapsed = is_collapsed(statistics)
    return replace(watched, collapsed_lines=watched.collapsed_lines + 1 if collapsed else 0)


def may_roll_back(watched: Watched) -> bool:
    """Tell whether the alarm that is due is one of numbers that are not finite, and an earlier snapshot is worth a try."""
    return watched.bad_steps >= _MOST_BAD_STEPS and watched.rollbacks < _MOST_ROLLBACKS


def after_rollback(watched: Watched) -> Watched:
    """Count a rollback."""
    return replace(watched, bad_steps=0, rollbacks=watched.rollbacks + 1)


def raised(watched: Watched) -> NumericalError | None:
    """Give the alarm that is due, if one is."""
    if watched.bad_steps >= _MOST_BAD_STEPS:
        return NumericalError(
            f"loss or gradient was not finite in {watched.bad_steps} steps in a row",
            hint="The images of those steps are listed in alarms/ of the run. Train with a smaller learning rate, or in "
            "run.precision=fp32.",
            kept="No weights were changed by those steps; the last snapshot is kept.",
        )
    if watched.collapsed_lines >= COLLAPSED_LINES:
        return NumericalError(
            f"the representation has collapsed: all images have looked alike in {watched.collapsed_lines} lines in a row",
            hint="metrics.jsonl has feature_spread, output_spread and feature_rank. Change the recipe; "
            "watch.on_alarm=warn goes on regardless.",
            kept="Snapshots are kept.",
        )
    return None


def dump_batch(run: Path, *, step: int, rank: int, image_ids: Sequence[str], facts: Mapping[str, float]) -> None:
    """Write which images a step saw whose loss or gradient was not finite."""
    folder = run / "alarms"
    folder.mkdir(exist_ok=True)
    content = {
        "step": step,
        "rank": rank,
        "facts": {name: value if math.isfinite(value) else str(value) for name, value in facts.items()},
        "images": list(image_ids),
    }
    write_atomically(folder / f"step-{step:08d}-rank-{rank}.json", (json.dumps(content, indent=1) + "\n").encode())
