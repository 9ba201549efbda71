"""Journal of a run: one JSON line per logged step, the same for TensorBoard, a progress bar, and alarms."""

import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from msn_eval.checkpoints.run_folder import METRICS, describe_damage, format_metrics, read_metrics
from msn_eval.errors import NumericalError, StoreError, format_duration
from msn_eval.features.collapse import COLLAPSED_LINES
from msn_eval.files.atomic import describe_free_space, write_atomically

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_log = logging.getLogger(__name__)
# Fields that differ between runs with the same numbers.
TIMING = ("time", "step_seconds", "wait_seconds", "images_per_second", "memory_bytes", "remaining_seconds")
_GIB = 2**30
_SECONDS_PER_LINE = 60
_MOST_KEPT_BYTES = 2**20  # of each file, while the disk is full


@dataclass(kw_only=True)
class Journal:
    """An open journal. On ranks other than 0 it writes nothing.

    Attributes:
        files: By name; each keeps what a full disk refuses, and writes it later.
        events: Writes records for TensorBoard to one of the files, None without it.
        show: Shows the progress on stderr, None where nothing is shown.
        write_problem: Why the last line could not be written.
    """

    files: Mapping[str, BinaryIO] = field(default_factory=dict)
    events: Any = None  # TensorBoard has no types
    show: "_ProgressBar | _ProgressLines | None" = None
    write_problem: str | None = None

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write the line of one step. Numbers that are not finite become null. A full disk is logged once."""
        if not self.files:
            return
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in facts.items()
        }
        try:
            self.files[METRICS].write(format_metrics(line))
            if self.events is not None:
                self.events.write(_make_event(line))
            self._flush()
            self.write_problem = None
        except OSError as error:
            problem = error.strerror or str(error)
            if self.write_problem is None:
                _log.warning("%s cannot be written: %s; training continues", " and ".join(self.files), problem)
            self.write_problem = problem

    def is_due(self, step: int) -> bool:
        """Whether the progress after this step is to be shown."""
        return self.show is not None and self.show.is_due(step)

    def show_progress(self, step: int, images_per_second: float, *, loss: float, memory_bytes: int) -> None:
        """Show the progress after a step that is due."""
        assert self.show is not None
        self.show(step, f"loss {loss:.4f}  {images_per_second:,.0f} images/s  {memory_bytes / _GIB:.2f} GiB")

    def sync(self) -> None:
        """Write all lines to the disk, so that no snapshot is ahead of them. Raises StoreError if the disk refuses."""
        try:
            self._flush()
            if self.files:
                os.fsync(self.files[METRICS].fileno())
        except OSError as error:
            path = Path(self.files[METRICS].name)
            hint = f"Free space: {describe_free_space(path.parent)}."
            raise StoreError(f"cannot be written: {error.strerror}", where=str(path), hint=hint) from error

    def _flush(self) -> None:
        for file in self.files.values():
            file.flush()


@contextmanager
def open_journal(
    run: Path, *, first: bool, step: int, steps: int, quiet: bool = False, epoch_steps: int = 1
) -> Iterator[Journal]:
    """Open the journal of a run that continues after `step` steps. Lines of later steps are removed.

    Args:
        run: Folder of the run.
        first: Whether this is rank 0, the only one that writes.
        step: Finished steps.
        steps: All steps of the run.
        quiet: Show no progress.
        epoch_steps: Steps of an epoch.
    """
    if not first:
        yield Journal()
        return
    truncate_metrics(run / METRICS, step=step)
    with ExitStack() as stack:
        files = {METRICS: _open_to_append(run / METRICS, stack)}
        events = _open_tensorboard(run, files, stack, step=step)
        show = stack.enter_context(_show_progress(step, steps, quiet=quiet, epoch_steps=epoch_steps))
        yield Journal(files=files, events=events, show=show)


def _open_to_append(path: Path, stack: ExitStack) -> BinaryIO:
    """Open a file that keeps what a full disk refuses, until it is flushed again."""
    path.parent.mkdir(exist_ok=True)
    file = path.open("ab", buffering=_MOST_KEPT_BYTES)

    def close() -> None:
        try:
            file.close()
        except OSError as error:
            _log.warning("the last lines of %s could not be written: %s", path, error.strerror)

    stack.callback(close)
    return file


def _open_tensorboard(run: Path, files: dict[str, BinaryIO], stack: ExitStack, *, step: int) -> Any:
    """Open a file of TensorBoard and return a writer of its records; return None if TensorBoard is not installed.

    torch's SummaryWriter writes in a thread, which ends at the first error and takes what it has not yet written with it.
    """
    if find_spec("tensorboard") is None:
        _log.info("TensorBoard is not installed: only %s is written (pip install 'msn-eval[tensorboard]')", METRICS)
        return None
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter

    name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
    files["tensorboard"] = _open_to_append(run / "tensorboard" / name, stack)
    events = RecordWriter(files["tensorboard"])
    events.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    if step:  # TensorBoard drops what it has of the steps that run again
        start = SessionLog(status=SessionLog.START)
        events.write(Event(wall_time=time.time(), step=step + 1, session_log=start).SerializeToString())
    return events


def _make_event(line: Mapping[str, Any]) -> bytes:
    """Return a line as a record of TensorBoard."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=name, simple_value=value)
        for name, value in line.items()
        if isinstance(value, float | int) and name not in ("step", "epoch", "time")
    ]
    event = Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values))
    return cast(bytes, event.SerializeToString())


def truncate_metrics(path: Path, *, step: int) -> None:
    """Keep the lines of steps up to `step`. Incomplete and damaged lines are removed; the latter are logged."""
    if not path.exists():
        return
    lines, damaged = read_metrics(path)
    if damaged:
        _log.warning("%s", describe_damage(path, damaged))
    kept = b"".join(format_metrics(line) for line in lines if line["step"] <= step)
    if kept != path.read_bytes():
        write_atomically(path, kept)


@contextmanager
def _show_progress(
    step: int, steps: int, *, quiet: bool, epoch_steps: int
) -> Iterator["_ProgressBar | _ProgressLines | None"]:
    """Yield a bar on stderr, lines if stderr is not a terminal, None if nothing is to be shown."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _ProgressLines(steps=steps, epoch_steps=epoch_steps, start=step, last=step)
    else:
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
            yield _ProgressBar(bar=bar, task=bar.add_task("steps", total=steps, completed=step, facts=""))


@dataclass(frozen=True, kw_only=True)
class _ProgressBar:
    """A bar that is updated after every step."""

    bar: "Progress"
    task: "TaskID"

    def is_due(self, step: int) -> bool:
        return True

    def __call__(self, step: int, facts: str) -> None:
        self.bar.update(self.task, completed=step, facts=facts)


@dataclass(kw_only=True)
class _ProgressLines:
    """Lines for a log file: one per epoch, and one per minute of longer epochs."""

    steps: int
    epoch_steps: int
    start: int
    last: int
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)

    def is_due(self, step: int) -> bool:
        has_ended = step // self.epoch_steps > self.last // self.epoch_steps
        return has_ended or step == self.steps or time.monotonic() - self.shown >= _SECONDS_PER_LINE

    def __call__(self, step: int, facts: str) -> None:
        self.last, self.shown = step, time.monotonic()
        left = format_duration((self.shown - self.started) / max(1, step - self.start) * (self.steps - step))
        ending = f"about {left} left" if step < self.steps else "the last step"
        epochs, epoch = self.steps // self.epoch_steps, (step - 1) // self.epoch_steps + 1
        _log.info("epoch %d of %d, step %d of %d: %s, %s", epoch, epochs, step, self.steps, facts, ending)


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
