"""Watchdog: ends a process that makes no progress, and prints the stacks of its threads."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from msn_eval.errors import DistributedError
from msn_eval.process import record_for_torchrun

# Limits in seconds.
STEP_SECONDS = 300.0  # of a step; ten times the median if that is more
FIRST_STEP_SECONDS = 3600.0  # it may compile
SAVE_SECONDS = 1800.0
EVALUATION_SECONDS = 12 * 3600.0

_FACTOR = 10.0
_REMEMBERED = 64


class Watchdog:
    """The time until which the current step or phase must end.

    Attributes:
        deadline: On the clock of time.monotonic.
    """

    def __init__(self, *, first_seconds: float = FIRST_STEP_SECONDS, step_seconds: float = STEP_SECONDS) -> None:
        self._started, self._step_seconds = time.monotonic(), step_seconds
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self.deadline = self._started + first_seconds

    def step_done(self) -> None:
        """Record a finished step and set the deadline of the next one."""
        self._durations.append(time.monotonic() - self._started)
        self._started = time.monotonic()
        self.deadline = self._started + max(self._step_seconds, _FACTOR * statistics.median(self._durations))

    @contextmanager
    def phase(self, seconds: float) -> Iterator[None]:
        """Allow `seconds` for the body, which is not a part of the step around it."""
        left, self.deadline = self.deadline - time.monotonic(), time.monotonic() + seconds
        try:
            yield
        finally:
            self._started, self.deadline = time.monotonic(), time.monotonic() + left


@contextmanager
def watch_steps(watchdog: Watchdog | None = None, *, poll_seconds: float = 1.0) -> Iterator[Watchdog]:
    """Yield a watchdog that ends this process with exit code 31 after its deadline."""
    watchdog, closed = watchdog or Watchdog(), threading.Event()

    def watch() -> None:
        while not closed.wait(poll_seconds):
            if time.monotonic() > watchdog.deadline:
                error = DistributedError("no step finished for too long")
                print(f"DistributedError: {error}. Stacks of all threads:", file=sys.stderr)
                faulthandler.dump_traceback(sys.stderr)
                print("The last snapshot is kept; run the same command again to continue.", file=sys.stderr, flush=True)
                record_for_torchrun(error)
                os._exit(error.exit_code)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield watchdog
    finally:
        closed.set()
