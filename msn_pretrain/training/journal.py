"""Journal: what a run has measured of itself: one JSON line a logged step, the same for TensorBoard, and a line to watch."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from msn_eval.checkpoints.run_folder import METRICS, read_metrics
from msn_eval.errors import StoreError
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
                f"cannot be written: {error.strerror}", where=METRICS, remedy="Free space on that disk."
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
