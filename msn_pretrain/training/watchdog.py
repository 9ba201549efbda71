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
from dataclasses import dataclass, field

from msn_eval.errors import DistributedError

_LEAST_SECONDS = 300.0
_FACTOR = 10.0
_REMEMBERED = 64


@dataclass(kw_only=True)
class Watchdog:
    """Records when the last step finished, and how long steps take.

    Attributes:
        least_seconds: Without a step, that are always allowed.
    """

    least_seconds: float = _LEAST_SECONDS
    _last: float = field(default_factory=time.monotonic)
    _steps: "deque[float]" = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _paused: bool = False

    def step_done(self) -> None:
        """Record a finished step."""
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch while a snapshot is written or an evaluation runs."""
        self._paused = True
        try:
            yield
        finally:
            self._last, self._paused = time.monotonic(), False

    def overdue_seconds(self) -> float:
        """Return for how long a step has been overdue; at most 0 if none is."""
        limit = max(self.least_seconds, _FACTOR * statistics.median(self._steps) if self._steps else 0.0)
        return -limit if self._paused else time.monotonic() - self._last - limit


@contextmanager
def watch_steps(*, least_seconds: float = _LEAST_SECONDS, look_seconds: float = 1.0) -> Iterator[Watchdog]:
    """Yield a watchdog that ends this process with exit code 31 when no step finishes in max(10 medians, 5 minutes)."""
    watchdog, closed = Watchdog(least_seconds=least_seconds), threading.Event()

    def watch() -> None:
        while not closed.wait(look_seconds):
            if watchdog.overdue_seconds() > 0:
                print("DistributedError: no step finished for too long. Stacks of all threads:", file=sys.stderr)
                faulthandler.dump_traceback(sys.stderr)
                print("The last snapshot is kept; run the same command again to continue.", file=sys.stderr, flush=True)
                os._exit(DistributedError.exit_code)

    thread = threading.Thread(target=watch, daemon=True, name="watchdog")
    thread.start()
    try:
        yield watchdog
    finally:
        closed.set()
        thread.join()
