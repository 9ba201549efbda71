"""Journal of a run: one JSON line per logged step, the same for TensorBoard, a progress bar, and alarms."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from msn_eval.checkpoints.run_folder import METRICS, read_metrics
from msn_eval.errors import NumericalError, StoreError
from msn_eval.features.collapse import COLLAPSED_LINES
from msn_eval.files.atomic import write_atomically

_log = logging.getLogger(__name__)
# Fields that differ between runs with the same numbers.
TIMING = ("time", "step_seconds", "wait_seconds", "images_per_second", "memory_bytes", "remaining_seconds")
_GIB = 2**30


@dataclass(kw_only=True)
class Journal:
    """An open journal. On ranks other than 0 it writes nothing."""

    file: BinaryIO | None = None
    board: Any = None  # torch's SummaryWriter, which has no types
    show: Any = None
    write_problem: str | None = None

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write the line of one step. Numbers that are not finite become null. A full disk is logged once."""
        if self.file is None:
            return
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in facts.items()
        }
        try:
            torn = "\n" if self.write_problem else ""
            self.file.write(f"{torn}{json.dumps(line, allow_nan=False)}\n".encode())
            self.write_problem = None
        except OSError as error:
            if self.write_problem is None:
                _log.warning("%s cannot be written: %s; training continues", METRICS, error.strerror)
            self.write_problem = error.strerror or str(error)
        for name, value in line.items():
            if self.board is not None and isinstance(value, float | int) and name not in ("step", "epoch", "time"):
                self.board.add_scalar(name, value, facts["step"])

    def show_progress(self, step: int, images_per_second: float, *, loss: float, memory_bytes: int) -> None:
        """Update the progress bar, which must exist."""
        self.show(step, f"loss {loss:.4f}  {images_per_second:,.0f} images/s  {memory_bytes / _GIB:.2f} GiB")

    def sync(self) -> None:
        """Flush all lines to the disk, so that no snapshot is ahead of them. Raises StoreError if the disk refuses."""
        if self.file is None:
            return
        try:
            os.fsync(self.file.fileno())
            if self.board is not None:
                self.board.flush()
        except OSError as error:
            what = f"cannot be written: {error.strerror}"
            raise StoreError(what, where=METRICS, hint="Free space on that disk.") from error


@contextmanager
def open_journal(run: Path, *, first: bool, step: int, steps: int, quiet: bool = False) -> Iterator[Journal]:
    """Open the journal of a run that continues after `step` steps. Lines of later steps are removed.

    Args:
        run: Folder of the run.
        first: Whether this is rank 0, the only one that writes.
        step: Finished steps.
        steps: All steps of the run.
        quiet: Show no progress bar.
    """
    if not first:
        yield Journal()
        return
    truncate_metrics(run / METRICS, step=step)
    board = _open_tensorboard(run, step=step)
    with (run / METRICS).open("ab", buffering=0) as file, _progress_bar(step, steps, quiet=quiet) as show:
        try:
            yield Journal(file=cast(BinaryIO, file), board=board, show=show)
        finally:
            if board is not None:
                board.close()


def _open_tensorboard(run: Path, *, step: int) -> Any:
    """Return a writer for TensorBoard, None if that is not installed."""
    if find_spec("tensorboard") is None:
        _log.info("TensorBoard is not installed: only %s is written (pip install 'msn-eval[tensorboard]')", METRICS)
        return None
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard drops what it has of the steps that run again.
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)


def truncate_metrics(path: Path, *, step: int) -> None:
    """Keep the lines of steps up to `step`. Incomplete lines are removed."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(f"{json.dumps(line)}\n".encode() for line in read_metrics(path) if line["step"] <= step)
    if kept != content:
        write_atomically(path, kept)


@contextmanager
def _progress_bar(step: int, steps: int, *, quiet: bool) -> Iterator[Any]:
    """Yield a function that updates a progress bar on stderr, None if stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("step"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[facts]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("steps", total=steps, completed=step, facts="")
        yield lambda done, facts: bar.update(task, completed=done, facts=facts)


_MOST_BAD_STEPS = 3  # in a row; single ones happen in half precision and are skipped
_MOST_ROLLBACKS = 3  # per run; if that does not help, the cause is not bad luck


@dataclass(kw_only=True)
class AlarmCounters:
    """Counters of the alarms; part of a snapshot.

    Attributes:
        bad_steps: Consecutive steps whose loss or gradient was not finite.
        collapsed_lines: Consecutive journal lines with collapse statistics.
        rollbacks: Rollbacks to an earlier snapshot so far.
    """

    bad_steps: int = 0
    collapsed_lines: int = 0
    rollbacks: int = 0


def may_roll_back(counters: AlarmCounters) -> bool:
    """Whether the alarm is about numbers that are not finite, and a rollback is still allowed."""
    return counters.bad_steps >= _MOST_BAD_STEPS and counters.rollbacks < _MOST_ROLLBACKS


def find_alarm(counters: AlarmCounters) -> NumericalError | None:
    """Return the alarm that the counters raise, or None."""
    if counters.bad_steps >= _MOST_BAD_STEPS:
        return NumericalError(
            f"loss or gradient was not finite in {counters.bad_steps} steps in a row",
            hint="alarms/ of the run lists the images of those steps. Use a smaller learning rate or run.precision=fp32.",
            kept="No weights were changed by those steps; the last snapshot is kept.",
        )
    if counters.collapsed_lines >= COLLAPSED_LINES:
        return NumericalError(
            f"the representation has collapsed: all images look alike in {counters.collapsed_lines} lines in a row",
            hint="metrics.jsonl has feature_spread, output_spread and feature_rank. Change the recipe; "
            "watch.on_alarm=warn continues anyway.",
            kept="Snapshots are kept.",
        )
    return None
